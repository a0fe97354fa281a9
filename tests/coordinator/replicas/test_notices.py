"""Notices between replicas on the wire."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.bus.nats_bus import MAX_MESSAGE
from coordinator.jobs.market_load import MAX_NAME, Load
from coordinator.replicas.notices import (
    MAX_JOBS,
    MAX_TOTAL,
    TOPICS,
    VERSION,
    CancelNotice,
    MembersNotice,
    Notice,
    TabNotice,
    pack_notice,
    read_notice,
)
from tallystick.protocol.errors import BadMessage
from tallystick.protocol.replicas import MAX_REPLICA_ID
from tallystick.protocol.types import Address, Amount, JobId
from tallystick.protocol.wire import dumps, loads
from tests.coordinator.harness import PAYER, person

ANN = person("ann").address
JOB = JobId(b"\x07" * 16)
NOTICES: tuple[Notice, ...] = (
    CancelNotice(JOB, PAYER.address),
    TabNotice(PAYER.address, ANN, Amount(0)),
    TabNotice(PAYER.address, ANN, Amount(MAX_TOTAL)),
    MembersNotice(),
    Load("", MAX_JOBS, 0),
    Load("m" * MAX_NAME, 0, 7),
    Load('"' * MAX_NAME, 0, 7),
)


@pytest.mark.parametrize("notice", NOTICES, ids=str)
def test_a_notice_arrives_as_it_was_sent(notice: Notice) -> None:
    """Every notice survives its packing, names its sender, and fits a message of the bus."""
    sender = "x" * MAX_REPLICA_ID
    topic, payload = pack_notice(notice, sender)
    assert topic == TOPICS[type(notice)]
    assert len(payload) <= MAX_MESSAGE
    assert read_notice(topic, payload) == (sender, notice)


def test_members_of_a_later_release_are_ignored() -> None:
    """Replicas may be one release apart, so a member that is not known changes nothing."""
    topic, payload = pack_notice(NOTICES[0], "a")
    assert read_notice(topic, dumps(loads(payload, "notice") | {"why": "lunch"})) == ("a", NOTICES[0])


def _tab(**changes: Any) -> dict[str, Any]:
    topic, payload = pack_notice(TabNotice(PAYER.address, ANN, Amount(5)), "a")
    assert topic == "tab"
    return dict(loads(payload, "notice")) | changes


@pytest.mark.parametrize(
    ("topic", "payload"),
    [
        ("tab", b""),
        ("tab", b"\xff\xfe"),
        ("tab", b"[]"),
        ("tab", b"null"),
        ("tab", dumps({"v": VERSION})),
        ("tab", dumps(_tab(v=VERSION + 1))),
        ("tab", dumps(_tab(v=True))),
        ("tab", dumps(_tab(v="1"))),
        ("tab", dumps(_tab(total=-1))),
        ("tab", dumps(_tab(total=5))),
        ("tab", dumps(_tab(total="-5"))),
        ("tab", dumps(_tab(total="5.0"))),
        ("tab", dumps(_tab(total=""))),
        ("tab", dumps(_tab(total="\u0665"))),
        ("tab", dumps(_tab(total=str(MAX_TOTAL + 1)))),
        ("tab", dumps(_tab(total="9" * 5_000))),
        ("tab", dumps(_tab(payer="0x12"))),
        ("tab", dumps(_tab(provider=None))),
        ("tab", dumps({name: value for name, value in _tab().items() if name != "provider"})),
        ("tab", dumps(_tab(**{"from": "x" * (MAX_REPLICA_ID + 1)}))),
        ("tab", dumps(_tab(**{"from": 7}))),
        ("cancel", dumps(_tab())),
        ("cancel", dumps(_tab(job="zz" * 16))),
        ("cancel", dumps(_tab(job=5))),
        ("waiting", dumps(_tab())),
        ("", dumps(_tab())),
    ],
)
def test_anything_else_is_a_bad_message(topic: str, payload: bytes) -> None:
    """What is malformed, or of another version or topic, raises BadMessage and nothing else."""
    with pytest.raises(BadMessage, match="notice"):
        read_notice(topic, payload)


@given(st.sampled_from([*TOPICS.values(), "other"]), st.binary(max_size=200))
def test_random_bytes(topic: str, payload: bytes) -> None:
    """Whatever a server delivers, reading it ends in a notice or in BadMessage."""
    with contextlib.suppress(BadMessage):
        read_notice(topic, payload)


def test_addresses_are_canonical() -> None:
    """An address in capitals is the same account."""
    upper = Address("0x" + ANN[2:].upper())
    assert read_notice("tab", dumps(_tab(provider=upper))) == ("a", TabNotice(PAYER.address, ANN, Amount(5)))
