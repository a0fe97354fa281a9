"""Events of the escrow as typed objects, decoded from the logs of a chain."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any, get_type_hints

from tallystick.chain.codec import load_abi, snake_case
from tallystick.chain.endpoint import MAX_NUMBER, is_hash
from tallystick.protocol.errors import Code, Unavailable
from tallystick.protocol.types import Address, Amount, Hash, Seconds


class SkipReason(IntEnum):
    """The reason for which a row of a settlement was not paid; IEscrow.sol documents each."""

    NONE = 0
    BAD_CLAIM = 1
    SELF_DEALING = 2
    EXPIRED = 3
    BAD_SIGNATURE = 4
    UNKNOWN_PURSE = 5
    NOTHING_OWED = 6
    UNFUNDED = 7


@dataclass(frozen=True, slots=True, order=True)
class LogPosition:
    """The position of an event. (block, log, row) orders and identifies the events of one chain; the hashes distinguish forks.

    The rows of a claim share one log.
    """

    block: int
    log: int
    block_hash: str
    transaction: str
    row: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """An event of the contract. Class name and fields are those of the contract's event.

    Only Settled and RowSkipped are decoded from another event, RowsSettled, which packs the rows of one claim.
    """

    at: LogPosition


@dataclass(frozen=True, slots=True, kw_only=True)
class PurseOpened(Event):
    """A key was bound to its owner."""

    key: Address
    owner: Address


@dataclass(frozen=True, slots=True, kw_only=True)
class Deposited(Event):
    """A purse was filled."""

    key: Address
    amount: Amount


@dataclass(frozen=True, slots=True, kw_only=True)
class ThawStarted(Event):
    """The withdrawal of free money was announced; it is possible from `thaw_at` on."""

    key: Address
    amount: Amount
    thaw_at: Seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class ThawCancelled(Event):
    """The owner cancelled a thaw."""

    key: Address


@dataclass(frozen=True, slots=True, kw_only=True)
class Withdrawn(Event):
    """Thawed money was paid to the owner."""

    key: Address
    owner: Address
    amount: Amount


@dataclass(frozen=True, slots=True, kw_only=True)
class Reserved(Event):
    """More was reserved for a provider; `reserved` is the new total."""

    payer: Address
    provider: Address
    amount: Amount
    reserved: Amount


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleaseStarted(Event):
    """The end of a reservation was announced; it is possible from `release_at` on."""

    payer: Address
    provider: Address
    release_at: Seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Released(Event):
    """A reservation dropped by `amount` to `reserved`."""

    payer: Address
    provider: Address
    amount: Amount
    reserved: Amount


@dataclass(frozen=True, slots=True, kw_only=True)
class Settled(Event):
    """`paid` includes `fee`; `settled` is the tab's new total."""

    payer: Address
    provider: Address
    paid: Amount
    fee: Amount
    settled: Amount


@dataclass(frozen=True, slots=True, kw_only=True)
class RowSkipped(Event):
    """A row was not paid, for `reason`."""

    payer: Address
    provider: Address
    reason: SkipReason


@dataclass(frozen=True, slots=True, kw_only=True)
class FeeEarned(Event):
    """A coordinator was credited with the fees of consecutive rows."""

    coordinator: Address
    amount: Amount


@dataclass(frozen=True, slots=True, kw_only=True)
class FeeSet(Event):
    """A coordinator changed its rate."""

    coordinator: Address
    bps: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PayoutSet(Event):
    """An account changed its payout address."""

    account: Address
    payout: Address


@dataclass(frozen=True, slots=True, kw_only=True)
class CashedOut(Event):
    """An account's credit was paid out."""

    account: Address
    payout: Address
    amount: Amount


@dataclass(frozen=True, slots=True, kw_only=True)
class Staked(Event):
    """A provider added to its stake."""

    provider: Address
    amount: Amount


@dataclass(frozen=True, slots=True, kw_only=True)
class UnstakeStarted(Event):
    """The withdrawal of `amount` of a stake, in all, was announced; it is possible from `unstake_at` on."""

    provider: Address
    amount: Amount
    unstake_at: Seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Unstaked(Event):
    """The announced part of a stake was paid to its provider."""

    provider: Address
    amount: Amount


@dataclass(frozen=True, slots=True, kw_only=True)
class Slashed(Event):
    """A provider lost `amount`, of which `reward` went to the reporter."""

    provider: Address
    reporter: Address
    amount: Amount
    reward: Amount
    evidence: Hash


_CLASSES = {cls.__name__: cls for cls in Event.__subclasses__()}
_MAKERS: dict[Any, Any] = {Amount: Amount, SkipReason: SkipReason}
_HINTS = {name: get_type_hints(cls) for name, cls in _CLASSES.items()}
_U96 = 1 << 96


def read_log(log: Mapping[str, Any]) -> list[Event]:
    """Reads the events in a JSON-RPC log of the escrow; an empty list for a log of another contract."""
    topics = [bytes.fromhex(topic[2:]) for topic in log["topics"]]
    decoded = load_abi("Escrow").log(topics, bytes.fromhex(log["data"][2:]))
    if decoded is None:
        return []
    name, values = decoded
    at = _position(log)
    if name == "RowsSettled":
        return _read_rows(at, values["provider"], values["results"])
    if name not in _CLASSES:
        return []
    hints = _HINTS[name]
    fields = {snake_case(field): value for field, value in values.items()}
    return [_CLASSES[name](at=at, **{field: _MAKERS.get(hints[field], lambda v: v)(value) for field, value in fields.items()})]


def _position(log: Mapping[str, Any]) -> LogPosition:
    """The position of a log. Raises ValueError for an impossible one, because positions are stored in databases."""
    block, number, hashes = int(log["blockNumber"], 16), int(log["logIndex"], 16), (log["blockHash"], log["transactionHash"])
    if not (0 <= block <= MAX_NUMBER and 0 <= number <= MAX_NUMBER and all(map(is_hash, hashes))):
        raise ValueError(f"a log of block {block}, number {number}, at {str(hashes)[:200]}")
    return LogPosition(block, number, *hashes)


def _read_rows(at: LogPosition, provider: Address, results: Sequence[int]) -> list[Event]:
    """Reads the rows of a claim, two words each: payer 160 | settled 96, reason 64 | fee 96 | paid 96 (bits)."""
    events: list[Event] = []
    for row, (first, second) in enumerate(zip(results[::2], results[1::2], strict=True)):
        position, payer, reason = replace(at, row=row), Address(f"0x{first >> 96:040x}"), SkipReason(second >> 192)
        if reason is SkipReason.NONE:
            paid, fee, settled = Amount(second % _U96), Amount((second >> 96) % _U96), Amount(first % _U96)
            events.append(Settled(at=position, payer=payer, provider=provider, paid=paid, fee=fee, settled=settled))
        else:
            events.append(RowSkipped(at=position, payer=payer, provider=provider, reason=reason))
    return events


def read_logs(logs: Iterable[Mapping[str, Any]], escrow: Address) -> tuple[Event, ...]:
    """Reads the escrow's events in logs of any contracts. Raises Unavailable for malformed logs."""
    try:
        by_log = [read_log(log) for log in logs if log["address"].lower() == escrow and not log.get("removed")]
    except (TypeError, AttributeError, LookupError, ValueError, StopIteration) as error:
        raise Unavailable(Code.CHAIN_UNAVAILABLE, f"the chain returned malformed logs: {error!r}") from None
    return tuple(event for events in by_log for event in events)


def settlement_topics(provider: Address) -> list[str]:
    """The topics of the events in which a provider's rows were settled or skipped."""
    (event,) = (key for key, entry in load_abi("Escrow").events.items() if entry.name == "RowsSettled")
    return ["0x" + event.hex(), "0x" + provider[2:].rjust(64, "0")]
