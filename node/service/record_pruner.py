"""Removes the records of old jobs from the node's store, hourly. What claims, recovery and the earnings need stays."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Protocol

import structlog

from tallystick.protocol.errors import TallyError

log = structlog.get_logger()
_INTERVAL_SECONDS = 3_600.0


class PrunedStore(Protocol):
    """The store that the pruner needs."""

    async def prune(self, now: int, keep_seconds: int) -> int:
        """Removes what ended more than `keep_seconds` before `now` (Unix seconds); returns the number of receipts. Raises
        Unavailable.
        """
        ...


class RecordPruner:
    """See the module's docstring. `keep_seconds`: how long the record of a job is kept after its end."""

    def __init__(self, store: PrunedStore, keep_seconds: int, now: Callable[[], float] = time.time) -> None:
        self._store, self._keep_seconds, self._now = store, keep_seconds, now

    async def run(self) -> None:
        """Prunes at once and then hourly, until cancelled."""
        while True:
            await self.prune()
            await asyncio.sleep(_INTERVAL_SECONDS)

    async def prune(self) -> None:
        """Runs one round of `run`. A round that fails is repeated with the next one."""
        try:
            removed = await self._store.prune(int(self._now()), self._keep_seconds)
        except TallyError as error:
            log.warning("records of old jobs not removed", reason=str(error))
            return
        if removed:
            log.info("records of old jobs removed", receipts=removed)
