"""Engine health: checks whether each engine responds, and marks it as up or down.

A job also ends when its engine fails (`node.jobs.job`). The asks of an engine that is down are withdrawn until it is up again
(`node.service.ask_publisher`).
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping

import structlog

from node.domain.upstream_models import UpstreamModel
from node.jobs.pooled_engine import PooledEngine
from tallystick.protocol.errors import Unavailable

log = structlog.get_logger()
MAX_SKIPPED_ROUNDS = 3
"""Largest number of consecutive rounds that skip an engine that stays down."""


class EngineHealth:
    """The health of the node's engines. `max_failures`: consecutive failed checks after which an engine is down."""

    def __init__(self, engines: Mapping[str, PooledEngine], max_failures: int) -> None:
        self._engines, self._max_failures = engines, max_failures
        self._failures: Counter[str] = Counter()
        self._rounds_to_skip: Counter[str] = Counter()

    async def check(self, *, first: bool = False) -> dict[str, tuple[UpstreamModel, ...]]:
        """Checks the engines once; returns the models of those that responded, by engine.

        On the `first` check, one failure takes an engine down. An engine that stays down is checked less and less often.
        """
        due = {name: engine for name, engine in self._engines.items() if not self._skips_round(name)}
        listed = await asyncio.gather(*(self._check_engine(name, engine, first=first) for name, engine in due.items()))
        return {name: models for name, models in zip(due, listed, strict=True) if models is not None}

    def _skips_round(self, name: str) -> bool:
        """Whether this round skips an engine that is down."""
        if not self._rounds_to_skip[name]:
            return False
        self._rounds_to_skip[name] -= 1
        return True

    async def _check_engine(self, name: str, pooled: PooledEngine, *, first: bool) -> tuple[UpstreamModel, ...] | None:
        """Returns the engine's models; None if it did not respond."""
        try:
            models = await pooled.engine.models()
        except Unavailable as error:
            self._failures[name] += 1
            if pooled.up and (first or self._failures[name] >= self._max_failures):
                pooled.up = False
                log.warning("engine down; its asks are withdrawn", engine=name, reason=str(error))
            if not pooled.up:
                self._rounds_to_skip[name] = min(max(0, self._failures[name] - self._max_failures), MAX_SKIPPED_ROUNDS)
            return None
        self._failures[name] = 0
        pooled.observe(await pooled.engine.load())
        if not pooled.up:
            pooled.returns += 1
            log.info("engine up again", engine=name)
        pooled.up = True
        return models
