"""Loads the config of a process, a frozen dataclass, from a TOML file, environment variables and command-line flags.

`load(CoordinatorConfig, Path("c.toml"), prefix="TALLY_COORDINATOR_", flags={"port": 9000})`: flags override environment
variables, which override the file. An environment variable is named by the prefix and the field's name in upper case; that of a
member of a table, by both names: TALLY_NODE_TRACING_ENDPOINT. Supported field types are str, int, bool, float, Path, Amount (as a
decimal string), Address, `X | None`, tuples of these, and tuples of nested config dataclasses (TOML tables).
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType, NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from tallystick.protocol.errors import BadMessage
from tallystick.protocol.types import Address, Amount, parse_address, parse_amount

C = TypeVar("C")
HOME_ENV = "TALLYSTICK_HOME"
_NUMBER = re.compile(r"[+-]?[0-9]{1,40}(\.[0-9]{0,40})?([eE][+-]?[0-9]{1,4})?")


def home() -> Path:
    """The folder with this user's wallets, config and state: TALLYSTICK_HOME if it is set, else ~/.tallystick."""
    return Path(os.environ.get(HOME_ENV) or Path.home() / ".tallystick").expanduser()


def load(
    cls: type[C],
    path: Path | None = None,
    *,
    prefix: str = "",
    flags: Mapping[str, Any] | None = None,
    environment: Mapping[str, str] | None = None,
) -> C:
    """Reads the config. A flag that is None is ignored. Raises BadMessage that names the source and the field."""
    values: dict[str, Any] = {}
    if path is not None:
        try:
            values |= tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise BadMessage(f"config {path}: {error.strerror}") from None
        except ValueError as error:
            raise BadMessage(f"config {path}: {error}") from None
    environ = os.environ if environment is None else environment
    sources: dict[str, str] = {}
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]  # C is a dataclass
        variable = prefix + field.name.upper()
        if prefix and variable in environ:
            values[field.name], sources[field.name] = environ[variable], f"environment variable {variable}"
    if prefix:
        _read_members(cls, values, sources, prefix, environ)
    for name, value in (flags or {}).items():
        if value is not None:
            values[name], sources[name] = value, f"flag {name}"
    return _build(cls, values, str(path or "config"), sources)


def _read_members(
    cls: type[Any], values: dict[str, Any], sources: dict[str, str], prefix: str, environ: Mapping[str, str]
) -> None:
    """Reads the variables of the members of tables."""
    fields = {field.name for field in dataclasses.fields(cls)}
    for name, hint in get_type_hints(cls).items():
        table = values.get(name, {})
        if not dataclasses.is_dataclass(hint) or not isinstance(table, Mapping):
            continue
        for member in dataclasses.fields(hint):
            variable = f"{prefix}{name}_{member.name}".upper()
            if variable in environ and f"{name}_{member.name}" not in fields:
                table = {**table, member.name: environ[variable]}
                values[name], sources[f"{name}.{member.name}"] = table, f"environment variable {variable}"


def _build(cls: type[C], values: Mapping[str, Any], where: str, sources: Mapping[str, str] = MappingProxyType({})) -> C:
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]  # C is a dataclass
    unknown = values.keys() - fields.keys()
    if unknown:
        close = difflib.get_close_matches(min(unknown), fields, 1)
        known = f"did you mean {close[0]}?" if close else f"known are {', '.join(sorted(fields))}"
        raise BadMessage(f"{where}: unknown setting {', '.join(sorted(unknown))}; {known}")
    hints = get_type_hints(cls)
    converted = {
        name: _convert(hints[name], value, sources.get(name) or f"{where}: {name}", _of_members(sources, name))
        for name, value in values.items()
    }
    required = (dataclasses.MISSING, dataclasses.MISSING)
    missing = [n for n, f in fields.items() if n not in converted and (f.default, f.default_factory) == required]
    if missing:
        raise BadMessage(f"{where}: missing setting {', '.join(missing)}")
    return cls(**converted)


def _of_members(sources: Mapping[str, str], table: str) -> Mapping[str, str]:
    return {name.removeprefix(f"{table}."): source for name, source in sources.items() if name.startswith(f"{table}.")}


def _convert(hint: Any, value: Any, where: str, sources: Mapping[str, str] = MappingProxyType({})) -> Any:
    if get_origin(hint) in (UnionType, Union):  # `Address | None` is the latter: Address is a NewType
        inner = next(h for h in get_args(hint) if h is not NoneType)
        return None if value is None or value == "" else _convert(inner, value, where)
    if get_origin(hint) is tuple:
        items = [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value
        if not isinstance(items, list | tuple):
            raise BadMessage(f"{where}: expected a list")
        return tuple(_convert(get_args(hint)[0], item, f"{where}[{i}]") for i, item in enumerate(items))
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if isinstance(value, hint):
            return value
        if not isinstance(value, Mapping):
            raise BadMessage(f"{where}: expected a table")
        return _build(hint, value, where, sources)
    return _scalar(hint, value, where)


def _scalar(hint: Any, value: Any, where: str) -> Any:
    if isinstance(hint, type) and isinstance(value, hint) and hint not in (int, float):
        return value
    if hint is Amount and isinstance(value, str):
        return parse_amount(value, field=where)
    if hint is Address:
        return parse_address(value, where)
    if hint is bool and str(value).lower() in {"true", "false", "1", "0", "yes", "no"}:
        return str(value).lower() in {"true", "1", "yes"}
    if hint is Path and isinstance(value, str):
        return Path(value).expanduser()
    if hint in (int, float) and isinstance(value, str | int | float) and not isinstance(value, bool):
        number = _number(hint, value)
        if number is not None:
            return number
    expected = 'dollars in quotes, such as "0.50"' if hint is Amount else getattr(hint, "__name__", str(hint))
    got = f"{type(value).__name__}" if hint is str else f"{str(value)[:100]!r}"  # a text may be a secret, so it is not shown
    raise BadMessage(f"{where}: expected {expected}, got {got}")


def _number(hint: type[int | float], value: str | float) -> int | float | None:
    """A finite number that fits 64 bits and is written in ASCII digits; None for any other value."""
    if isinstance(value, float) and hint is int:
        return None
    if isinstance(value, str) and not _NUMBER.fullmatch(value.strip()):
        return None
    try:
        number = hint(value)
    except (ValueError, OverflowError):
        return None
    return number if abs(number) < 1 << 63 else None  # false for NaN
