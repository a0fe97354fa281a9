"""The reference of settings: one page a process, from its example.toml and the dataclass that reads it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

from coordinator.config import CoordinatorConfig
from docs.generate.markdown import code, fence, table
from node.service.config import NodeConfig
from tallystick.client.config import ClientConfig
from tallystick.protocol.types import Amount, format_amount

ROOT = Path(__file__).parent.parent.parent
_SETTING = re.compile(r"#? ?(\[\[?[a-z_.]+\]\]?|[a-z_]+ = .*)$")
_HEADER = re.compile(r"#? ?(\[\[?[a-z_.]+\]\]?)$")
SCALARS = {
    "Amount": "dollars, as text",
    "Address": "address",
    "Path": "path",
    "str": "text",
    "int": "integer",
    "float": "number",
    "bool": "`true` or `false`",
}


class Process(NamedTuple):
    """A process with settings."""

    name: str
    title: str
    example: str
    config: Any
    prefix: str


PROCESSES = (
    Process("client", "Client and gateway settings", "tallystick/client/example.toml", ClientConfig, "TALLY_GATEWAY_"),
    Process("node", "Node settings", "node/example.toml", NodeConfig, "TALLY_NODE_"),
    Process("coordinator", "Coordinator settings", "coordinator/example.toml", CoordinatorConfig, "TALLY_COORDINATOR_"),
)


def pages() -> dict[str, str]:
    """One page for each process."""
    return {f"config-{process.name}.md": _page(process) for process in PROCESSES}


def _page(process: Process) -> str:
    lines = (ROOT / process.example).read_text(encoding="utf-8").splitlines()
    missing = [field.name for field in dataclasses.fields(process.config) if not any(_names(line, field.name) for line in lines)]
    if missing:
        raise SystemExit(f"{process.example}: says nothing of {', '.join(missing)}")
    parts = [
        f"# {process.title}\n",
        f"`{process.example}` has the same text. Environment variables win over the file, command-line flags over both.\n",
        *_body(lines),
        "## All settings\n",
        f"An environment variable is `{process.prefix}` and the setting's name in upper case, with `_` for the dot of a table.\n",
        table(("setting", "type", "default"), _fields(process.config, "")),
    ]
    return "\n".join(parts)


def _names(line: str, setting: str) -> bool:
    return re.match(rf"(# )?(\[\[?)?{setting}\b", line) is not None


def _body(lines: list[str]) -> Iterator[str]:
    """Prose as paragraphs, settings as code, one after the other as in the file; a table's name becomes a heading."""
    prose: list[str] = []
    settings: list[str] = []
    for index, line in enumerate([*lines, ""]):
        is_setting = bool(_SETTING.match(line))
        header = _HEADER.match(line)
        if (not is_setting or header) and settings:
            yield from _flush(prose, settings)
            prose, settings = [], []
        if header:
            if header[1].strip("[]") not in {heading.strip("[]") for heading in _seen_headers(lines[:index])}:
                yield f"## `{header[1]}`\n"
            settings.append(line)
        elif is_setting:
            settings.append(line)
        elif line.startswith("#"):
            prose.append(line.removeprefix("#").strip())
        elif prose:
            yield from _flush(prose, settings)
            prose, settings = [], []
    yield from _flush(prose, settings)


def _seen_headers(lines: list[str]) -> list[str]:
    return [match[1] for line in lines if (match := _HEADER.match(line))]


def _flush(prose: list[str], settings: list[str]) -> Iterator[str]:
    if prose:
        yield " ".join(prose).replace("[[", "\\[\\[").replace("<", "&lt;") + "\n"
    if settings:
        yield fence("\n".join(settings), "toml")


def _fields(config: Any, prefix: str) -> Iterator[tuple[str, str, str]]:
    hints = get_type_hints(config)
    for field in dataclasses.fields(config):
        hint = hints[field.name]
        inner = _dataclass_in(hint)
        many = "tuple" in str(hint)
        name = f"{prefix}{field.name}"
        yield (
            code(f"[[{name}]]" if inner and many else f"[{name}]" if inner else name),
            _type_name(hint, inner, many=many),
            _default(field, hint),
        )
        if inner and dataclasses.is_dataclass(inner):
            yield from _fields(inner, f"{name}.")


def _dataclass_in(hint: Any) -> Any:
    candidates = [hint, *getattr(hint, "__args__", ())]
    return next((candidate for candidate in candidates if dataclasses.is_dataclass(candidate)), None)


def _type_name(hint: Any, inner: Any, *, many: bool) -> str:
    if inner:
        return "list of tables" if many else "table"
    names = [getattr(part, "__name__", str(part)) for part in (hint, *getattr(hint, "__args__", ()))]
    scalar = next((SCALARS[name] for name in names if name in SCALARS), names[0])
    return f"list of {scalar}" if many else scalar


def _default(field: dataclasses.Field[Any], hint: Any) -> str:
    if field.default is dataclasses.MISSING:
        return "required" if field.default_factory is dataclasses.MISSING else ""
    value = field.default
    if hint is Amount:
        return code(f'"{format_amount(value)}"')
    if value is None or value in ((), ""):
        return "unset"
    return code(str(value.value if hasattr(value, "value") else value).lower() if isinstance(value, bool) else str(value))
