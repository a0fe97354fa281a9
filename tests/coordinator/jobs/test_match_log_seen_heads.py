"""Heads of the match log that nodes saw: its own pass, made-up ones are ignored, and those of a second log stop it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from coordinator.jobs.match_log import MAX_SEEN_HEADS, MatchLog
from coordinator.storage.memory import MemoryLogStore
from tallystick.protocol.eip712 import Signed, Signer, Verified
from tallystick.protocol.errors import Code, Unavailable
from tallystick.protocol.match_log import pack_head
from tallystick.protocol.messages import LogHead
from tallystick.protocol.types import Address, Hash
from tests.coordinator.harness import COORDINATOR, DOMAIN, World, person
from tests.coordinator.jobs.test_match_log import jobs

ANN = person("ann").address


async def signed_log(world: World, count: int = 5) -> tuple[MatchLog, Verified[LogHead]]:
    """A log with a head of `count` matches and one start."""
    await world.market.start()
    await jobs(world, count)
    log = world.market.match_log
    await log.sign_head()
    assert log.head is not None
    return log, log.head


def packed(head: LogHead, signer: Signer = COORDINATOR) -> bytes:
    """A head signed by somebody, as a beat has it."""
    return pack_head(signer.sign(head, DOMAIN))


async def test_heads_of_this_log_pass(world: World) -> None:
    """The newest head and all earlier ones are this log's; it goes on."""
    log, first = await signed_log(world)
    await jobs(world, 3)
    await log.sign_head()
    assert log.head is not None
    for number, head in enumerate((first, log.head)):
        log.add_seen_head(Address(f"0x{number:040x}"), pack_head(head))
    await log._check_seen()
    assert (log.conflict, log.blocked) == ("", False)


@pytest.mark.parametrize("size", [6, 4, 7, 1 << 62])
async def test_a_head_of_another_log_stops_this_one(world: World, size: int) -> None:
    """A second coordinator with this key, or an older copy of the database: no further job is taken, no further head signed."""
    log, head = await signed_log(world)
    log.add_seen_head(ANN, packed(replace(head.message, size=size, root=Hash(b"r" * 32))))
    await log._check_seen()
    assert log.blocked
    assert f"{size} leaves" in log.conflict
    with pytest.raises(Unavailable, match="this coordinator has a key that signed another match log") as refused:
        await jobs(world, 1)
    assert refused.value.code is Code.COORDINATOR_UNAVAILABLE
    await log.sign_head()
    assert log.head is head


async def test_a_lost_log_stops_nothing_if_the_operator_says_so(world: World) -> None:
    """`match_log_lost`: the database is gone, and the coordinator begins another log under its old key."""
    log, head = await signed_log(world)
    log.lost = True
    log.add_seen_head(ANN, packed(replace(head.message, size=9, root=Hash(b"r" * 32))))
    await log._check_seen()
    assert (log.conflict, log.blocked) == ("", False)
    await jobs(world, 1)


async def test_an_older_copy_of_the_database_is_noticed(world: World) -> None:
    """A node saw a head that the copy does not have. The coordinator learns it from the node's beat."""
    log, earlier = await signed_log(world, 2)
    copy = MemoryLogStore()
    assert isinstance(world.log_store, MemoryLogStore)
    copy.rows, copy.heads = list(world.log_store.rows), [Signed(earlier.message, earlier.signature)]
    await jobs(world, 4)
    await log.sign_head()
    assert log.head is not None
    restored = MatchLog(copy, COORDINATOR, DOMAIN, world.clock.now)
    await restored.start()
    assert not restored.blocked
    restored.add_seen_head(ANN, pack_head(log.head))
    await restored._check_seen()
    assert restored.blocked


async def test_made_up_heads_are_ignored(world: World) -> None:
    """Of another signer, another coordinator, another size in bytes, or changed after it was signed: they prove nothing."""
    log, head = await signed_log(world)
    other = replace(head.message, root=Hash(b"r" * 32))
    strangers = [
        b"x",
        bytes(113),
        packed(other)[:-1],
        packed(replace(other, coordinator=ANN), person("ann")),
        packed(other).replace(b"r" * 32, b"s" * 32),
    ]
    for number, made_up in enumerate(strangers):
        log.add_seen_head(Address(f"0x{number:040x}"), made_up)
    log.add_seen_head(ANN, b"")
    await log._check_seen()
    assert not log.blocked


async def test_what_nodes_pass_on_is_bounded(world: World) -> None:
    """One head a node waits, of so many nodes; a node replaces its own alone."""
    log, head = await signed_log(world)
    for number in range(2 * MAX_SEEN_HEADS):
        for made_up in (b"x", pack_head(head)):
            log.add_seen_head(Address(f"0x{number:040x}"), made_up)
    assert list(log._seen.values()) == [pack_head(head)] * MAX_SEEN_HEADS
    await log._check_seen()
    assert (log._seen, log.blocked) == ({}, False)
