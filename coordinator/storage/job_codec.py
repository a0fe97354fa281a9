"""Jobs as bytes for the database: state, attempts with their orders, and receipts in one compact document. Pure.

A message is stored as the lengths of the words that EIP-712 hashes, without their leading zeros, then these words, then what a
word only hashes. That is a third of the words' size, and reading it back checks the encoding of each word.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from coordinator.ports import AttemptRecord, JobRecord
from tallystick.protocol.codecs import WORD
from tallystick.protocol.eip712 import Message, Signed
from tallystick.protocol.jobs import State
from tallystick.protocol.messages import Order, Receipt, Terms
from tallystick.protocol.signatures import SIGNATURE
from tallystick.protocol.types import Address, Amount, JobId

M = TypeVar("M", bound=Message)
_VERSION = 1
_WORDS = struct.Struct(f"{WORD}s")
_STATES = (
    *(State.QUEUED, State.MATCHED, State.RUNNING, State.STREAMING),
    *(State.COMPLETED, State.CANCELLED, State.FAILED, State.EXPIRED),
)
"""A state is stored as its place in this list: append only."""
_STATE_NUMBERS = {state: number for number, state in enumerate(_STATES)}
_FLAGS = ("delivered", "cancelled", "unseen", "hedged", "outrun")
"""A flag is stored as the bit with its place in this list: append only."""
Packed = dict[Address, bytes]
"""The order and the terms of a job's attempts by provider, as they are stored: they never change."""
Receipts = Mapping[Address, tuple[Signed[Receipt], Amount]]
"""Receipts by provider, each with the total of its tab."""


@dataclass(frozen=True, slots=True)
class JobDoc:
    """A job and its receipts, as they are stored together."""

    record: JobRecord
    receipts: Receipts


def dump_job(record: JobRecord, receipts: Receipts, packed: Packed | None = None) -> bytes:
    """Returns the document of a job. `packed`: what earlier documents of the same job packed; it is added to."""
    packed = {} if packed is None else packed
    parts = [bytes((_VERSION, _STATE_NUMBERS[record.state])), record.job, _number(record.created_at)]
    parts += (_number(-1 if record.finished_at is None else record.finished_at), bytes((len(record.attempts),)))
    for attempt in record.attempts:
        reason, provider = attempt.reason.encode(), attempt.provider
        if provider not in packed:
            packed[provider] = _pack(attempt.order.message) + attempt.order.signature + _pack(attempt.terms)
        parts += (bytes((_STATE_NUMBERS[attempt.state], _flags(attempt))), _length(reason), reason, packed[provider])
    parts.append(bytes((len(receipts),)))
    for receipt, total in receipts.values():
        parts += (_pack(receipt.message), receipt.signature, total.to_bytes(12, "big"))
    return b"".join(parts)


def load_job(data: bytes) -> JobDoc:
    """Reads what `dump_job` wrote. Raises BadMessage or ValueError for other bytes."""
    reader = _Reader(data)
    version, state = reader.take(2)
    if version != _VERSION:
        raise ValueError(f"stored job: expected version {_VERSION}, got {version}; was it written by a newer release?")
    job, created_at, finished_at = JobId(reader.take(16)), reader.number(), reader.number()
    attempts = tuple(_load_attempt(reader) for _ in range(reader.take(1)[0]))
    receipts = {}
    for _ in range(reader.take(1)[0]):
        receipt = Signed(reader.message(Receipt), reader.take(SIGNATURE))
        receipts[receipt.message.provider] = receipt, Amount(int.from_bytes(reader.take(12), "big"))
    payer = attempts[0].order.message.payer
    record = JobRecord(job, payer, _STATES[state], created_at, None if finished_at < 0 else finished_at, attempts)
    return JobDoc(record, receipts)


def _load_attempt(reader: _Reader) -> AttemptRecord:
    state, flags = reader.take(2)
    reason = reader.take(int.from_bytes(reader.take(4), "big")).decode()
    order = Signed(reader.message(Order), reader.take(SIGNATURE))
    terms = reader.message(Terms)
    values = {name: bool(flags >> place & 1) for place, name in enumerate(_FLAGS)}
    return AttemptRecord(order, terms, _STATES[state], reason, **values)


def _flags(attempt: AttemptRecord) -> int:
    first = attempt.delivered | attempt.cancelled << 1 | attempt.unseen << 2
    return first | attempt.hedged << 3 | attempt.outrun << 4


def _number(value: int) -> bytes:
    return value.to_bytes(8, "big", signed=True)


def _length(data: bytes) -> bytes:
    return len(data).to_bytes(4, "big")


def _pack(message: Message) -> bytes:
    schema = message.SCHEMA
    words = [word.lstrip(b"\x00") for (word,) in _WORDS.iter_unpack(message.words())]
    packed = bytes(map(len, words)) + b"".join(words)
    if not schema.tails:
        return packed
    tail = message.to_bytes()[schema.size :]
    return packed + _length(tail) + tail


class _Reader:
    """Reads a document from its begin to its end."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def take(self, count: int) -> bytes:
        taken = self._data[self._at : self._at + count]
        if len(taken) < count:
            raise ValueError(f"stored job: expected {count} bytes at {self._at}, got {len(taken)}")
        self._at += count
        return taken

    def number(self) -> int:
        return int.from_bytes(self.take(8), "big", signed=True)

    def message(self, cls: type[M]) -> M:
        words = [self.take(length).rjust(WORD, b"\x00") for length in self.take(len(cls.SCHEMA.fields))]
        tail = self.take(int.from_bytes(self.take(4), "big")) if cls.SCHEMA.tails else b""
        return cls.from_bytes(b"".join((*words, tail)))
