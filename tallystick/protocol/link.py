"""Messages on the link between node and coordinator other than jobs: handshake, asks, capacity, late receipts, claims."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from tallystick.protocol.eip712 import Signed, read_signed
from tallystick.protocol.errors import BadMessage
from tallystick.protocol.json_members import read_count, read_flag, read_items, read_members, read_text
from tallystick.protocol.messages import Ask, Claim, Connect, Order, Receipt, Terms
from tallystick.protocol.payer_rules import STRANGER, is_for
from tallystick.protocol.plaintext_heads import read_log_head
from tallystick.protocol.types import Address, Hash, parse_address
from tallystick.protocol.versions import PROTOCOL, check_protocol
from tallystick.protocol.wire import dumps

MAX_CHAIN_ID = (1 << 63) - 1
"""The largest chain id. Some chains have ids above 32 bits; EIP-2294 allows about 63."""
_PORTS = {"http": 80, "ws": 80, "https": 443, "wss": 443}


def endpoint_of(url: str) -> str:
    """The host and port of a URL, as `Connect.endpoint` has them: in lower case, with the scheme's default port if none is given.

    Raises BadMessage.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port or _PORTS.get(parts.scheme)
    except ValueError:
        host = port = None
    if not host or port is None:
        raise BadMessage(f"expected a URL such as https://coordinator.example, got {url[:200]!r}")
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


@dataclass(frozen=True, slots=True)
class Challenge:
    """The coordinator's first message: random bytes to sign, and its address, chain and contract.

    `payer_asks`: whether it offers asks for some payers (payer_rules.py) to these alone. Older coordinators do not, and do not
    say it: they get no such ask.
    """

    challenge: Hash
    coordinator: Address
    chain_id: int
    contract: Address
    payer_asks: bool = False

    def to_json(self) -> dict[str, Any]:
        """The wire form."""
        announced = {"payerAsks": True} if self.payer_asks else {}
        return {
            "challenge": self.challenge.hex(),
            "coordinator": self.coordinator,
            "chainId": self.chain_id,
            "contract": self.contract,
            "protocol": PROTOCOL,
        } | announced

    @classmethod
    def from_json(cls, raw: Any) -> Challenge:
        """Reads the wire form. Raises BadMessage, also for a coordinator of another protocol."""
        challenge, coordinator, chain, contract = read_members(
            raw, "challenge", "challenge", "coordinator", "chainId", "contract"
        )
        check_protocol(raw.get("protocol"), "challenge", "the coordinator")
        try:
            nonce = Hash(bytes.fromhex(read_text(challenge, "challenge.challenge")))
        except ValueError:
            raise BadMessage("challenge.challenge: expected hex") from None
        if len(nonce) != 32:
            raise BadMessage(f"challenge.challenge: expected 32 bytes, got {len(nonce)}")
        return cls(
            nonce,
            parse_address(coordinator, "challenge.coordinator"),
            read_count(chain, "challenge.chainId", high=MAX_CHAIN_ID),
            parse_address(contract, "challenge.contract"),
            read_flag(raw.get("payerAsks", False), "challenge.payerAsks"),
        )


@dataclass(frozen=True, slots=True)
class Capacity:
    """The capacity of one slot group now: the asks of a node that share the slots of an engine.

    `slots`: jobs that the engine runs at once. `queue`: further jobs that the node passes on, to wait in the engine's own queue.
    `free`: jobs that the node takes now, of `slots` and `queue` together. The speeds were measured last; 0 means unknown. On the
    wire, `group` is the number of the slot group.
    """

    free: int
    slots: int
    tokens_per_second: int = 0
    first_token_ms: int = 0
    queue: int = 0

    def to_json(self, group: int) -> dict[str, int]:
        """The wire form, with the number of the slot group."""
        return {
            "group": group,
            "free": self.free,
            "slots": self.slots,
            "queue": self.queue,
            "tokensPerSecond": self.tokens_per_second,
            "firstTokenMs": self.first_token_ms,
        }

    @classmethod
    def from_json(cls, raw: object, field: str = "capacity") -> tuple[int, Capacity]:
        """Reads the wire form: the number of the slot group and its capacity. Raises BadMessage."""
        names = ("group", "free", "slots", "queue", "tokensPerSecond", "firstTokenMs")
        values = read_members(raw, field, *names)
        group, free, slots, queue, speed, latency = (
            read_count(value, f"{field}.{name}") for name, value in zip(names, values, strict=True)
        )
        return group, cls(free, slots, speed, latency, queue)


Capacities = Mapping[int, Capacity]
"""Capacities by the number of the slot group."""


def write_capacities(capacities: Capacities) -> list[dict[str, int]]:
    """The wire form of the capacities of some slot groups."""
    return [capacity.to_json(group) for group, capacity in capacities.items()]


def read_capacities(raw: object, field: str = "capacity") -> dict[int, Capacity]:
    """Reads the capacities of at most MAX_ASKS slot groups, each group once. Raises BadMessage."""
    capacities: dict[int, Capacity] = {}
    for i, entry in enumerate(read_items(raw, field, MAX_ASKS)):
        group, capacity = Capacity.from_json(entry, f"{field}[{i}]")
        if group in capacities:
            raise BadMessage(f"{field}[{i}].group: expected each slot group once, got {group} again")
        capacities[group] = capacity
    return capacities


@dataclass(frozen=True, slots=True)
class Beat:
    """The payload of a node's BEAT: the capacities of the slot groups in which it changed.

    `log_head`: a head of the coordinator's match log that the node has not passed on yet (match_log.pack_head); empty if none. On
    the wire, `capacities` is `capacity`, a list of Capacity, and `logHead` is in hex, or absent.
    """

    capacities: Capacities
    log_head: bytes = b""

    def to_json(self) -> dict[str, Any]:
        """The wire form."""
        head = {"logHead": self.log_head.hex()} if self.log_head else {}
        return {"capacity": write_capacities(self.capacities)} | head

    @classmethod
    def from_json(cls, raw: Any) -> Beat:
        """Reads the wire form. Raises BadMessage."""
        (capacity,) = read_members(raw, "beat", "capacity")
        return cls(read_capacities(capacity, "beat.capacity"), read_log_head(raw, "beat.logHead"))


MAX_ASKS = 256
MAX_ASK_BYTES = 16 * 1024
MAX_NODE_ASK_BYTES = 64 * 1024
MAX_FEATURES, MAX_FEATURE_CHARACTERS = 64, 64


def read_ask(raw: object, field: str = "ask") -> Signed[Ask]:
    """Reads a signed ask of at most MAX_ASK_BYTES of JSON and MAX_FEATURES short features. Raises BadMessage."""
    size = len(dumps(raw))
    if size > MAX_ASK_BYTES:
        raise BadMessage(f"{field}: expected at most {MAX_ASK_BYTES} bytes, got {size}")
    ask = read_signed(Ask, raw, field)
    features = ask.message.spec.features
    if len(features) > MAX_FEATURES or any(len(feature) > MAX_FEATURE_CHARACTERS for feature in features):
        text = f"expected at most {MAX_FEATURES} features of at most {MAX_FEATURE_CHARACTERS} characters"
        raise BadMessage(f"{field}.spec.features: {text}")
    return ask


def read_asks(raw: object, field: str = "asks") -> tuple[Signed[Ask], ...]:
    """Reads all asks of a node: at most MAX_ASKS, of at most MAX_NODE_ASK_BYTES of JSON in all. Raises BadMessage."""
    listed = read_items(raw, field, MAX_ASKS)
    size = len(dumps(listed))
    if size > MAX_NODE_ASK_BYTES:
        raise BadMessage(f"{field}: expected at most {MAX_NODE_ASK_BYTES} bytes for all asks of a node, got {size}")
    return tuple(read_ask(ask, f"{field}[{i}]") for i, ask in enumerate(listed))


@dataclass(frozen=True, slots=True)
class Listing:
    """All that a node offers: its asks, the number of each ask's slot group, and the capacity of each group.

    Asks of one group share its slots. A node keeps the number of a group while it keeps the engine. On the wire, `capacities` is
    `capacity`, a list with one Capacity for each group that the asks name.
    """

    asks: tuple[Signed[Ask], ...]
    groups: tuple[int, ...]
    capacities: Capacities

    @classmethod
    def of_one_group(cls, asks: tuple[Signed[Ask], ...], capacity: Capacity) -> Listing:
        """The listing of a node whose asks all share the same slots."""
        return cls(asks, (0,) * len(asks), {0: capacity} if asks else {})

    def for_everybody(self) -> Listing:
        """The listing without the asks that are for some payers alone."""
        kept = [(ask, group) for ask, group in zip(self.asks, self.groups, strict=True) if is_for(ask.message, STRANGER)]
        groups = tuple(group for _, group in kept)
        return Listing(tuple(ask for ask, _ in kept), groups, {group: self.capacities[group] for group in groups})

    def to_json(self) -> dict[str, Any]:
        """The wire form."""
        return {
            "asks": [ask.to_json() for ask in self.asks],
            "groups": list(self.groups),
            "capacity": write_capacities(self.capacities),
        }

    @classmethod
    def from_json(cls, raw: object, field: str = "listing") -> Listing:
        """Reads the wire form, whose groups must be those that the asks name. Raises BadMessage."""
        asks, groups, capacity = read_members(raw, field, "asks", "groups", "capacity")
        numbers = read_items(groups, f"{field}.groups", MAX_ASKS)
        listing = cls(
            read_asks(asks, f"{field}.asks"),
            tuple(read_count(number, f"{field}.groups[{i}]") for i, number in enumerate(numbers)),
            read_capacities(capacity, f"{field}.capacity"),
        )
        if len(listing.groups) != len(listing.asks):
            expected, got = len(listing.asks), len(listing.groups)
            raise BadMessage(f"{field}.groups: expected one slot group per ask, {expected} in all, got {got}")
        difference = listing.capacities.keys() ^ set(listing.groups)
        if difference:
            text = "expected the capacities of the groups that the asks name, and no others"
            raise BadMessage(f"{field}.capacity: {text}; group {min(difference)} is in one of them alone")
        return listing


@dataclass(frozen=True, slots=True)
class Hello:
    """A node's first frame: the signed answer to the challenge, its asks with their capacity, and its software version.

    `replicas`, `trace` and `resume`: whether the node takes REPLICAS, TRACE and RESUME frames, which older nodes do not know. On
    the wire, the members of `listing` stand beside the others.
    """

    connect: Signed[Connect]
    listing: Listing
    software: str
    replicas: bool = False
    trace: bool = False
    resume: bool = False

    @property
    def asks(self) -> tuple[Signed[Ask], ...]:
        """The node's asks."""
        return self.listing.asks

    def to_json(self) -> dict[str, Any]:
        """The wire form."""
        own = {"connect": self.connect.to_json(), "software": self.software, "protocol": PROTOCOL}
        announced = {name: True for name in ("replicas", "trace", "resume") if getattr(self, name)}
        return own | announced | self.listing.to_json()

    @classmethod
    def from_json(cls, raw: Any) -> Hello:
        """Reads the wire form. Raises BadMessage, also for a node of another protocol."""
        connect, software = read_members(raw, "hello", "connect", "software")
        check_protocol(raw.get("protocol"), "hello", "the node")
        return cls(
            read_signed(Connect, connect, "hello.connect"),
            Listing.from_json(raw, "hello"),
            read_text(software, "hello.software"),
            read_flag(raw.get("replicas", False), "hello.replicas"),
            read_flag(raw.get("trace", False), "hello.trace"),
            read_flag(raw.get("resume", False), "hello.resume"),
        )


@dataclass(frozen=True, slots=True)
class LateReceipt:
    """A receipt with its order and the order's terms. A coordinator that no longer knows the job can check it."""

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
        late = cls(read_signed(Receipt, receipt), read_signed(Order, order), Terms.from_json(terms))
        if late.order.message.terms_hash != late.terms.struct_hash():
            raise BadMessage("late receipt.order.termsHash: expected the hash of the terms in this message")
        return late


@dataclass(frozen=True, slots=True)
class ClaimRequest:
    """A claim and the signed order of each of its rows, in the same sequence."""

    claim: Signed[Claim]
    orders: tuple[Signed[Order], ...]

    def to_json(self) -> dict[str, Any]:
        """The wire form."""
        return {"claim": self.claim.to_json(), "orders": [order.to_json() for order in self.orders]}

    @classmethod
    def from_json(cls, raw: object) -> ClaimRequest:
        """Reads the wire form. Raises BadMessage."""
        claim, orders = read_members(raw, "claim request", "claim", "orders")
        request = cls(
            read_signed(Claim, claim, "claim"),
            tuple(read_signed(Order, order, f"orders[{i}]") for i, order in enumerate(read_items(orders, "orders", 1_024))),
        )
        if len(request.orders) != len(request.claim.message.rows):
            raise BadMessage(
                f"claim request.orders: expected one per row, {len(request.claim.message.rows)}, got {len(request.orders)}"
            )
        return request
