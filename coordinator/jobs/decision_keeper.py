"""Keeps the decision log over a restart: stores new decisions once a second, and restores them at the start."""

from __future__ import annotations

import structlog

from coordinator.domain.decision_codec import dump_decisions, load_decisions
from coordinator.domain.decision_log import MAX_DECISIONS, DecisionLog
from coordinator.ports import LogStore
from tallystick.protocol.errors import Unavailable

log = structlog.get_logger()


class DecisionKeeper:
    """See the module's docstring. `save` is called once a second; a kill loses the decisions of the last one."""

    def __init__(self, decisions: DecisionLog, store: LogStore) -> None:
        self._decisions, self._store = decisions, store

    async def restore(self) -> None:
        """Loads the decisions of a former process. Raises Unavailable."""
        restored = []
        for doc in await self._store.decisions():
            try:
                restored += load_decisions(doc)
            except ValueError as error:
                log.warning("decisions of a former process not read", reason=str(error))
        self._decisions.restore(restored[-MAX_DECISIONS:])

    def save(self) -> None:
        """Stores the new decisions, now or at the next call."""
        fresh = self._decisions.take_unsaved()
        if not fresh:
            return
        try:
            self._store.enqueue_decisions(len(fresh), dump_decisions(fresh))
        except Unavailable:
            self._decisions.mark_unsaved(fresh)
