"""Notices between the replicas of one coordinator: what is momentary, so that a lost notice costs little. Pure.

A notice is a JSON object with its version, the id of its sender and the members of its topic:

- `cancel`: {"job", "payer"}: the payer cancelled a job that the sender does not run.
- `tab`: {"payer", "provider", "total"}: a receipt raised the total of a tab, in base units.
- `load`: {"model", "jobs", "waiting"}: how many jobs the sender has, and how many of them wait; of one model, or of all ("").
- `members`: {}: a replica joined or left, so the list in the database is to be read now.

A reader ignores members that it does not know, and a notice of another version or topic: replicas may be one release apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from coordinator.jobs.market_load import MAX_NAME, Load
from tallystick.protocol.errors import BadMessage
from tallystick.protocol.json_members import read_count, read_members, read_text
from tallystick.protocol.replicas import MAX_REPLICA_ID
from tallystick.protocol.types import Address, Amount, JobId, parse_address, parse_job_id
from tallystick.protocol.wire import dumps, loads

VERSION = 1
MAX_JOBS = 1_000_000
MAX_TOTAL = (1 << 96) - 1
"""The highest total of a tab, which the contract stores in 96 bits."""


@dataclass(frozen=True, slots=True)
class CancelNotice:
    """The payer of a job cancelled it."""

    job: JobId
    payer: Address


@dataclass(frozen=True, slots=True)
class TabNotice:
    """The total of a tab, in base units, after a receipt."""

    payer: Address
    provider: Address
    total: Amount


@dataclass(frozen=True, slots=True)
class MembersNotice:
    """The list of replicas changed."""


Notice = CancelNotice | TabNotice | MembersNotice | Load
TOPICS: dict[type[Notice], str] = {CancelNotice: "cancel", TabNotice: "tab", MembersNotice: "members", Load: "load"}


def pack_notice(notice: Notice, sender: str) -> tuple[str, bytes]:
    """Returns the topic and the bytes of a notice. `sender`: the id of this replica."""
    members: dict[str, Any] = {"v": VERSION, "from": sender}
    if isinstance(notice, CancelNotice):
        members |= {"job": notice.job.hex(), "payer": notice.payer}
    elif isinstance(notice, TabNotice):
        members |= {"payer": notice.payer, "provider": notice.provider, "total": str(notice.total)}
    elif isinstance(notice, Load):
        members |= notice._asdict()
    return TOPICS[type(notice)], dumps(members)


def read_notice(topic: str, payload: bytes) -> tuple[str, Notice]:
    """Returns the sender and the notice. Raises BadMessage for anything else, an unknown version or topic too."""
    raw = loads(payload, "notice")
    version, sender = read_members(raw, "notice", "v", "from")
    if type(version) is not int or version != VERSION:
        raise BadMessage(f"notice.v: expected {VERSION}, got {str(version)[:20]!r}")
    return read_text(sender, "notice.from", MAX_REPLICA_ID), _read(topic, raw)


def _read(topic: str, raw: Any) -> Notice:
    if topic == "cancel":
        job, payer = read_members(raw, "notice", "job", "payer")
        return CancelNotice(parse_job_id(read_text(job, "notice.job"), "notice.job"), _address(payer, "notice.payer"))
    if topic == "tab":
        payer, provider, total = read_members(raw, "notice", "payer", "provider", "total")
        return TabNotice(_address(payer, "notice.payer"), _address(provider, "notice.provider"), _total(total))
    if topic == "members":
        return MembersNotice()
    if topic == "load":
        model, jobs, waiting = read_members(raw, "notice", "model", "jobs", "waiting")
        counts = (read_count(count, f"notice.{name}", high=MAX_JOBS) for name, count in (("jobs", jobs), ("waiting", waiting)))
        return Load(read_text(model, "notice.model", MAX_NAME), *counts)
    raise BadMessage(f"notice: unknown topic {topic[:40]!r}")


def _address(raw: Any, member: str) -> Address:
    return parse_address(read_text(raw, member), member)


def _total(raw: Any) -> Amount:
    text = read_text(raw, "notice.total", 32)
    if not (text.isascii() and text.isdecimal()):
        raise BadMessage("notice.total: expected decimal digits")
    return Amount(read_count(int(text), "notice.total", high=MAX_TOTAL))
