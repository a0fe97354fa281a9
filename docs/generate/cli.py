"""The CLI reference, from the same command tree that answers `tally --help`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import typer
from typer.core import TyperArgument, TyperGroup, TyperOption

from docs.generate.markdown import code, fence, table
from tallystick.cli.commands import app

INTRODUCTION = """# Command line

One program, `tally`, serves clients, providers, operators and contract developers. Every command takes `--help`. Commands that
take `--json` print one JSON document on standard output. An error is one line on standard error (with `--json`, one JSON
document) and exit status 1; [error codes](errors.md) lists what the code in it means.
"""


def pages() -> dict[str, str]:
    """One page with every command, its arguments, options and defaults."""
    return {"cli.md": "\n".join([INTRODUCTION, *(_section(command, path) for path, command in commands())])}


def commands() -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every visible command with its full name, groups before their members."""
    yield from _below(typer.main.get_command(app), ("tally",))


def _below(command: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    yield path, command
    if isinstance(command, TyperGroup):
        for name, member in sorted(command.commands.items()):
            if not member.hidden:
                yield from _below(member, (*path, name))


def option_names(command: Any) -> set[str]:
    """All spellings of a command's options."""
    return {name for p in command.params if isinstance(p, TyperOption) for name in (*p.opts, *p.secondary_opts)}


def _section(command: Any, path: tuple[str, ...]) -> str:
    name = " ".join(path)
    context = typer.Context(command, info_name=name)
    usage = " ".join(command.get_usage(context).removeprefix("Usage: ").split())
    parts = [f"{'#' * min(len(path) + 1, 4)} `{name}`\n", (command.help or "").strip() + "\n", fence(usage)]
    arguments = [p for p in command.params if isinstance(p, TyperArgument) and not p.hidden]
    options = [p for p in command.params if isinstance(p, TyperOption) and not p.hidden and p.name != "help"]
    if arguments:
        rows = [(code(str(p.name).upper()), _help(p), "required" if p.required else _default(p)) for p in arguments]
        parts.append(table(("argument", "meaning", "default"), rows))
    if options:
        rows = [(_declaration(p, context), _help(p), "required" if p.required else _default(p)) for p in options]
        parts.append(table(("option", "meaning", "default"), rows))
    if isinstance(command, TyperGroup):
        members = [(f"{name} {key}", member) for key, member in sorted(command.commands.items()) if not member.hidden]
        listed = [(f"[`{full}`](#{full.replace(' ', '-')})", _summary(member)) for full, member in members]
        parts.append(table(("command", "what it does"), listed))
    return "\n".join(parts)


def _summary(command: Any) -> str:
    return (command.help or "").strip().split("\n\n", maxsplit=1)[0]


def _help(parameter: TyperArgument | TyperOption) -> str:
    return str(parameter.help or "")


def _declaration(option: TyperOption, context: typer.Context) -> str:
    names = ", ".join(code(name) for name in (*option.opts, *option.secondary_opts))
    return names if option.is_flag else f"{names} {code(option.display_type(context).upper())}"


def _default(parameter: TyperArgument | TyperOption) -> str:
    environment = f"environment: {code(str(parameter.envvar))}" if parameter.envvar else ""
    default = parameter.default
    if isinstance(default, bool) or default in (None, (), []) or callable(default):
        return environment
    return f"{code(str(default))}; {environment}" if environment else code(str(default))
