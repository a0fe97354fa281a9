"""The map of the code: packages and rooms with their import rules, from import-linter's contracts and the rooms' docstrings."""

from __future__ import annotations

import ast
import tomllib
from pathlib import Path
from typing import Any

from docs.generate.markdown import code, first_sentence, table

ROOT = Path(__file__).parent.parent.parent
INTRODUCTION = """# Rooms of the code

Each package is divided into rooms: folders, and a few modules beside them. A room may import the rooms drawn below it and no
others; `scripts/lint` checks this. Rooms on one line are independent of each other.
"""


def pages() -> dict[str, str]:
    """The page with one diagram and one table for each package that has layers."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]["contracts"]
    layered = [contract for contract in contracts if contract["type"] == "layers"]
    others = [contract["name"] for contract in contracts if contract["type"] != "layers"]
    rules = "\n".join(f"- {name}" for name in others)
    sections = [_section(package, contract) for contract in layered for package in contract["containers"]]
    return {"rooms.md": "\n".join([INTRODUCTION, "Rules between packages:\n", rules, "", *sections])}


def _section(package: str, contract: dict[str, Any]) -> str:
    layers = [[room.strip() for room in layer.replace(":", "|").split("|")] for layer in contract["layers"]]
    rows = ((code(path), _purpose(ROOT / path)) for layer in layers for room in layer if (path := _path(package, room)))
    return "\n".join([f"## `{package}`\n", _diagram(package, layers), table(("room", "contents"), rows)])


def _diagram(package: str, layers: list[list[str]]) -> str:
    lines = [f"%% Rooms of {package}, each above those that it may import", "flowchart TB"]
    for number, layer in enumerate(layers):
        lines.append(f'    layer{number}["{"  ·  ".join(layer)}"]')
    lines += [f"    layer{number} --> layer{number + 1}" for number in range(len(layers) - 1)]
    return "\n".join(["```mermaid", *lines, "```", ""])


def _path(package: str, room: str) -> str:
    base = f"{package.replace('.', '/')}/{room}"
    return f"{base}/" if (ROOT / base).is_dir() else f"{base}.py"


def _purpose(path: Path) -> str:
    source = path / "__init__.py" if path.is_dir() else path
    return first_sentence(ast.get_docstring(ast.parse(source.read_text(encoding="utf-8"))) or "") if source.exists() else ""
