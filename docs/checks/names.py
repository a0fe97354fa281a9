"""Checks that names in the documentation exist: paths, commands and their options, environment variables, settings, links.

Run with `python -m docs.checks.names`; it prints each name that the code does not have, and exits with status 1.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import json
import re
import sys
import tomllib
from collections.abc import Iterator
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from coordinator.config import ENV_PREFIX as COORDINATOR_PREFIX
from coordinator.config import CoordinatorConfig
from docs.checks.markdown import ROOT, Block, Page, pages
from docs.generate.cli import commands, option_names
from docs.generate.metrics import exported_metrics
from node.service.config import ENV_PREFIX as NODE_PREFIX
from node.service.config import NodeConfig
from tallystick.client.config import ENV_PREFIX as GATEWAY_PREFIX
from tallystick.client.config import ClientConfig

CONFIGS = {"client": ClientConfig, "node": NodeConfig, "coordinator": CoordinatorConfig}
SHELLS = {"sh", "bash", "console"}
MADE_BY_BUILD = ("docs/reference/", "contracts/node_modules", "build/")
_PATH = re.compile(r"(?<![\w./~'-])(?:\.ci|contracts|coordinator|docs|node|scripts|tallystick|tests)/[\w./*-]*[\w*/]")
_SETTINGS = {NODE_PREFIX: NodeConfig, COORDINATOR_PREFIX: CoordinatorConfig, GATEWAY_PREFIX: ClientConfig}
"""The settings that environment variables of each prefix set."""
_VARIABLE = re.compile(r"\bTALLY(?:STICK)?_[A-Z][A-Z_]*[A-Z]\b")
_COMMAND = re.compile(
    r"(?:^|[|;&(]|\$ |\.venv/bin/)\s*tally(?= [a-z-])((?: +(?:\"[^\"]*\"|'[^']*'|[^\s|;&#`)]+))+)", re.MULTILINE
)
_WORD = re.compile(r"[a-z][a-z-]*")


def main() -> int:
    """Prints what is wrong. Returns the exit status."""
    problems = [problem for page in pages() for problem in _problems(page)]
    sys.stdout.writelines(f"{problem}\n" for problem in problems)
    return 1 if problems else 0


def _problems(page: Page) -> Iterator[str]:
    name = page.path.relative_to(ROOT)
    if page.path.parent == ROOT / "docs" and page.path.name == "README.md":
        return
    if page.path.name != "CHANGELOG.md":  # it also names what was there before
        for line, span in page.spans():
            words = () if page.generated else _unknown_words(span)  # generated names come from the code itself
            for problem in (*_unknown_names(span), *words):
                yield f"{name}:{line}: {problem}"
        for block in page.blocks:
            for problem in _block_problems(block, generated=page.generated):
                yield f"{block.where}: {problem}"
    if ROOT / "docs" not in page.path.parents:  # Sphinx checks the links of its own pages
        for line, target in page.links():
            if broken := _broken_link(page, target):
                yield f"{name}:{line}: {broken}"


def _unknown_names(text: str) -> Iterator[str]:
    for path in _PATH.findall(text):
        if not path.startswith(MADE_BY_BUILD) and not _exists(path):
            yield f"no such path: {path}"
    yield from _unknown_commands(text)
    for variable in _VARIABLE.findall(text):
        if not _known_variable(variable):
            yield f"no such environment variable: {variable}"


def _exists(path: str) -> bool:
    return any(ROOT.glob(path)) if "*" in path else (ROOT / path).exists()


@functools.cache
def _known_commands() -> dict[tuple[str, ...], Any]:
    return dict(commands())


def _unknown_commands(text: str) -> Iterator[str]:
    known = _known_commands()
    for match in _COMMAND.finditer(text):
        words = [word.strip("\"'.,:[]") for word in match[1].split()]
        path: tuple[str, ...] = ("tally",)
        while words and (*path, words[0]) in known:
            path = (*path, words.pop(0))
        command = known[path]
        if getattr(command, "commands", None) and words and _WORD.fullmatch(words[0]):
            yield f"no such command: {' '.join((*path, words[0]))}"
        below = [member for full, member in known.items() if full[: len(path)] == path] if "…" in words else [command]
        options = {"--help", "-h"}.union(*(option_names(member) for member in below))
        for word in words:
            option = word.partition("=")[0]
            if re.match(r"--?[a-z]", option) and option not in options:
                yield f"{' '.join(path)}: no such option: {option}"


def _unknown_words(span: str) -> Iterator[str]:
    """A code span that is one name: `top_up_total` must be a word in the sources, `[[budgets]]` a table of the settings.

    A benchmark's key that ends with a number, such as `answers_4`, is `answers_N` there.
    """
    names = {span, span.removesuffix("_total"), re.sub(r"_\d+$", "_N", span)}
    if re.fullmatch(r"[a-z]+(_[a-z0-9]+)+", span) and not names & (_words_in_code() | exported_metrics().keys()):
        yield f"no such name in the code: {span}"
    table = re.fullmatch(r"\[{1,2}([a-z_.]+)\]{1,2}", span)
    if table and not any(_has_table(config, table[1].split(".")) for config in CONFIGS.values()):
        yield f"no such table in the settings: {span}"


def _has_table(config: Any, path: list[str]) -> bool:
    inner = _dataclass_in(get_type_hints(config).get(path[0]))
    return inner is not None and (len(path) == 1 or _has_table(inner, path[1:]))


@functools.cache
def _words_in_code() -> frozenset[str]:
    folders = ("tallystick", "node", "coordinator", "contracts/src", "scripts")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in {".py", ".toml", ".sol"}]
    return frozenset(word for path in files for word in re.findall(r"[a-z]\w*", path.read_text(encoding="utf-8")))


def _known_variable(name: str) -> bool:
    for prefix, config in _SETTINGS.items():
        if name.startswith(prefix) and name.removeprefix(prefix).lower() in {field.name for field in dataclasses.fields(config)}:
            return True
    return name in _variables_in_code()


def _variables_in_code() -> set[str]:
    if not _IN_CODE:
        folders = ("tallystick", "node", "coordinator", "scripts", ".ci")
        files = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file() and path.suffix != ".pyc"]
        _IN_CODE.update(*(_VARIABLE.findall(path.read_text(encoding="utf-8", errors="ignore")) for path in files))
    return _IN_CODE


_IN_CODE: set[str] = set()


def _block_problems(block: Block, *, generated: bool) -> Iterator[str]:
    language = block.info[0] if block.info else ""
    if language in SHELLS:
        yield from _unknown_names(block.text.replace("\\\n", " "))
    elif language == "toml" and not generated:
        yield from _toml_problems(block)
    elif language == "python":
        try:
            compile(block.text, block.where, "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        except SyntaxError as error:
            yield f"does not compile: {error.msg} in line {error.lineno} of the block"
    elif language == "json" and "…" not in block.text:
        try:
            json.loads(block.text)
        except ValueError as error:
            yield f"not JSON: {error}"
    elif language == "mermaid":
        yield from (f"no such path: {path}" for path in _PATH.findall(block.text) if not _exists(path))


def _toml_problems(block: Block) -> Iterator[str]:
    try:
        settings = tomllib.loads(block.text)
    except tomllib.TOMLDecodeError as error:
        yield f"not TOML: {error}"
        return
    named = [CONFIGS[word] for word in block.info[1:] if word in CONFIGS] or list(CONFIGS.values())
    unknown = sorted(
        (list(_unknown_settings(config, settings)) for config in named),
        key=lambda names: (sum("." not in n for n in names), len(names)),
    )
    if unknown[0]:
        yield f"no such setting: {', '.join(unknown[0])}"


def _unknown_settings(config: Any, settings: dict[str, Any], prefix: str = "") -> Iterator[str]:
    hints = get_type_hints(config)
    for name, value in settings.items():
        if name not in hints:
            yield prefix + name
            continue
        for table in value if isinstance(value, list) else [value]:
            if isinstance(table, dict) and (inner := _dataclass_in(hints[name])):
                yield from _unknown_settings(inner, table, f"{prefix}{name}.")


def _dataclass_in(hint: Any) -> Any:
    if get_origin(hint) in {UnionType, Union, tuple}:
        return next((inner for argument in get_args(hint) if (inner := _dataclass_in(argument))), None)
    return hint if dataclasses.is_dataclass(hint) else None


def _broken_link(page: Page, target: str) -> str | None:
    if re.match(r"[a-z]+:", target):
        return None
    path, _, anchor = target.partition("#")
    linked = (page.path.parent / path).resolve() if path else page.path
    built = linked.is_relative_to(ROOT) and str(linked.relative_to(ROOT)).startswith(MADE_BY_BUILD)
    if not linked.exists() and not built:
        return f"broken link: {target}"
    if anchor and linked.suffix == ".md" and linked.exists() and anchor not in Page(linked).anchors():
        return f"broken anchor: {target}"
    return None


if __name__ == "__main__":
    sys.exit(main())
