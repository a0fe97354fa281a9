"""Checks the input of a batch when it begins, and records where each of its requests stands."""

from __future__ import annotations

import asyncio
from itertools import islice

from tallystick.client.batches.file_folder import FileFolder
from tallystick.client.batches.input_lines import InputCheck, LineSplitter
from tallystick.client.batches.records import Batch, BatchStatus, InputLine, LineError
from tallystick.client.batches.store import BatchStore
from tallystick.protocol.errors import Refusal, Unavailable

_BLOCKS_AT_ONCE = 16


async def validate(batch: Batch, store: BatchStore, folder: FileFolder, longest_line: int, now: int) -> Batch:
    """Reads the whole input. Returns the batch, which is then in progress, failed, or cancelled meanwhile."""
    await store.clear_lines(batch.id)
    check = InputCheck(batch.endpoint, batch.id)
    try:
        await _read(batch, store, folder, check, longest_line)
        check.finish()
    except Unavailable as error:
        if error.retry:
            raise
        check.errors = [LineError("invalid_input_file", str(error))]
    if not check.errors:
        model = check.models.pop() if len(check.models) == 1 else None
        try:
            return await store.begin(batch.id, now, check.output_bytes, total=check.count, model=model)
        except Refusal as error:
            check.errors = [LineError(error.code.value, str(error))]
    errors = [error.to_json() for error in check.errors]
    return await store.advance(batch.id, BatchStatus.FAILED, now, errors=errors)


async def _read(batch: Batch, store: BatchStore, folder: FileFolder, check: InputCheck, longest_line: int) -> None:
    splitter = LineSplitter(longest_line)
    reader = await asyncio.to_thread(folder.read, batch.input_file)
    with reader:
        blocks = reader.blocks()

        def read_some() -> tuple[list[InputLine], bool]:
            read, more = list[InputLine](), False
            for block in islice(blocks, _BLOCKS_AT_ONCE):
                more = True
                read += [line for raw in splitter.feed(block) if not check.exhausted and (line := check.check(raw)) is not None]
            if not more:
                read += [line for raw in splitter.finish() if not check.exhausted and (line := check.check(raw)) is not None]
            return read, more

        more = True
        while more and not check.exhausted:
            added, more = await asyncio.to_thread(read_some)
            if not check.errors:
                await store.add_lines(batch.id, added)
