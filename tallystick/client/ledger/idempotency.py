"""Idempotency keys in the ledger: requests with the same key are one job, however often they are sent.

The stored row lets a process resume the job after a crash. It holds the content key (only the owner can read the ledger's file)
and the submission's header with the signed orders. The sealed body follows from the request and the content key. Functions of one
connection.
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
"""Characters of a key."""
MAX_KEYS = 10_000
"""Keys of one payer that are stored; beyond it the oldest are deleted."""
BATCH_KEY_SECONDS = 8 * 86_400
"""How long a batch's key is stored at most: longer than a batch may take."""
_SCOPE_END = "\N{SYMBOL FOR UNIT SEPARATOR}"
"""Ends the label of a gateway's caller in its keys."""

_BATCH = f"{_SCOPE_END}batch{_SCOPE_END}"
"""Begins the keys of batches, which their batch forgets. Other keys do not crowd them out: a line could then be paid twice."""


@dataclass(frozen=True, slots=True)
class IdempotencyKey:
    """A key and its job. `header`: the job's submission without the sealed body. `made_at`: Unix seconds."""

    key: str
    fingerprint: str
    job: JobId
    content_key: bytes = field(repr=False)
    header: bytes = field(repr=False)
    made_at: int


def batch_key(batch: str, line: int, attempt: int) -> str:
    """Returns the key of a job of a batch's line. No caller's key is like it: headers cannot have the separator."""
    return f"{_BATCH}{batch}:{line}:{attempt}"


def scope_key(label: str, key: str) -> str:
    """Returns a key within the namespace of one of a gateway's callers: the same key of another caller means another job."""
    return f"{label}{_SCOPE_END}{key}"


def _caller_key(key: str) -> str:
    """Returns the key as its caller sent it, without the namespace."""
    return key.partition(_SCOPE_END)[2] or key


def check_key(key: str) -> str:
    """Returns the key. Raises BadMessage if it is empty, too long or not printable."""
    if not 0 < len(key) <= MAX_KEY or not key.isprintable():
        sent = _caller_key(key)
        most = MAX_KEY - (len(key) - len(sent))
        raise BadMessage(f"idempotency key: expected 1 to {most} printable characters, got {len(sent)}: {sent[:50]!r}")
    return key


def fingerprint(plain: bytes) -> str:
    """Identifies a request: the SHA-256 of all that is sealed, head and body, because a content key seals only one plaintext."""
    return hashlib.sha256(plain).hexdigest()


def check_same(known: IdempotencyKey, request: str) -> None:
    """Compares a request's fingerprint with the key's. Raises Refusal (order_replayed) if the key belongs to another request."""
    if known.fingerprint != request:
        text = (
            f"idempotency key: {_caller_key(known.key)!r} was already used for another request (job {known.job.hex()}); "
            "send each request body with a key of its own"
        )
        raise Refusal(Code.ORDER_REPLAYED, text)


def find_key(c: Connection, payer: Address, key: str) -> IdempotencyKey | None:
    """Returns the stored key with its job, or None."""
    row = c.execute(sa.select(keys).where(keys.c.payer == payer, keys.c.key == key)).one_or_none()
    if row is None:
        return None
    return IdempotencyKey(row.key, row.fingerprint, JobId(bytes.fromhex(row.job)), row.content_key, row.header, row.made_at)


def batch_keys(c: Connection, payer: Address, batch: str) -> set[str]:
    """Returns the stored keys of a batch's lines."""
    own = (keys.c.payer == payer) & keys.c.key.startswith(f"{_BATCH}{batch}:", autoescape=True)
    return set(c.execute(sa.select(keys.c.key).where(own)).scalars())


def store_key(c: Connection, payer: Address, new: IdempotencyKey, oldest: int) -> IdempotencyKey:
    """Stores a key unless it already has a job, and returns the stored key.

    Deletes keys made before `oldest` (Unix seconds) and those beyond MAX_KEYS; those of batches after BATCH_KEY_SECONDS.
    """
    own_keys, of_batch = keys.c.payer == payer, keys.c.key.startswith(_BATCH, autoescape=True)
    newest = sa.select(keys.c.key).where(own_keys, ~of_batch).order_by(keys.c.made_at.desc()).limit(MAX_KEYS - 1)
    old = ~of_batch & ((keys.c.made_at < oldest) | keys.c.key.not_in(newest))
    c.execute(sa.delete(keys).where(own_keys, old | (keys.c.made_at < new.made_at - BATCH_KEY_SECONDS)))
    row = {
        "payer": payer,
        "key": new.key,
        "fingerprint": new.fingerprint,
        "job": new.job.hex(),
        "content_key": new.content_key,
        "header": new.header,
        "made_at": new.made_at,
    }
    c.execute(insert(keys).on_conflict_do_nothing(), row)
    return find_key(c, payer, new.key) or new


def forget_key(c: Connection, payer: Address, key: str) -> None:
    """Deletes a key whose job was never admitted; the key may be used again."""
    c.execute(sa.delete(keys).where(keys.c.payer == payer, keys.c.key == key))


def forget_key_of(c: Connection, payer: Address, job: JobId) -> None:
    """Deletes the key, if any, of a job that costs nothing; the key may be used again. That of another job stays."""
    c.execute(sa.delete(keys).where(keys.c.payer == payer, keys.c.job == job.hex()))
