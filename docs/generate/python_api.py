"""The reference of the Python API: the public names of `tallystick`, from their docstrings and signatures."""

from __future__ import annotations

import enum
import inspect
import re
from collections.abc import Iterator
from typing import Any

import tallystick

GROUPS = {
    "Markets": ("Market", "SyncMarket", "ClientConfig", "RequestOptions", "Requirements", "Weights", "BatchResult"),
    "Jobs and answers": ("Job", "Result", "TextStream", "SyncJob", "SyncTextStream", "StreamInterrupted"),
    "Wallets and amounts": ("open_wallet", "Signer", "Amount", "parse_amount", "format_amount"),
    "Proofs": ("Proof", "read_proof"),
    "Errors": (
        "TallyError",
        "PeerError",
        "Refusal",
        "Unavailable",
        "BadMessage",
        "BadReceipt",
        "BadSeal",
        "BadSignature",
        "Code",
        "Fault",
    ),
}
"""Headings; names that are in none of them come under "More"."""


def pages() -> dict[str, str]:
    """One page with every public name."""
    public = [name for name in tallystick.__all__ if not name.startswith("_")]
    grouped = {name for names in GROUPS.values() for name in names}
    groups = {**GROUPS, "More": tuple(name for name in public if name not in grouped)}
    parts = ["# Python API\n", "All names below are imported from `tallystick`. `SyncMarket` is `Market` without `async`.\n"]
    for heading, names in groups.items():
        here = [name for name in names if name in public]
        if here:
            parts += [f"## {heading}\n", *(_entry(name) for name in here)]
    return {"python.md": "\n".join(parts)}


def _entry(name: str) -> str:
    thing = getattr(tallystick, name)
    if inspect.isclass(thing):
        return _class(name, thing)
    if inspect.isfunction(thing):
        return _directive("function", f"tallystick.{name}{_signature(thing)}", _docstring(thing))
    return _directive("data", f"tallystick.{name}", _docstring(thing))


def _class(name: str, cls: type) -> str:
    body = [_docstring(cls), *_fields(cls), *_members(cls)]
    signature = "" if issubclass(cls, enum.Enum | dict) else _signature(cls)
    return _directive("class", f"tallystick.{name}{signature}", "\n".join(body), colons=4)


def _members(cls: type) -> Iterator[str]:
    if issubclass(cls, enum.Enum):
        yield "Values: " + ", ".join(f"`{member.name}`" for member in cls) + ".\n"
        return
    for name, member in inspect.getmembers_static(cls):
        home = next(base for base in cls.__mro__ if name in vars(base))
        if name.startswith("_") or not home.__module__.startswith("tallystick"):
            continue
        function = member.__func__ if isinstance(member, classmethod | staticmethod) else member
        if isinstance(member, property):
            yield _directive("property", name, _docstring(member))
        elif inspect.isfunction(function):
            options = [":async:"] if inspect.iscoroutinefunction(function) else []
            options += [":classmethod:"] if isinstance(member, classmethod) else []
            options += [":staticmethod:"] if isinstance(member, staticmethod) else []
            yield _directive(
                "method",
                f"{name}{_signature(function, method=not isinstance(member, staticmethod))}",
                _docstring(function),
                options,
            )


def _fields(cls: type) -> Iterator[str]:
    """Attributes with a docstring below them, as `name: type` and then a string."""
    try:
        source = inspect.getsource(cls)
    except OSError:
        return
    for name, text in re.findall(r'^    ([a-z]\w*)\s*:[^\n]*\n    """(.*?)"""', source, re.DOTALL | re.MULTILINE):
        yield _directive("attribute", name, inspect.cleandoc(text))


def _signature(thing: Any, *, method: bool = False) -> str:
    try:
        signature = inspect.signature(thing)
    except ValueError:
        return ""
    parameters = list(signature.parameters.values())[1 if method else 0 :]
    text = str(signature.replace(parameters=parameters))
    text = re.sub(r"<factory>|<object object at 0x[0-9a-f]+>", "…", text)
    text = re.sub(r"<(?:built-in )?function (\w+)(?: at 0x[0-9a-f]+)?>", r"\1", text)
    return re.sub(
        r"'([^']*)'",
        lambda match: match[1] if re.search(r"[\[|.]|^[A-Z]|^(int|str|bool|bytes|float)$", match[1]) else match[0],
        text,
    )


def _docstring(thing: Any) -> str:
    text = inspect.getdoc(thing) or ""
    return "" if text.startswith(("str(object", "int([x])")) else text + "\n"


def _directive(kind: str, signature: str, body: str, options: list[str] | None = None, *, colons: int = 3) -> str:
    fence = ":" * colons
    return "\n".join([f"{fence}{{py:{kind}}} {signature}", *(options or []), "", body.rstrip(), fence, ""])
