"""The lines of one batch, with an answerer of the test's own."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tallystick.client.batches.batch_run import BatchRun, RunEnd, RunLimits
from tallystick.client.batches.file_folder import FileFolder
from tallystick.client.batches.line_policy import MAX_UNKNOWN
from tallystick.client.batches.ports import KeyState, LineAnswer, LineJob
from tallystick.client.batches.records import Batch, BatchStatus, StoredFile
from tallystick.client.batches.sealed_stream import SealedReader
from tallystick.client.batches.store import BatchStore
from tallystick.client.batches.validation import validate
from tallystick.protocol.types import Amount

ROUTE = "/v1/chat/completions"


class Refuses:
    """Refuses every request for want of money; the run ends after `most`. Its clock is 100 times faster than the true one."""

    def __init__(self, most: int) -> None:
        self.asked, self.most = 0, most
        self.run: BatchRun

    def tick(self) -> float:
        """The test's clock."""
        return time.monotonic() * 100

    async def answer(self, job: LineJob) -> LineAnswer:
        """Refuses."""
        assert job.model == "m"
        self.asked += 1
        if self.asked >= self.most:
            self.run.stop(RunEnd.STOPPED)
        return LineAnswer(402, "", b"{}", code="over_budget", message="no money")

    async def keys(self, batch: str) -> set[str]:
        """No job was placed."""
        assert batch
        return set()

    async def key_state(self, key: str) -> KeyState:
        """No job was placed."""
        assert key
        return KeyState.UNUSED

    async def key_cost(self, key: str) -> Amount:
        """Nothing."""
        assert key
        return Amount(0)

    async def forget(self, key: str) -> None:
        """Does nothing."""

    def leave(self) -> None:
        """Does nothing."""


async def batch_of(store: BatchStore, folder: FileFolder, count: int) -> Batch:
    """A validated batch with this many lines."""
    with folder.write("file-1") as writer:
        for number in range(count):
            body = {"model": "m", "messages": []}
            line = {"custom_id": str(number), "method": "POST", "url": ROUTE, "body": body}
            writer.write(json.dumps(line).encode() + b"\n")
        writer.commit()
    await store.add_file(StoredFile("file-1", "", "f", "batch", writer.size, 0, 1 << 40))
    new = Batch(
        id="batch_1",
        caller="",
        endpoint=ROUTE,
        input_file="file-1",
        window="7d",
        status=BatchStatus.VALIDATING,
        created_at=0,
        expires_at=1 << 40,
    )
    await store.create(new, None)
    return await validate(new, store, folder, 1 << 20, 0)


def run_of(batch: Batch, store: BatchStore, folder: FileFolder, answerer: Answers, *, now: Callable[[], float]) -> BatchRun:
    """A run of four lines at a time, whose keys are the lines' numbers."""
    return BatchRun(
        batch,
        store,
        folder,
        answerer,
        RunLimits(lambda: 4, 1),
        key=lambda _batch, line, _attempt: str(line),
        options_at=lambda _batch, _now: "{}",
        now=now,
        tick=answerer.tick,
    )


async def test_waiting_lines_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While requests for a model are refused, each try reads a few lines, and not all that wait."""
    reads = 0
    read = SealedReader.read

    def count(self: SealedReader, offset: int, length: int) -> bytes:
        nonlocal reads
        reads += 1
        return read(self, offset, length)

    monkeypatch.setattr(SealedReader, "read", count)
    store, folder = await BatchStore.open(tmp_path / "b.db", 1 << 30), FileFolder(tmp_path, b"k" * 32)
    try:
        batch = await batch_of(store, folder, 2_000)
        assert batch.total == 2_000
        answerer = Refuses(20)
        run = answerer.run = BatchRun(
            batch,
            store,
            folder,
            answerer,
            RunLimits(lambda: 4, 1),
            key=lambda batch_id, line, attempt: f"{batch_id}:{line}:{attempt}",
            options_at=lambda _batch, _now: "{}",
            now=lambda: 1.0,
            tick=answerer.tick,
        )
        assert await run.run() is RunEnd.STOPPED
        assert answerer.asked >= 20
        assert reads <= 2 * answerer.asked + 4
        assert len(await store.pending(batch.id, 0, 3_000)) == 2_000
    finally:
        await store.close()


class Answers(Refuses):
    """Gives each line the answer that a test chooses for its number."""

    def __init__(self, choose: Callable[[int], LineAnswer]) -> None:
        super().__init__(1 << 30)
        self._choose = choose
        self.answered: set[int] = set()

    async def answer(self, job: LineJob) -> LineAnswer:
        """The chosen answer."""
        number = int(job.key)
        self.asked += 1
        answer = self._choose(number)
        if answer.status == 200:
            self.answered.add(number)
        return answer


async def test_lines_that_cannot_be_placed_hold_up_no_others(tmp_path: Path) -> None:
    """More of them than may run at a time come first; still all others are answered."""
    store, folder = await BatchStore.open(tmp_path / "b.db", 1 << 30), FileFolder(tmp_path, b"k" * 32)
    try:
        batch = await batch_of(store, folder, 40)
        refusal = LineAnswer(402, "", b"{}", code="over_budget", message="no money for so long an answer")
        answerer = Answers(lambda number: refusal if number <= 10 else LineAnswer(200, "", b"{}"))
        run = run_of(batch, store, folder, answerer, now=lambda: float(batch.expires_at if len(answerer.answered) == 30 else 1))
        async with asyncio.timeout(60):
            assert await run.run() is RunEnd.EXPIRED
        assert answerer.answered == set(range(11, 41))
        assert [line.number for line in await store.pending(batch.id, 0, 100)] == list(range(1, 11))
    finally:
        await store.close()


async def test_an_unknown_model_fails_all_its_lines(tmp_path: Path) -> None:
    """It is asked for again a few times, and not a few times for each line."""
    store, folder = await BatchStore.open(tmp_path / "b.db", 1 << 30), FileFolder(tmp_path, b"k" * 32)
    try:
        batch = await batch_of(store, folder, 200)
        answerer = Answers(lambda _number: LineAnswer(404, "", b"{}", code="unknown_model", message="nobody sells it"))
        run = run_of(batch, store, folder, answerer, now=lambda: 1.0)
        async with asyncio.timeout(60):
            assert await run.run() is RunEnd.DONE
        assert answerer.asked <= 200 + 4 * MAX_UNKNOWN
        assert (await store.batch("", batch.id)).failed == 200
    finally:
        await store.close()


async def test_no_line_begins_without_room(tmp_path: Path) -> None:
    """Once the bytes of all files are used, lines wait, and the batch says why."""
    store, folder = await BatchStore.open(tmp_path / "b.db", 1 << 20), FileFolder(tmp_path, b"k" * 32)
    try:
        batch = await batch_of(store, folder, 3)
        await store.add_file(StoredFile("file-2", "", "f", "batch", (1 << 20) - await store.used_bytes(), 0, 1 << 40))
        answerer, looks = Refuses(1), 0

        def now() -> float:
            nonlocal looks
            looks += 1
            return 1.0 if looks < 3 else batch.expires_at

        run = BatchRun(
            batch,
            store,
            folder,
            answerer,
            RunLimits(lambda: 4, 1),
            key=lambda batch_id, line, attempt: f"{batch_id}:{line}:{attempt}",
            options_at=lambda _batch, _now: "{}",
            now=now,
            tick=lambda: 0.0,
        )
        assert await run.run() is RunEnd.EXPIRED
        assert answerer.asked == 0
        assert "batches_mib" in run.waiting
    finally:
        await store.close()
