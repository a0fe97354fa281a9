"""Gets the answers of a batch's jobs that outlived its lines: a gateway was away, or stopped, when they came.

No line is begun: only jobs that were placed are asked for again. What was billed counts as the batch's cost in any case.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from http import HTTPStatus

import structlog

from tallystick.client.batches.batch_run import PAGE_LINES, line_result
from tallystick.client.batches.file_folder import FileFolder
from tallystick.client.batches.input_lines import LineRequest
from tallystick.client.batches.line_policy import may_retry, wait_seconds
from tallystick.client.batches.output_lines import unanswered_line
from tallystick.client.batches.ports import KeyState, LineAnswerer, LineJob
from tallystick.client.batches.records import Batch, InputLine, LineState, Usage
from tallystick.client.batches.sealed_stream import SealedReader
from tallystick.client.batches.store import BatchStore, LineResult
from tallystick.client.batches.window import PRICE_STEPS

log = structlog.get_logger()
_PLACED = (KeyState.OPEN, KeyState.BILLED)


class LateAnswers:
    """See the module. `share`: jobs that are asked for at the same time; `grace`: seconds that all of them may take."""

    def __init__(
        self,
        batch: Batch,
        store: BatchStore,
        folder: FileFolder,
        answerer: LineAnswerer,
        *,
        key: Callable[[str, int, int], str],
        options: str,
        share: int,
        grace: float,
    ) -> None:
        self._batch, self._store, self._folder, self._answerer = batch, store, folder, answerer
        self._key, self._options, self._slots, self._grace = key, options, asyncio.Semaphore(share), grace

    async def collect(self) -> None:
        """Ends the lines that have a job. Raises TallyError if files or the store cannot be used; what has ended is kept."""
        placed = await self._placed()
        if not placed:
            return
        reader = await asyncio.to_thread(self._folder.read, self._batch.input_file)
        with reader:
            asked = [asyncio.create_task(self._ask(reader, line)) for line in placed]
            try:
                await asyncio.wait(asked, timeout=self._grace)
            finally:
                for asking in asked:
                    asking.cancel()
                ends = await asyncio.gather(*asked, return_exceptions=True)
            for line, end in zip(placed, ends, strict=True):
                if isinstance(end, Exception):
                    log.warning("a late answer failed", batch=self._batch.id, line=line.number, exc_info=end)
                if end is not True:
                    await self._give_up(reader, line)

    def _key_of(self, line: InputLine) -> str:
        return self._key(self._batch.id, line.number, line.attempt)

    async def _placed(self) -> list[InputLine]:
        placed, after = list[InputLine](), 0
        keys = await self._answerer.keys(self._batch.id)  # all at once: a large batch has few
        while page := await self._store.pending(self._batch.id, after, PAGE_LINES):
            keyed = [line for line in page if self._key_of(line) in keys]
            placed += [line for line in keyed if await self._answerer.key_state(self._key_of(line)) in _PLACED]
            after = page[-1].number
        return placed

    async def _request(self, reader: SealedReader, line: InputLine) -> LineRequest:
        return LineRequest.of(await asyncio.to_thread(reader.read, line.offset, line.length), self._batch.endpoint)

    async def _ask(self, reader: SealedReader, line: InputLine) -> bool:
        """Asks for a line's job until it is answered. Returns whether the line has ended."""
        batch, key, tries = self._batch, self._key_of(line), 0
        async with self._slots:
            request = await self._request(reader, line)
            job = LineJob(batch.caller, batch.endpoint, key, self._options, request.model, PRICE_STEPS, request.body)
            while await self._answerer.key_state(key) in _PLACED:  # else it cost nothing, and no other job is placed
                answer = await self._answerer.answer(job)
                if answer.status < HTTPStatus.BAD_REQUEST:
                    await self._store.end_line(batch.id, line_result(self._folder, batch, line, request, answer))
                    await self._answerer.forget(key)
                    return True
                if not may_retry(answer) or await self._answerer.key_state(key) is KeyState.BILLED:
                    return False
                await asyncio.sleep(wait_seconds(tries))
                tries += 1
        return False

    async def _give_up(self, reader: SealedReader, line: InputLine) -> None:
        """Ends a line whose job was billed, or may still be; leaves one whose job cost nothing."""
        key = self._key_of(line)
        state = await self._answerer.key_state(key)
        if state not in _PLACED:
            return
        request, cost = await self._request(reader, line), await self._answerer.key_cost(key)
        code = "answer_lost" if state is KeyState.BILLED else "answer_unresolved"
        written = unanswered_line(self._batch.id, line.number, request.custom_id, code)
        sealed = self._folder.seal_result(self._batch.id, line.number, written)
        await self._store.end_line(self._batch.id, LineResult(line.number, LineState.FAILED, sealed, Usage(), cost))
