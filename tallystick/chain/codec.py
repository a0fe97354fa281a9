"""Encoding and decoding by a contract's ABI: calls, results, logs and custom errors.

https://docs.soliditylang.org/en/latest/abi-spec.html
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from tallystick.chain.abi_values import AbiError, decode, encode
from tallystick.protocol.codecs import keccak
from tallystick.protocol.errors import Code, Refusal, TallyError, Unavailable

_BUILT_IN = [
    {"type": "error", "name": "Error", "inputs": [{"name": "message", "type": "string"}]},
    {"type": "error", "name": "Panic", "inputs": [{"name": "code", "type": "uint256"}]},
]
_CODES = {
    "BadSignature": Code.BAD_SIGNATURE,
    "BadAuthorization": Code.BAD_SIGNATURE,
    "Expired": Code.ORDER_EXPIRED,
    "InsufficientFree": Code.INSUFFICIENT_FUNDS,
    "InsufficientStake": Code.INSUFFICIENT_FUNDS,
    "NoCredit": Code.INSUFFICIENT_FUNDS,
    "ERC20InsufficientBalance": Code.INSUFFICIENT_FUNDS,
    "ERC20InsufficientAllowance": Code.INSUFFICIENT_FUNDS,
}


class ContractError(Refusal):
    """A contract reverted. `name` is its custom error, such as "TooEarly"; `values` are the error's arguments by name."""

    def __init__(self, name: str, values: Mapping[str, Any]) -> None:
        arguments = ", ".join(f"{k}={v.hex() if isinstance(v, bytes) else v}" for k, v in values.items())
        super().__init__(_CODES.get(name, Code.CHAIN_REFUSED), f"the contract reverted: {name}({arguments})")
        self.name, self.values = name, dict(values)


class WrongContract(Unavailable):
    """The address of a deployment has no contract, or another one. A retry does not help: the settings must change."""

    retry = False

    def __init__(self, message: str) -> None:
        super().__init__(Code.CHAIN_UNAVAILABLE, message)


@dataclass(frozen=True, slots=True)
class AbiEntry:
    """A function, event or error of an ABI."""

    name: str
    id: bytes
    names: tuple[str, ...]
    types: tuple[str, ...]
    indexed: tuple[bool, ...]
    outputs: tuple[str, ...]


class Abi:
    """One contract's interface and creation code."""

    def __init__(self, entries: Sequence[Mapping[str, Any]], bytecode: bytes = b"") -> None:
        self.bytecode = bytecode
        kinds: dict[str, list[AbiEntry]] = {"function": [], "event": [], "error": [], "constructor": []}
        for raw in entries:
            if raw["type"] in kinds:
                kinds[raw["type"]].append(_entry(raw))
        self._functions = {entry.name: entry for entry in kinds["function"]}
        self._constructor = next(iter(kinds["constructor"]), None)
        self.events = {entry.id: entry for entry in kinds["event"]}
        self.errors = {entry.id[:4]: entry for entry in kinds["error"]}

    def call(self, function: str, *arguments: Any) -> bytes:
        """The calldata of a function call."""
        entry = self._functions[function]
        return entry.id[:4] + encode(entry.types, arguments)

    def create(self, *arguments: Any) -> bytes:
        """The data of a transaction that creates the contract."""
        return self.bytecode + (encode(self._constructor.types, arguments) if self._constructor else b"")

    def result(self, function: str, output: bytes) -> tuple[Any, ...]:
        """Decodes the values that a function returned. Raises WrongContract if another contract, or none, returned them."""
        try:
            return decode(self._functions[function].outputs, output)
        except AbiError as error:
            raise WrongContract(f"{function}: another contract is at this address: {error}") from None

    def log(self, topics: Sequence[bytes], data: bytes) -> tuple[str, dict[str, Any]] | None:
        """Decodes an event into its name and values; None for an event of another contract."""
        entry = self.events.get(topics[0]) if topics else None
        if entry is None:
            return None
        unindexed = iter(decode([t for t, i in zip(entry.types, entry.indexed, strict=True) if not i], data))
        from_topics = (decode([t], topic)[0] for t, topic in zip(entry.types, topics[1:], strict=False))
        values = [next(from_topics) if indexed else next(unindexed) for indexed in entry.indexed]
        return entry.name, dict(zip(entry.names, values, strict=True))


def _entry(raw: Mapping[str, Any]) -> AbiEntry:
    inputs = raw.get("inputs", [])
    name, types = raw.get("name", ""), tuple(map(_type, inputs))
    return AbiEntry(
        name=name,
        id=keccak(f"{name}({','.join(types)})".encode()),
        names=tuple(item["name"] for item in inputs),
        types=types,
        indexed=tuple(bool(item.get("indexed")) for item in inputs),
        outputs=tuple(map(_type, raw.get("outputs", []))),
    )


def _type(item: Mapping[str, Any]) -> str:
    if not item["type"].startswith("tuple"):
        return str(item["type"])
    return f"({','.join(map(_type, item['components']))}){item['type'].removeprefix('tuple')}"


@cache
def load_abi(name: str) -> Abi:
    """Loads the interface of a contract in tallystick/chain/abi: "Escrow" or "TestUSD"."""
    raw = json.loads(files("tallystick.chain").joinpath("abi", f"{name}.json").read_text())
    return Abi(raw["abi"], bytes.fromhex(raw["bytecode"][2:]))


@cache
def _known_errors() -> dict[bytes, AbiEntry]:
    return Abi(_BUILT_IN).errors | load_abi("TestUSD").errors | load_abi("Escrow").errors


def revert_error(data: bytes, reason: str = "") -> TallyError:
    """The error for the data that a failed call returned. `reason` is the endpoint's text, for data that is unknown.

    Errors of our contracts, of Solidity and of OpenZeppelin become a ContractError with their name.
    """
    entry = _known_errors().get(data[:4])
    try:
        if entry is not None:
            return ContractError(entry.name, dict(zip(entry.names, decode(entry.types, data[4:]), strict=True)))
    except AbiError:
        pass  # only the selector is one of ours
    return Refusal(Code.CHAIN_REFUSED, f"the contract reverted: {data.hex()[:80] or reason or 'without a reason'}")


def snake_case(name: str) -> str:
    """Converts CamelCase to snake_case."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()
