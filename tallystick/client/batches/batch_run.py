"""Runs the lines of one batch that is in progress: a bounded number at a time, each with its retries, until all have ended.

What a line needs to be run once and only once is in the store and in its idempotency key. So a run may end at any moment, with
the process too, and the next one goes on from there.
"""

from __future__ import annotations

import asyncio
import heapq
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from http import HTTPStatus

import structlog

from tallystick.client.batches.file_folder import FileFolder
from tallystick.client.batches.input_lines import LineRequest
from tallystick.client.batches.line_policy import Decision, decide, shows_sale, wait_seconds
from tallystick.client.batches.output_lines import answered_line, read_usage
from tallystick.client.batches.paused_models import PausedModels
from tallystick.client.batches.ports import KeyState, LineAnswer, LineAnswerer, LineJob
from tallystick.client.batches.records import Batch, InputLine, LineState, Usage
from tallystick.client.batches.sealed_stream import SealedReader
from tallystick.client.batches.store import BatchStore, LineResult
from tallystick.client.batches.window import elapsed_step
from tallystick.protocol.errors import Code

log = structlog.get_logger()
PAGE_LINES = 256
POLL_SECONDS = 1.0
"""How often a run looks at the clock."""
FULL_SECONDS = 5.0
"""How long no line begins once the disk's share is used up."""


class RunEnd(Enum):
    """Why a run ended: all lines did, the batch was cancelled, its window is over, or the gateway stops."""

    DONE = "done"
    CANCELLED = "cancelled"
    EXPIRED = "expired"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class RunLimits:
    """`share`: the lines of one batch that may run now. `grace`: seconds that lines which run may take once the batch was
    cancelled or its window is over.
    """

    share: Callable[[], int]
    grace: float


class BatchRun:
    """One run. `tick`: a clock in seconds that never goes back; `now`: Unix time. `options_at`: the options of a line that begins
    now.
    """

    def __init__(
        self,
        batch: Batch,
        store: BatchStore,
        folder: FileFolder,
        answerer: LineAnswerer,
        limits: RunLimits,
        *,
        key: Callable[[str, int, int], str],
        options_at: Callable[[Batch, float], str],
        now: Callable[[], float],
        tick: Callable[[], float],
    ) -> None:
        self._batch, self._store, self._folder, self._answerer, self._limits = batch, store, folder, answerer, limits
        self._key, self._options_at, self._now, self._tick = key, options_at, now, tick
        self._page, self._cursor, self._exhausted = deque[InputLine](), 0, False
        self._deferred: list[tuple[float, int, InputLine]] = []
        self._tries: dict[int, int] = {}
        self._paused, self._parked_next = PausedModels(), False
        self._unsold = Counter[str]()
        """Pauses of a model that began because nobody sold it."""
        self._sold = {batch.model} if batch.completed and batch.model is not None else set[str]()
        """Models that were sold since the batch began: if nobody sells one now, its providers are away."""
        self._running: set[asyncio.Task[None]] = set()
        self._woken = asyncio.Event()
        self._end: RunEnd | None = None
        self._full_until = 0.0
        self.waiting = ""
        """Why lines wait, for a person; empty if they do not."""

    @property
    def running(self) -> int:
        """Lines that run now."""
        return len(self._running)

    def stop(self, end: RunEnd) -> None:
        """Begins no more lines."""
        self._end = self._end or end
        self._woken.set()

    async def run(self) -> RunEnd:
        """Runs until the end. Raises TallyError if files or the store cannot be used; what has ended is kept."""
        reader = await asyncio.to_thread(self._folder.read, self._batch.input_file)
        with reader:
            try:
                while self._over() is None:
                    await self._begin_lines(reader)
                    if self._is_done:
                        return RunEnd.DONE
                    await self._wait()
                    self._collect()
                if self._end is not RunEnd.STOPPED and self._running:
                    await asyncio.wait(self._running, timeout=self._limits.grace)
                elif self._running:
                    await asyncio.wait(self._running)  # whoever stops the gateway cancels this wait
            finally:
                running = list(self._running)
                for task in running:
                    task.cancel()
                await asyncio.gather(*running, return_exceptions=True)
            self._collect()
        return self._end or RunEnd.DONE

    @property
    def _is_done(self) -> bool:
        return self._exhausted and not (self._page or self._deferred or self._paused or self._running)

    def _over(self) -> RunEnd | None:
        if self._end is None and self._now() >= self._batch.expires_at:
            self._end = RunEnd.EXPIRED
        return self._end

    def _collect(self) -> None:
        """Raises what ended a line's task, which is an error of the store or a bug."""
        for task in [task for task in self._running if task.done()]:
            self._running.discard(task)
            if not task.cancelled():
                task.result()

    async def _wait(self) -> None:
        """Waits for the end of a line, a wake-up, or the next moment at which a line may begin."""
        moments = [self._paused.due, *(until for until, _, _ in self._deferred[:1])]
        due = min(moments) - self._tick()
        woken = asyncio.ensure_future(self._woken.wait())
        try:
            timeout = min(POLL_SECONDS, max(due, 0.01))
            await asyncio.wait({woken, *self._running}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        finally:
            woken.cancel()
        self._woken.clear()

    async def _begin_lines(self, reader: SealedReader) -> None:
        share = self._limits.share()
        while len(self._running) < share and self._end is None and not await self._is_full():
            line = await self._next_line()
            if line is None:
                return
            content = await asyncio.to_thread(reader.read, line.offset, line.length)
            request = LineRequest.of(content, self._batch.endpoint)
            if self._paused.until(request.model) > self._tick():
                self._paused.park(request.model, line)
                continue
            task = asyncio.create_task(self._run_line(line, request), name=f"{self._batch.id}:{line.number}")
            self._running.add(task)

    async def _is_full(self) -> bool:
        """Whether the results of running lines are the last for which there may be room."""
        if self._tick() < self._full_until:
            return True
        if await self._store.used_bytes() < self._store.max_bytes:
            return False
        self._full_until = self._tick() + FULL_SECONDS
        self.waiting = "the files of this gateway use all bytes that batches_mib allows; delete some, or raise it"
        return True

    async def _next_line(self) -> InputLine | None:
        if self._deferred and self._deferred[0][0] <= self._tick():
            return heapq.heappop(self._deferred)[2]
        self._parked_next = not self._parked_next  # in turn, so that lines which cannot be placed hold up no others
        if self._parked_next:
            return self._paused.next(self._tick()) or await self._unread_line()
        return await self._unread_line() or self._paused.next(self._tick())

    async def _unread_line(self) -> InputLine | None:
        model = self._batch.model  # if all lines name one model, a pause of it is one of all
        if model is not None and self._paused.until(model) > self._tick():
            return None
        if not self._page and not self._exhausted:
            self._page.extend(await self._store.pending(self._batch.id, self._cursor, PAGE_LINES))
            self._exhausted = not self._page
            self._cursor = self._page[-1].number if self._page else self._cursor
        return self._page.popleft() if self._page else None

    def _defer(self, line: InputLine, until: float) -> None:
        heapq.heappush(self._deferred, (until, line.number, line))

    async def _run_line(self, line: InputLine, request: LineRequest) -> None:
        batch, key = self._batch, self._key(self._batch.id, line.number, line.attempt)
        now = self._now()
        step, options = elapsed_step(now, batch.created_at, batch.expires_at), self._options_at(batch, now)
        job = LineJob(batch.caller, batch.endpoint, key, options, request.model, step, request.body)
        unsold = self._unsold[request.model]
        try:
            answer = await self._answerer.answer(job)
        except Exception:  # a bug must not stop the other lines
            log.exception("a line of a batch failed", batch=batch.id, line=line.number)
            answer = LineAnswer(500, "", b"", code="internal_error", message="the gateway failed; its log says why")
        state = KeyState.UNUSED if answer.status < 400 else await self._answerer.key_state(key)
        if shows_sale(answer):
            self._sold.add(request.model)
        decision = decide(answer, state, line.attempt, 0 if request.model in self._sold else unsold)
        if decision in (Decision.COMPLETE, Decision.FAIL):
            if state is KeyState.BILLED:
                answer = replace(answer, cost=max(answer.cost, await self._answerer.key_cost(key)))
            await self._end_line(line, request, answer, key, decision)
            return
        if decision is Decision.WAIT:
            if self._paused.pause(request.model, self._tick()) and answer.code == Code.UNKNOWN_MODEL.value:
                self._unsold[request.model] += 1
            self._paused.park(request.model, line)
            self.waiting = f"{request.model}: {answer.message}"[:500]
        elif decision is Decision.RESUME:
            tries = self._tries.get(line.number, 0)
            self._tries[line.number] = tries + 1
            self._defer(line, self._tick() + wait_seconds(tries))
        else:
            await self._store.next_attempt(batch.id, line.number, line.attempt + 1)
            again = InputLine(line.number, line.offset, line.length, line.attempt + 1)
            self._defer(again, self._tick() + wait_seconds(line.attempt))
        self._woken.set()

    async def _end_line(self, line: InputLine, request: LineRequest, answer: LineAnswer, key: str, decision: Decision) -> None:
        if decision is Decision.COMPLETE:
            self.waiting = ""
            self._paused.end(request.model)
        self._tries.pop(line.number, None)
        await self._store.end_line(self._batch.id, line_result(self._folder, self._batch, line, request, answer))
        await self._answerer.forget(key)


def line_result(folder: FileFolder, batch: Batch, line: InputLine, request: LineRequest, answer: LineAnswer) -> LineResult:
    """How a line ended by an answer, or by its last error."""
    completed = answer.status < HTTPStatus.BAD_REQUEST
    sealed = folder.seal_result(batch.id, line.number, answered_line(batch.id, line.number, request.custom_id, answer))
    state = LineState.COMPLETED if completed else LineState.FAILED
    return LineResult(line.number, state, sealed, read_usage(answer.body) if completed else Usage(), answer.cost)
