"""Structured logs: JSON lines for machines, or colour for a terminal. Secrets are never passed to a logger.

Much of what is logged was written by strangers, so no value can move a terminal's cursor or look like a line of its own, and
nobody fills a disk: a value has at most MAX_TEXT characters, and an event is told at most EVENTS_AT_ONCE times at once and
EVENTS_PER_SECOND times a second after that; its next line says how many were left out.
"""

from __future__ import annotations

import logging
import re
import sys
import time
from collections import OrderedDict
from collections.abc import Callable

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

MAX_TEXT = 4_000
EVENTS_AT_ONCE, EVENTS_PER_SECOND = 200, 20
_KINDS = 1_000
"""Different events whose pace is remembered; the code has far fewer."""
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters (C0, DEL, C1), what changes the direction of writing, line separators, and halves of surrogate pairs."""


def printable(text: str) -> str:
    """The text on one line, without anything that a terminal obeys: such characters are escaped as Python writes them."""
    return _CONTROLS.sub(lambda found: found[0].encode("unicode_escape", "surrogatepass").decode(), text)


def _harmless(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Every value of an event, cut to MAX_TEXT and made printable; a traceback keeps its lines, indented. Lists are left to the
    renderers, both of which escape what is in them.
    """
    for name, value in event.items():
        if name.startswith("_") or value is None or isinstance(value, bool | int | float | list | tuple | dict):
            continue
        if name == "exception" and isinstance(value, str):
            event[name] = "\n    ".join(printable(line) for line in value[-10 * MAX_TEXT :].split("\n"))
        elif name not in {"exc_info", "stack_info"}:
            text = value if isinstance(value, str) else str(value)
            event[name] = printable(text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]}… ({len(text)} characters)")
    return event


class LogRateLimiter:
    """A structlog processor that lets an event through so often; below errors, which are never left out."""

    def __init__(self, tick: Callable[[], float] = time.monotonic) -> None:
        self._tick = tick
        self._left: OrderedDict[str, tuple[float, float, int]] = OrderedDict()

    def __call__(self, _logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
        """The event, or structlog.DropEvent."""
        if method in {"error", "critical", "exception"}:
            return event
        kind, now = str(event.get("event"))[:100], self._tick()
        left, at, dropped = self._left.pop(kind, (float(EVENTS_AT_ONCE), now, 0))
        left = min(float(EVENTS_AT_ONCE), left + (now - at) * EVENTS_PER_SECOND)
        through = left >= 1
        self._left[kind] = (left - 1, now, 0) if through else (left, now, dropped + 1)
        if len(self._left) > _KINDS:
            self._left.popitem(last=False)
        if not through:
            raise structlog.DropEvent
        return {**event, "left_out": dropped} if dropped else event


def configure_quiet() -> None:
    """For commands that end: warnings only, and to stderr, so that stdout is theirs."""
    structlog.configure(
        processors=[*_shared(json=False), structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())],
        wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING),
        logger_factory=lambda *_: structlog.WriteLogger(sys.stderr),
    )


def _shared(*, json: bool) -> list[Processor]:
    return [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        *([] if json else [structlog.processors.StackInfoRenderer()]),
        structlog.processors.format_exc_info,
        _harmless,
    ]


def configure(*, json: bool, level: str = "info") -> None:
    """Sets up structlog and the standard library's logging, both to stderr."""
    shared, pace = _shared(json=json), LogRateLimiter()
    renderer: Processor = (
        structlog.processors.JSONRenderer() if json else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
    )
    number = logging.getLevelNamesMapping().get(level.upper(), logging.INFO)
    structlog.configure(
        processors=[pace, *shared, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=lambda *_: structlog.WriteLogger(sys.stderr),
    )
    formatter = structlog.stdlib.ProcessorFormatter(
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer], foreign_pre_chain=shared
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    handler.addFilter(_StandardLogRateLimiter())
    logging.basicConfig(handlers=[handler], level=max(number, logging.WARNING), force=True)


class _StandardLogRateLimiter(logging.Filter):
    """The same pace for what libraries log, by logger: their texts may carry anything."""

    def __init__(self) -> None:
        super().__init__()
        self._limiter = LogRateLimiter()

    def filter(self, record: logging.LogRecord) -> bool:
        try:
            self._limiter(None, "warning", {"event": record.name})
        except structlog.DropEvent:
            return False
        return True
