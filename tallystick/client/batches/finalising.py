"""Writes the output and error files of a batch whose lines have ended, and ends it."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack

from tallystick.client.batches.file_folder import FileFolder
from tallystick.client.batches.input_lines import LineRequest
from tallystick.client.batches.output_lines import unanswered_line
from tallystick.client.batches.records import BATCH_OUTPUT, Batch, BatchStatus, LineState, StoredFile
from tallystick.client.batches.sealed_stream import SealedReader, SealedWriter
from tallystick.client.batches.store import BatchStore, StoredLine, new_id

PAGE_LINES = 512
PAGE_BYTES = 4 << 20
"""Bytes of results that are read at a time, unless one line alone has more."""
_LEFT_OUT = {BatchStatus.EXPIRED: "batch_expired", BatchStatus.CANCELLED: "batch_cancelled"}


class _Outputs:
    """The two files, each of which is begun with its first line."""

    def __init__(self, batch: Batch, folder: FileFolder, reader: SealedReader, end: BatchStatus, opened: ExitStack) -> None:
        self._batch, self._folder, self._reader, self._end, self._opened = batch, folder, reader, end, opened
        self.writers: dict[LineState, tuple[str, SealedWriter]] = {}
        self.left_out = 0

    def add(self, page: list[StoredLine]) -> None:
        """Writes lines. Blocks."""
        for stored in page:
            state = LineState.COMPLETED if stored.state is LineState.COMPLETED else LineState.FAILED
            if state not in self.writers:
                file_id = new_id("file-")
                self.writers[state] = file_id, self._opened.enter_context(self._folder.write(file_id))
            self.writers[state][1].write(self._content(stored))

    def _content(self, stored: StoredLine) -> bytes:
        line = stored.line
        if stored.sealed is not None:
            return self._folder.open_result(self._batch.id, line.number, stored.sealed)
        self.left_out += 1
        request = LineRequest.of(self._reader.read(line.offset, line.length), self._batch.endpoint)
        return unanswered_line(self._batch.id, line.number, request.custom_id, _LEFT_OUT[self._end])


async def finalise(batch: Batch, store: BatchStore, folder: FileFolder, *, cancelled: bool, now: int, keep_seconds: int) -> None:
    """Ends a batch: cancelled, else expired if lines wait, else completed. `keep_seconds`: for which its files are kept.

    Raises TallyError or OSError; the batch can then be finalised again.
    """
    if not batch.total:  # cancelled before it was validated
        await store.clear_lines(batch.id)
    waits = bool(await store.pending(batch.id, 0, 1))
    end = BatchStatus.CANCELLED if cancelled else BatchStatus.EXPIRED if waits else BatchStatus.COMPLETED
    reader = await asyncio.to_thread(folder.read, batch.input_file)
    with ExitStack() as opened, reader:
        outputs, after = _Outputs(batch, folder, reader, end, opened), 0
        while page := await store.lines(batch.id, after, PAGE_LINES, PAGE_BYTES):
            await asyncio.to_thread(outputs.add, page)
            after = page[-1].line.number
        names = {LineState.COMPLETED: "output", LineState.FAILED: "errors"}
        files: dict[LineState, StoredFile] = {}
        expires_at = now + (batch.output_seconds or keep_seconds)
        for state, (file_id, writer) in outputs.writers.items():
            await asyncio.to_thread(writer.commit)
            filename = f"{batch.id}_{names[state]}.jsonl"
            files[state] = StoredFile(file_id, batch.caller, filename, BATCH_OUTPUT, writer.size, now, expires_at)
    ids = {state: file.id for state, file in files.items()}
    await store.finish(
        batch.id,
        end,
        now,
        list(files.values()),
        output_file=ids.get(LineState.COMPLETED),
        error_file=ids.get(LineState.FAILED),
        failed=batch.failed + outputs.left_out,
    )
