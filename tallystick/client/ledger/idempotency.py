"""Idempotency keys, as the ledger keeps them: a request with a key is one job, however often it is asked for.

What is kept takes the job up again after a crash: the content key (the ledger's file is its owner's alone) and the submission's
header with the signed orders, whose sealed body follows from the request and the content key. Functions of one connection.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import sqlalchemy as sa
from sqlalchemy import Connection
from sqlalchemy.dialects.sqlite import insert

from tallystick.client.ledger.schema import keys
from tallystick.protocol.errors import BadMessage, Code, Refusal
from tallystick.protocol.types import Address, JobId

MAX_KEY = 255
MAX_KEYS = 10_000
"""Keys of one payer that are remembered; the oldest go first."""


@dataclass(frozen=True, slots=True)
class IdempotencyKey:
    """The job that a key stands for. `header` is that submission without its sealed body; `made_at` Unix seconds."""

    key: str
    fingerprint: str
    job: JobId
    content_key: bytes = field(repr=False)
    header: bytes = field(repr=False)
    made_at: int


def check_key(key: str) -> str:
    """Raises BadMessage for what is no key."""
    if not 0 < len(key) <= MAX_KEY or not key.isprintable():
        raise BadMessage(f"idempotency key: expected 1 to {MAX_KEY} printable characters")
    return key


def fingerprint(plain: bytes) -> str:
    """What tells one request from another: all that is sealed, head and body, since a content key seals one plaintext only."""
    return hashlib.sha256(plain).hexdigest()


def check_same(known: IdempotencyKey, request: str) -> None:
    """Raises Refusal if the key stands for another request."""
    if known.fingerprint != request:
        text = f"idempotency key: {known.key!r} was used for another request (job {known.job.hex()}); a key belongs to one body"
        raise Refusal(Code.ORDER_REPLAYED, text)


def find_key(c: Connection, payer: Address, key: str) -> IdempotencyKey | None:
    """The job of a key."""
    row = c.execute(sa.select(keys).where(keys.c.payer == payer, keys.c.key == key)).one_or_none()
    if row is None:
        return None
    return IdempotencyKey(row.key, row.fingerprint, JobId(bytes.fromhex(row.job)), row.content_key, row.header, row.made_at)


def store_key(c: Connection, payer: Address, keyed: IdempotencyKey, horizon: int) -> IdempotencyKey:
    """Remembers a key unless it stands for a job already, and returns what it stands for.

    Forgets keys made before `horizon` and those beyond MAX_KEYS.
    """
    mine = keys.c.payer == payer
    newest = sa.select(keys.c.key).where(mine).order_by(keys.c.made_at.desc()).limit(MAX_KEYS - 1)
    c.execute(sa.delete(keys).where(mine, (keys.c.made_at < horizon) | keys.c.key.not_in(newest)))
    row = {
        "payer": payer,
        "key": keyed.key,
        "fingerprint": keyed.fingerprint,
        "job": keyed.job.hex(),
        "content_key": keyed.content_key,
        "header": keyed.header,
        "made_at": keyed.made_at,
    }
    c.execute(insert(keys).on_conflict_do_nothing(), row)
    return find_key(c, payer, keyed.key) or keyed


def forget_key(c: Connection, payer: Address, key: str) -> None:
    """The key's job was never admitted: the key may stand for another."""
    c.execute(sa.delete(keys).where(keys.c.payer == payer, keys.c.key == key))


def forget_key_of(c: Connection, payer: Address, job: JobId) -> None:
    """A job was refused by its providers: its key, if it has one, may stand for another."""
    c.execute(sa.delete(keys).where(keys.c.payer == payer, keys.c.job == job.hex()))
