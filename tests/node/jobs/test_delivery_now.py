"""What a delivery may send at once, without a wait: only what a wait would let pass as well."""

from __future__ import annotations

from node.domain.usage_meter import UsageMeter
from node.jobs.delivery import CHUNK_BYTES, MAX_EVIDENCE_CHUNKS, RESERVED_CREDIT, Delivery
from node.ports import ResponseStart
from node.testing.memory import MemoryLink
from tallystick.protocol.sealing import Sealer
from tallystick.protocol.wire import INITIAL_CREDIT, Kind
from tests.node.harness import COORDINATOR, Client, make_asks


class Sending:
    """A delivery on a link in memory."""

    def __init__(self) -> None:
        self.placed = Client().order(make_asks().current[0])
        self.link = MemoryLink(COORDINATOR.address)
        digest = self.placed.order.digest
        self.meter = UsageMeter(self.placed.key, digest, self.placed.terms, len(self.placed.body))
        self.delivery = Delivery(self.link, self.placed.job, Sealer(self.placed.key, self.placed.job, digest), self.meter)
        self.delivery.set_head(ResponseStart(200, "text/event-stream"))

    @property
    def body(self) -> bytes:
        """What the client can read."""
        return self.placed.read(self.link.payloads(self.placed.job, Kind.CHUNK))[1]


async def test_nothing_is_sent_at_once_before_the_coordinator_confirmed() -> None:
    """The first output and all before the first credit must wait; then parts leave at once and count as usual."""
    at = Sending()
    assert not at.delivery.send_now(b"one.", 4)
    await at.delivery.send(b"one.", 4)
    assert not at.delivery.send_now(b"two.", 4)
    at.delivery.grant_credit(0)
    assert at.delivery.send_now(b"two.", 4)
    assert at.body == b"one.two."
    assert at.meter.usage().output == 2


async def test_the_last_credit_is_kept() -> None:
    """Parts leave at once while there is credit beyond the one for the last chunk."""
    at = Sending()
    await at.delivery.send(b"1")
    at.delivery.grant_credit(0)
    sent = 0
    while at.delivery.send_now(b"1"):
        sent += 1
    head_and_first = 2
    assert sent == INITIAL_CREDIT - head_and_first - RESERVED_CREDIT
    at.delivery.grant_credit(1)
    assert at.delivery.send_now(b"1")
    assert not at.delivery.send_now(b"1")


async def test_a_full_or_lost_link_takes_nothing_at_once() -> None:
    """A link without room makes the sender wait, and a lost one makes it fail; nothing is counted as delivered."""
    for spoil in (MemoryLink.fill, MemoryLink.disconnect):
        at = Sending()
        await at.delivery.send(b"one.", 4)
        at.delivery.grant_credit(5)
        spoil(at.link)
        assert not at.delivery.send_now(b"two.", 4)
        assert at.body == b"one."
        assert at.meter.usage().output == 1


async def test_only_one_whole_chunk_is_sent_at_once() -> None:
    """Nothing that is empty, larger than a chunk, or behind bytes that are held back."""
    at = Sending()
    await at.delivery.send(b"one.", 4)
    at.delivery.grant_credit(5)
    assert not at.delivery.send_now(b"")
    assert not at.delivery.send_now(bytes(CHUNK_BYTES + 1))
    assert at.delivery.send_now(bytes(CHUNK_BYTES))
    at.delivery.hold_back(b"held")
    assert not at.delivery.send_now(b"two.")


async def test_rows_of_evidence_never_wait() -> None:
    """They are sent with the end of a response only if credit and link have room for all of them."""
    at = Sending()
    assert at.delivery.has_room_for(b"x" * CHUNK_BYTES * MAX_EVIDENCE_CHUNKS)
    assert not at.delivery.has_room_for(b"x" * (CHUNK_BYTES * MAX_EVIDENCE_CHUNKS + 1))
    await at.delivery.send(b"1")
    at.delivery.grant_credit(0)
    while at.delivery.has_room_for(b"x" * CHUNK_BYTES * 2):
        assert at.delivery.send_now(b"1")
    assert at.delivery.has_room_for(b"x" * CHUNK_BYTES)
    await at.delivery.close(b"end")
    at.delivery.post(*at.delivery.seal_last(b"x" * CHUNK_BYTES))
    assert at.placed.evidence(at.link.payloads(at.placed.job, Kind.CHUNK)) == b"x" * CHUNK_BYTES
    assert at.body.endswith(b"end")
    assert len(at.link.payloads(at.placed.job, Kind.CHUNK)) <= INITIAL_CREDIT
    full = Sending()
    full.link.fill()
    assert not full.delivery.has_room_for(b"x")
