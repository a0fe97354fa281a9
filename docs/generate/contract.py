"""The reference of the escrow contract, from the NatSpec comments of `contracts/src/interfaces/IEscrow.sol` (read by solc)."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from docs.generate.markdown import code, table

ROOT = Path(__file__).parent.parent.parent
SOURCE = ROOT / "contracts" / "src" / "interfaces" / "IEscrow.sol"
READER = Path(__file__).parent / "natspec.mjs"
_TYPE = re.compile(r"((?:^\s*///[^\n]*\n)+)\s*(struct|enum) (\w+) \{(.*?)\n    \}", re.DOTALL | re.MULTILINE)
_MEMBER = re.compile(r"^\s*(?:([\w.\[\]]+)\s+)?(\w+)[;,]?\s*(?://\s*(.*))?$")


def pages() -> dict[str, str]:
    """The page of the escrow contract."""
    output = subprocess.run(["node", READER], capture_output=True, text=True, check=True, cwd=ROOT / "contracts").stdout
    document = json.loads(output)
    user, developer, abi = document["userdoc"], document["devdoc"], document["abi"]
    source = SOURCE.read_text(encoding="utf-8")
    parts = [
        "# Escrow contract\n",
        f"{developer.get('title', '')}\n",
        f"{user.get('notice', '')}\n",
        "This page is made from `contracts/src/interfaces/IEscrow.sol`; `contracts/README.md` says how the contract is built.\n",
        "## Functions\n",
        *_functions(abi, user, developer, view=False),
        "## Views\n",
        *_functions(abi, user, developer, view=True),
        "## Structs and enums\n",
        *_types(source),
        "## Events\n",
        table(("event", "meaning"), _events(abi, user)),
        "## Errors\n",
        table(("error",), ((code(_signature(entry)),) for entry in abi if entry["type"] == "error")),
    ]
    return {"contract.md": "\n".join(parts)}


def _functions(abi: list[dict[str, Any]], user: dict[str, Any], developer: dict[str, Any], *, view: bool) -> Iterator[str]:
    for entry in abi:
        if entry["type"] != "function" or (entry["stateMutability"] in {"view", "pure"}) is not view:
            continue
        key = f"{entry['name']}({','.join(_canonical(item) for item in entry['inputs'])})"
        returns = ", ".join(f"{item['type']} {item['name']}".strip() for item in entry["outputs"])
        yield f"### `{entry['name']}`\n"
        yield f"```solidity\n{_signature(entry)}{f' returns ({returns})' if returns else ''}\n```\n"
        notice = user["methods"].get(key, {}).get("notice", "")
        details = developer["methods"].get(key, {}).get("details", "")
        yield "\n\n".join(text for text in (notice, details) if text) + "\n"


def _canonical(item: dict[str, Any]) -> str:
    if item["type"].startswith("tuple"):
        return f"({','.join(_canonical(part) for part in item['components'])}){item['type'].removeprefix('tuple')}"
    return str(item["type"])


def _signature(entry: dict[str, Any]) -> str:
    items = (
        f"{_solidity_type(item)}{' indexed' if item.get('indexed') else ''} {item['name']}".strip() for item in entry["inputs"]
    )
    return f"{entry['name']}({', '.join(items)})"


def _solidity_type(item: dict[str, Any]) -> str:
    return re.sub(r"^(struct|enum|contract) (\w+\.)?", "", str(item.get("internalType") or item["type"]))


def _events(abi: list[dict[str, Any]], user: dict[str, Any]) -> Iterator[tuple[str, str]]:
    notices = {key.partition("(")[0]: value.get("notice", "") for key, value in user.get("events", {}).items()}
    for entry in abi:
        if entry["type"] == "event":
            yield code(_signature(entry)), notices.get(entry["name"], "")


def _types(source: str) -> Iterator[str]:
    """Structs and enums with the comments beside their members: solc's documents leave them out."""
    for comment, kind, name, body in _TYPE.findall(source):
        yield f"### `{name}` ({kind})\n"
        yield " ".join(comment.replace("///", " ").split()) + "\n"
        members = [match for line in body.strip().splitlines() if (match := _MEMBER.match(line))]
        rows = ((code(match[2]), code(match[1] or str(number)), match[3] or "") for number, match in enumerate(members))
        yield table(("member", "type" if kind == "struct" else "number", "meaning"), rows)
