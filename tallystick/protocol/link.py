"""What a node and its coordinator tell each other beside jobs: who they are, what is offered, what is free, what is owed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from tallystick.protocol.eip712 import Signed, read_signed
from tallystick.protocol.errors import BadMessage
from tallystick.protocol.json_members import read_count, read_items, read_members, read_text
from tallystick.protocol.messages import Ask, Claim, Connect, Order, Receipt, Terms
from tallystick.protocol.types import Address, Hash, parse_address
from tallystick.protocol.wire import dumps

MAX_CHAIN_ID = (1 << 63) - 1
"""Chains number themselves as they like: some ids are above 32 bits (EIP-2294 allows about 63)."""


_PORTS = {"http": 80, "ws": 80, "https": 443, "wss": 443}


def endpoint_of(url: str) -> str:
    """The host and port that a URL is dialled at, as `Connect.endpoint` names them: in lower case, with the scheme's usual port
    where the URL names none. Raises BadMessage.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port or _PORTS.get(parts.scheme)
    except ValueError:
        host = port = None
    if not host or port is None:
        raise BadMessage(f"expected an address such as https://coordinator.example, got {url[:200]!r}")
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


@dataclass(frozen=True, slots=True)
class Challenge:
    """What a coordinator sends first: random bytes to sign, and who and where it is."""

    challenge: Hash
    coordinator: Address
    chain_id: int
    contract: Address

    def to_json(self) -> dict[str, Any]:
        """The wire form."""
        return {
            "challenge": self.challenge.hex(),
            "coordinator": self.coordinator,
            "chainId": self.chain_id,
            "contract": self.contract,
        }

    @classmethod
    def from_json(cls, raw: object) -> Challenge:
        """Reads the wire form. Raises BadMessage."""
        challenge, coordinator, chain, contract = read_members(
            raw, "challenge", "challenge", "coordinator", "chainId", "contract"
        )
        try:
            nonce = Hash(bytes.fromhex(read_text(challenge, "challenge.challenge")))
        except ValueError:
            raise BadMessage("challenge.challenge: expected hex") from None
        if len(nonce) != 32:
            raise BadMessage("challenge.challenge: expected 32 bytes")
        return cls(
            nonce,
            parse_address(coordinator, "challenge.coordinator"),
            read_count(chain, "challenge.chainId", high=MAX_CHAIN_ID),
            parse_address(contract, "challenge.contract"),
        )


@dataclass(frozen=True, slots=True)
class Capacity:
    """What a node can take now: free slots over all its models, and the tokens a second it last measured (0: unknown)."""

    free: int
    slots: int
    tokens_per_second: int = 0
    first_token_ms: int = 0

    def to_json(self) -> dict[str, int]:
        """The wire form."""
        return {
            "free": self.free,
            "slots": self.slots,
            "tokensPerSecond": self.tokens_per_second,
            "firstTokenMs": self.first_token_ms,
        }

    @classmethod
    def from_json(cls, raw: object) -> Capacity:
        """Reads the wire form. Raises BadMessage."""
        names = ("free", "slots", "tokensPerSecond", "firstTokenMs")
        values = read_members(raw, "capacity", *names)
        return cls(*(read_count(value, f"capacity.{name}") for name, value in zip(names, values, strict=True)))


MAX_ASKS = 256
MAX_ASK_BYTES = 16 * 1024
MAX_NODE_ASK_BYTES = 64 * 1024
MAX_FEATURES, MAX_FEATURE_CHARACTERS = 64, 64


def read_ask(raw: object, field: str = "ask") -> Signed[Ask]:
    """A signed ask of at most MAX_ASK_BYTES of JSON and MAX_FEATURES short features. Raises BadMessage."""
    size = len(dumps(raw))
    if size > MAX_ASK_BYTES:
        raise BadMessage(f"{field}: {size} bytes, at most {MAX_ASK_BYTES} are allowed")
    ask = read_signed(Ask, raw, field)
    features = ask.message.spec.features
    if len(features) > MAX_FEATURES or any(len(feature) > MAX_FEATURE_CHARACTERS for feature in features):
        text = f"at most {MAX_FEATURES} features of at most {MAX_FEATURE_CHARACTERS} characters are allowed"
        raise BadMessage(f"{field}.spec.features: {text}")
    return ask


def read_asks(raw: object, field: str = "asks") -> tuple[Signed[Ask], ...]:
    """All asks of a node: at most MAX_ASKS, and MAX_NODE_ASK_BYTES of JSON together. Raises BadMessage."""
    listed = read_items(raw, field, MAX_ASKS)
    size = len(dumps(listed))
    if size > MAX_NODE_ASK_BYTES:
        raise BadMessage(f"{field}: {size} bytes together, at most {MAX_NODE_ASK_BYTES} are allowed for one node")
    return tuple(read_ask(ask, f"{field}[{i}]") for i, ask in enumerate(listed))


@dataclass(frozen=True, slots=True)
class Hello:
    """A node's first frame: the signed answer to the challenge, its standing asks and its capacity."""

    connect: Signed[Connect]
    asks: tuple[Signed[Ask], ...]
    capacity: Capacity
    software: str

    def to_json(self) -> dict[str, Any]:
        """The wire form."""
        return {
            "connect": self.connect.to_json(),
            "asks": [ask.to_json() for ask in self.asks],
            "capacity": self.capacity.to_json(),
            "software": self.software,
        }

    @classmethod
    def from_json(cls, raw: object) -> Hello:
        """Reads the wire form. Raises BadMessage."""
        connect, asks, capacity, software = read_members(raw, "hello", "connect", "asks", "capacity", "software")
        return cls(
            read_signed(Connect, connect, "hello.connect"),
            read_asks(asks, "hello.asks"),
            Capacity.from_json(capacity),
            read_text(software, "hello.software"),
        )


@dataclass(frozen=True, slots=True)
class LateReceipt:
    """A receipt with the order behind it and that order's terms: all that a side which lost the job needs to check it."""

    receipt: Signed[Receipt]
    order: Signed[Order]
    terms: Terms

    def to_json(self) -> dict[str, Any]:
        """The wire form."""
        return {"receipt": self.receipt.to_json(), "order": self.order.to_json(), "terms": self.terms.to_json()}

    @classmethod
    def from_json(cls, raw: object) -> LateReceipt:
        """Reads the wire form and checks that the order commits to the terms. Raises BadMessage."""
        receipt, order, terms = read_members(raw, "late receipt", "receipt", "order", "terms")
        made = cls(read_signed(Receipt, receipt), read_signed(Order, order), Terms.from_json(terms))
        if made.order.message.terms_hash != made.terms.struct_hash():
            raise BadMessage("late receipt.order.termsHash: not the hash of the terms beside it")
        return made


@dataclass(frozen=True, slots=True)
class ClaimRequest:
    """A claim, and the signed order behind each of its rows, in the same order."""

    claim: Signed[Claim]
    orders: tuple[Signed[Order], ...]

    def to_json(self) -> dict[str, Any]:
        """The wire form."""
        return {"claim": self.claim.to_json(), "orders": [order.to_json() for order in self.orders]}

    @classmethod
    def from_json(cls, raw: object) -> ClaimRequest:
        """Reads the wire form. Raises BadMessage."""
        claim, orders = read_members(raw, "claim request", "claim", "orders")
        made = cls(
            read_signed(Claim, claim, "claim"),
            tuple(read_signed(Order, o, f"orders[{i}]") for i, o in enumerate(read_items(orders, "orders", 1_024))),
        )
        if len(made.orders) != len(made.claim.message.rows):
            raise BadMessage("claim request: one order a row is needed")
        return made
