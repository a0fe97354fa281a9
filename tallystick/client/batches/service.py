"""Keeps files and runs batches of one wallet. One process at a time runs them; others that share the folder only serve them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

import structlog

from tallystick.client.batches.batch_run import BatchRun, RunEnd, RunLimits
from tallystick.client.batches.file_folder import FileFolder, Upload, UploadRoom
from tallystick.client.batches.finalising import finalise
from tallystick.client.batches.late_answers import LateAnswers
from tallystick.client.batches.ports import LineAnswerer
from tallystick.client.batches.records import Batch, BatchStatus
from tallystick.client.batches.store import BatchStore
from tallystick.client.batches.validation import validate
from tallystick.client.config import BATCH, MIB, ClientConfig
from tallystick.client.ledger.idempotency import batch_key
from tallystick.client.ledger.spending import DAY_SECONDS
from tallystick.protocol.eip712 import Signer
from tallystick.protocol.errors import Code, Fault, TallyError, Unavailable
from tallystick.runtime.database_url import sqlite_url
from tallystick.runtime.single_instance import instance_lock

log = structlog.get_logger()
DATABASE = "batches.db"
LOOK_SECONDS = 2.0
"""How often the service looks for batches that another process created or cancelled, or that failed to go on."""
PRUNE_SECONDS = 600.0
GRACE_SECONDS = 60.0
"""Seconds that running lines may take once their batch was cancelled or its window is over; then they are cancelled."""
STRAY_SECONDS = 3_600.0
"""Seconds after which content that no file has is deleted: its upload was cut off, or its file has expired."""
MAX_UPLOADS = 8
"""Files that are uploaded at the same time."""
MIN_WAIT_SECONDS, MAX_WAIT_SECONDS = 30, 600
"""The shortest and the longest wait for a free slot that a line asks the coordinator for."""


class BatchService:
    """An async context manager. Entering opens the folder and begins to run batches; leaving stops them, resumably.

    Entering raises Unavailable for an unusable folder. `now`: Unix time in seconds; `tick`: a clock that never goes back.
    """

    def __init__(
        self,
        config: ClientConfig,
        wallet: Signer,
        answerer: LineAnswerer,
        *,
        now: Callable[[], float] = time.time,
        tick: Callable[[], float] = time.monotonic,
        grace: float = GRACE_SECONDS,
    ) -> None:
        self._config, self._answerer, self.now, self._tick, self._grace = config, answerer, now, tick, grace
        self._path: Path = config.batches_path(wallet.address)
        self.folder = FileFolder(self._path, wallet.secret)
        self.store: BatchStore
        self._runs: dict[str, BatchRun] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._woken, self._stopping = asyncio.Event(), False
        self._validating = asyncio.Semaphore(1)
        self._uploads, self._room = set[str](), UploadRoom(config.batches_mib * MIB)

    async def __aenter__(self) -> Self:
        self.store = await BatchStore.open(self._path / DATABASE, self._config.batches_mib * MIB)
        self._lock = instance_lock(sqlite_url(self._path / DATABASE), "gateway", "batches_folder")
        self._main = asyncio.create_task(self._serve(), name="batches")
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.stop(0)
        await self._lock.release()
        await self.store.close()

    async def stop(self, seconds: float) -> None:
        """Begins no more lines, waits up to `seconds` for the running ones, and leaves the rest for the next process."""
        self._stopping = True
        for run in self._runs.values():
            run.stop(RunEnd.STOPPED)
        if self._tasks:
            await asyncio.wait(list(self._tasks.values()), timeout=seconds)
        self._answerer.leave()
        self._main.cancel()
        tasks = [self._main, *self._tasks.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # What the routes use

    @property
    def open_batches(self) -> int:
        """Batches that run here."""
        return len(self._tasks)

    @property
    def running_lines(self) -> int:
        """Lines that run here now."""
        return sum(run.running for run in self._runs.values())

    async def begin_upload(self) -> Upload:
        """A new file. Give it to `end_upload`. Raises Unavailable if too many are uploaded."""
        if len(self._uploads) >= MAX_UPLOADS:
            text = f"{MAX_UPLOADS} files are being uploaded already; try again later"
            raise Unavailable(Code.CLIENT_BUSY, text, fault=Fault.CLIENT)
        upload = Upload(self.folder, self._config.batch_file_mib * MIB, self._room)
        self._uploads.add(upload.id)  # before the await: others may come meanwhile
        try:
            self._room.used = await self.store.used_bytes()
        except BaseException:
            self._uploads.discard(upload.id)
            raise
        return upload

    async def end_upload(self, upload: Upload) -> None:
        """Ends an upload, finished or not."""
        self._uploads.discard(upload.id)
        await upload.discard()

    def created(self) -> None:
        """Says that there is a new batch."""
        self._woken.set()

    def cancelled(self, batch_id: str) -> None:
        """Says that a batch was cancelled."""
        if batch_id in self._runs:
            self._runs[batch_id].stop(RunEnd.CANCELLED)

    def waiting(self, batch_id: str) -> str:
        """Why lines of a batch wait, for a person; empty if they do not."""
        run = self._runs.get(batch_id)
        return "" if run is None else run.waiting

    # Running

    async def _serve(self) -> None:
        """Takes the lock, and runs batches until cancelled."""
        while True:
            try:
                await self._lock.acquire()
                break
            except Unavailable:  # another gateway of this wallet runs them
                await asyncio.sleep(LOOK_SECONDS)
        next_prune = self._tick()
        while True:
            try:
                if self._tick() >= next_prune:
                    next_prune = self._tick() + PRUNE_SECONDS
                    await self._prune()
                await self._begin_batches()
            except TallyError as error:
                log.warning("batches wait", reason=str(error))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_SECONDS):
                    await self._woken.wait()
            self._woken.clear()

    async def _prune(self) -> None:
        now = int(self.now())
        await self.store.prune(now, now - self._config.batches_days * DAY_SECONDS)
        await self.folder.sweep(await self.store.file_ids(), self.now() - STRAY_SECONDS)

    async def _begin_batches(self) -> None:
        for batch in await self.store.open_batches():
            if batch.status is BatchStatus.CANCELLING:
                self.cancelled(batch.id)
            if batch.id not in self._tasks and not self._stopping:
                task = asyncio.create_task(self._run(batch), name=batch.id)
                self._tasks[batch.id] = task
                task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.pop(task.get_name(), None)
        self._runs.pop(task.get_name(), None)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a batch failed and begins again", batch=task.get_name(), exc_info=error)

    async def _run(self, batch: Batch) -> None:
        try:
            await self._advance(batch)
        except (TallyError, OSError) as error:
            log.warning("a batch waits", batch=batch.id, reason=str(error))

    async def _advance(self, batch: Batch) -> None:
        """Takes a batch from where it stands to its end."""
        if batch.status is BatchStatus.VALIDATING:
            async with self._validating:
                batch = await validate(batch, self.store, self.folder, self._config.max_body_bytes, int(self.now()))
            log.info("batch validated", batch=batch.id, status=batch.status.value, requests=batch.total)
        if batch.status is BatchStatus.IN_PROGRESS:
            run = self._runs[batch.id] = self._make_run(batch)
            if await run.run() is RunEnd.STOPPED:
                return
            batch = await self.store.advance(batch.id, BatchStatus.FINALIZING, int(self.now()))
        if batch.status in (BatchStatus.CANCELLING, BatchStatus.FINALIZING):
            cancelled, keep = batch.status is BatchStatus.CANCELLING, self._config.batches_days * DAY_SECONDS
            now = int(self.now())
            if batch.total:
                await self._late_answers(batch).collect()
                batch = await self.store.batch(batch.caller, batch.id)
            await finalise(batch, self.store, self.folder, cancelled=cancelled, now=now, keep_seconds=keep)
            log.info("batch ended", batch=batch.id, completed=batch.completed, failed=batch.failed, cost=int(batch.cost))

    def _make_run(self, batch: Batch) -> BatchRun:
        limits = RunLimits(self._share, self._grace)
        return BatchRun(
            batch,
            self.store,
            self.folder,
            self._answerer,
            limits,
            key=batch_key,
            options_at=line_options,
            now=self.now,
            tick=self._tick,
        )

    def _late_answers(self, batch: Batch) -> LateAnswers:
        return LateAnswers(
            batch,
            self.store,
            self.folder,
            self._answerer,
            key=batch_key,
            options=line_options(batch, self.now()),
            share=self._share(),
            grace=self._grace,
        )

    def _share(self) -> int:
        """The lines that each batch may run now."""
        return max(1, self._config.batch_concurrency // max(1, len(self._runs)))


def line_options(batch: Batch, now: float) -> str:
    """The options of a line that begins at `now`: those of its batch, in the class of batch work."""
    left = batch.expires_at - now
    wait = int(min(MAX_WAIT_SECONDS, max(MIN_WAIT_SECONDS, left / 50)))
    return json.dumps({"priority": BATCH, "wait": wait} | json.loads(batch.options))
