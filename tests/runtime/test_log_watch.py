"""Watching a match log in the background: what is checked, kept over a restart, and written as evidence."""

from __future__ import annotations

from pathlib import Path

from tallystick.protocol.errors import Code, Unavailable
from tallystick.protocol.log_evidence import Fraud, LogEvidence
from tallystick.protocol.log_monitor import SETTLE_SECONDS, LogQuestion
from tallystick.protocol.match_log import MERGE_SECONDS, pack_head
from tallystick.protocol.wire import loads
from tallystick.runtime.log_watch import MAX_EVIDENCE, MAX_PASSED_ON, SAVE_SECONDS, LogWatch
from tests.protocol.test_log_monitor import COORDINATOR, DOMAIN, NOW, Coordinator, matched


class World:
    """A watch, its clock, and the coordinator that it asks. `down`: the coordinator does not answer."""

    def __init__(self, folder: Path | None) -> None:
        self.coordinator, self.down, self.now, self.folder = Coordinator(), False, NOW, folder
        self.chance = 0.5
        self.watch = self.make()

    def make(self) -> LogWatch:
        """A watch as another process makes it."""
        return LogWatch(DOMAIN, COORDINATOR.address, self.folder, self.ask, now=lambda: self.now, chance=lambda: self.chance)

    async def ask(self, question: LogQuestion) -> object:
        """Answers a question."""
        if self.down:
            raise Unavailable(Code.COORDINATOR_UNAVAILABLE, "away")
        return self.coordinator.answer(question)

    def add(self, index: int, *, logged: bool = True) -> None:
        """A match of the coordinator."""
        match, order = matched(index)
        self.watch.add_match(match, order)
        self.coordinator.leaves.append(match.leaf if logged else matched(90 + index)[0].leaf)

    def files(self) -> int:
        """The number of files of evidence."""
        assert self.folder is not None
        return len(list(self.folder.glob("evidence-*.json")))

    def evidence(self) -> list[LogEvidence]:
        """The files of evidence."""
        assert self.folder is not None
        return [LogEvidence.loads(path.read_bytes()) for path in self.folder.glob("evidence-*.json")]


async def test_honest_matches_leave_no_evidence(tmp_path: Path) -> None:
    """A match is checked, the newest head is kept, and is what is passed on."""
    world = World(tmp_path / "log")
    assert world.watch.packed_head == b""
    world.add(1)
    await world.watch.check()
    assert len(world.watch.monitor.pending) == 1
    world.now += SETTLE_SECONDS
    await world.watch.check()
    assert (world.watch.monitor.checked, world.watch.packed_head) == (1, pack_head(world.coordinator.head()))
    await world.watch.close()
    assert world.evidence() == []
    assert (next((tmp_path / "log").iterdir()).stat().st_mode & 0o077) == 0


async def test_a_missing_match_is_written_as_evidence(tmp_path: Path) -> None:
    """A match that is not in the log when it is due becomes a file, once."""
    world = World(tmp_path)
    world.add(1, logged=False)
    world.now += MERGE_SECONDS
    world.coordinator.signed_at = world.now
    await world.watch.check()
    await world.watch.check()
    await world.watch.close()
    (evidence,) = world.evidence()
    assert evidence.fraud is Fraud.MISSING


async def test_what_waits_is_checked_by_the_next_process(tmp_path: Path) -> None:
    """A process that ends early leaves its matches and its head to the next one, which finds what changed meanwhile."""
    world = World(tmp_path)
    world.add(1)
    world.now += SETTLE_SECONDS
    await world.watch.check()
    world.add(2, logged=False)
    await world.watch.close()
    world.watch = world.make()
    await world.watch._load()
    assert world.watch.packed_head
    assert [pending.match.index for pending in world.watch.monitor.pending] == [2]
    world.now += MERGE_SECONDS
    world.coordinator.signed_at = world.now
    await world.watch.check()
    assert [evidence.fraud for evidence in world.evidence()] == [Fraud.MISSING]
    await world.watch.close()


async def test_another_process_with_another_view_is_noticed(tmp_path: Path) -> None:
    """Two processes that share a folder compare their heads, so they cannot be shown two logs."""
    world, other = World(tmp_path), World(tmp_path)
    for shown, number in ((world, 1), (other, 2)):
        match, order = matched(number)
        shown.watch.add_match(match, order)
        shown.coordinator.leaves = [shown.coordinator.leaves[0], match.leaf if number == 1 else matched(1)[0].leaf]
        shown.coordinator.leaves += [] if number == 1 else [match.leaf]
        shown.now += SETTLE_SECONDS
    other.coordinator.leaves[1] = matched(7)[0].leaf
    other.coordinator.leaves.pop()
    await world.watch.check()
    await other.watch.check()
    await world.watch.close()
    await other.watch.close()
    assert {evidence.fraud for evidence in world.evidence()} == {Fraud.SPLIT}


async def test_a_foreign_head_of_another_log_is_evidence(tmp_path: Path) -> None:
    """A head that came with a response is compared; what is no head is ignored."""
    world, other = World(tmp_path), Coordinator()
    world.add(1)
    world.now += SETTLE_SECONDS
    await world.watch.check()
    other.leaves.append(matched(5)[0].leaf)
    for head in (b"", b"nonsense", bytes(113), pack_head(world.coordinator.head())):
        world.watch.add_head(head)
    await world.watch.check()
    assert world.evidence() == []
    world.watch.add_head(pack_head(other.head()))
    assert world.evidence() == []  # a job's path checks no signature
    await world.watch.check()
    assert [evidence.fraud for evidence in world.evidence()] == [Fraud.SPLIT]
    await world.watch.close()


async def test_what_others_pass_on_is_bounded(tmp_path: Path) -> None:
    """Between two checks so many heads are kept, each once, and none of them is checked in a job's path."""
    world = World(tmp_path)
    for number in range(3):
        for _ in range(2):
            world.watch.add_head(bytes((number,)) * 113)
    assert len(world.watch._passed_on) == 3
    for number in range(200):
        world.watch.add_head(bytes((number,)) * 113)
    assert len(world.watch._passed_on) == MAX_PASSED_ON
    await world.watch.check()
    assert (world.watch._passed_on, world.evidence()) == ([], [])
    await world.watch.close()


async def test_a_flood_does_not_keep_other_heads_out(tmp_path: Path) -> None:
    """Once it is full, each further head replaces one at random; so the one that matters is read with some chance."""
    world, other = World(tmp_path), Coordinator()
    world.add(1)
    world.now += SETTLE_SECONDS
    await world.watch.check()
    other.leaves.append(matched(5)[0].leaf)
    for number in range(MAX_PASSED_ON):
        world.watch.add_head(bytes((number,)) * 113)
    world.chance = 0.0
    world.watch.add_head(pack_head(other.head()))
    world.chance = 0.99
    world.watch.add_head(b"z" * 113)
    await world.watch.check()
    assert [evidence.fraud for evidence in world.evidence()] == [Fraud.SPLIT]
    await world.watch.close()


async def test_a_coordinator_that_is_away_is_asked_again(tmp_path: Path) -> None:
    """No answer proves nothing: the match waits."""
    world = World(tmp_path)
    world.add(1)
    world.now += MERGE_SECONDS
    world.down = True
    await world.watch.check()
    assert len(world.watch.monitor.pending) == 1
    world.down = False
    await world.watch.check()
    assert world.watch.monitor.checked == 1
    await world.watch.close()
    assert world.evidence() == []


async def test_damaged_state_is_no_reason_to_stop(tmp_path: Path) -> None:
    """State that cannot be read is replaced."""
    world = World(tmp_path)
    (tmp_path / f"{COORDINATOR.address}-{DOMAIN.chain_id}.json").write_bytes(b"{")
    await world.watch._load()
    world.add(1)
    world.now += SETTLE_SECONDS
    await world.watch.check()
    await world.watch.close()
    again = world.make()
    await again._load()
    assert again.packed_head == world.watch.packed_head


async def test_evidence_is_bounded(tmp_path: Path) -> None:
    """A coordinator that lies without end does not fill the disk."""
    world = World(tmp_path)
    for number in range(MAX_EVIDENCE):
        (tmp_path / f"evidence-{number}.json").write_bytes(b"{}")
    world.add(1, logged=False)
    world.now += MERGE_SECONDS
    world.coordinator.signed_at = world.now
    await world.watch.check()
    await world.watch.close()
    assert world.files() == MAX_EVIDENCE


async def test_a_newer_head_is_written_now_and_then(tmp_path: Path) -> None:
    """Not with each head: a process with many jobs would write all that waits every two seconds."""
    world = World(tmp_path)
    sizes = []
    for index in range(1, 5):
        world.add(index)
        world.now += SETTLE_SECONDS if index < 4 else int(SAVE_SECONDS)
        await world.watch.check()
        file = tmp_path / f"{COORDINATOR.address}-{DOMAIN.chain_id}.json"
        sizes.append(int(loads(file.read_bytes(), "file")["head"]["message"]["size"]))
    assert sizes == [2, 2, 2, 5]
    world.add(5)
    world.now += SETTLE_SECONDS
    await world.watch.check()
    world.watch.start()
    await world.watch.close()
    assert int(loads(file.read_bytes(), "file")["head"]["message"]["size"]) == 6
