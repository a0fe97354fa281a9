"""Structured logs: JSON lines for machines, or coloured text for a terminal. Secrets are never passed to a logger.

Many logged values come from untrusted peers. Control characters are escaped, so no value can move a terminal's cursor or forge
a line. To bound the disk space, a value has at most MAX_TEXT characters, and each event is logged at most EVENTS_AT_ONCE times
in a burst and EVENTS_PER_SECOND times a second after it; requests ten times as often. The next line of a limited event has the
number of omitted ones.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache

import orjson
import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

from tallystick.runtime.log_lines import OrderedWriteLogger, lines

log = structlog.get_logger()
MAX_TEXT = 4_000
EVENTS_AT_ONCE, EVENTS_PER_SECOND = 200, 20
REQUESTS_AT_ONCE, REQUESTS_PER_SECOND = 2_000, 200
"""The limits of the event "request", which is logged for each served request."""
_MAX_EVENT_NAMES = 1_000
"""Event names whose rate is tracked. The code has far fewer."""
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters (C0, DEL, C1), bidirectional formatting characters, line separators, and lone surrogates."""


_TOKEN = re.compile(r"\S+")
_HOST = r"(?:[\w.-]+|\[[\w:.%]+\])(?::\d+)?"
_AFTER_HOSTS = r"(?=[/?#'\"<>()\[\]{},;\\]|:?$)"
_NO_HOST = r"(?=[/?#]|['\")>\]},;:]*$)"
_URL = re.compile(rf"://(?:({_HOST}(?:,{_HOST})*{_AFTER_HOSTS}|{_NO_HOST})([/?#].*)?|(.*))")
"""A URL without a user: its hosts, if they are followed by what may follow a host, and its path; or what is no host."""
_CLOSERS = "'\")>]},;:"
_URL_PATH = re.compile(r"(\burl: )(/\S*)", re.IGNORECASE)
"""How urllib3 names the path of a request."""
_UNCHANGED = (bool, int, float, list, tuple, dict, type(None))
"""Types of values that renderers write safely."""


def printable(text: str) -> str:
    """The text with control characters escaped as in Python, on one line and safe for a terminal."""
    if text.isprintable():  # no character of _CONTROLS is
        return text
    return _CONTROLS.sub(lambda match: match[0].encode("unicode_escape", "surrogatepass").decode(), text)


def _sanitise(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """A structlog processor that truncates each value to MAX_TEXT and escapes it. A traceback keeps its lines, indented.

    Lists and dicts are left to the renderers, which escape their items.
    """
    for name, value in event.items():
        if type(value) is str and len(value) <= MAX_TEXT and value.isprintable():
            continue  # as nearly all are
        if name.startswith("_") or isinstance(value, _UNCHANGED):
            continue
        if name == "exception" and isinstance(value, str):
            event[name] = "\n    ".join(printable(line) for line in value[-10 * MAX_TEXT :].split("\n"))
        elif name not in {"exc_info", "stack_info"}:
            text = value if isinstance(value, str) else str(value)
            event[name] = printable(text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]}… ({len(text)} characters)")
    return event


def redact_urls(text: str) -> str:
    """The text with the URLs in it cut after their hosts, and without users and passwords: a path or a query may be a key.

    Up to the next blank, whatever may be of a URL is cut. A host is shown only where no other reading makes it a password.
    """
    if "://" in text:
        text = _TOKEN.sub(_redact_token, text)
    return _URL_PATH.sub(lambda match: f"{match[1]}/…{_closing(match[2])}", text)


def _redact_token(match: re.Match[str]) -> str:
    token = match[0]
    scheme, separator, rest = token.partition("://")
    if not separator:
        return token
    user, _, tail = rest.rpartition("@")
    if any(character in user for character in "/?#"):  # of a password that is not escaped, or an @ in a path
        return f"{scheme}://…{_closing(tail)}"
    return scheme + _URL.sub(_redact_url, f"://{tail}")


def _redact_url(match: re.Match[str]) -> str:
    hosts, path, unknown = match.groups()
    if unknown is not None:
        return f"://…{_closing(unknown)}"
    return f"://{hosts}" if path is None else f"://{hosts}/…{_closing(path)}"


def _closing(text: str) -> str:
    return text[len(text.rstrip(_CLOSERS)) :]


def _redact_urls(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """A structlog processor for the records of libraries, which quote the URLs that they were given."""
    for name in ("event", "exception"):
        if isinstance(text := event.get(name), str):
            event[name] = redact_urls(text)
    return event


class LogRateLimiter:
    """A structlog processor that limits the rate of each event by a token bucket. Errors are never dropped."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._buckets: OrderedDict[str, tuple[float, float, int]] = OrderedDict()

    def __call__(self, _logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
        """Returns the event. Raises structlog.DropEvent if it is over the limit."""
        if method in {"error", "critical", "exception"}:
            return event
        name, now = str(event.get("event"))[:100], self._clock()
        burst, rate = (REQUESTS_AT_ONCE, REQUESTS_PER_SECOND) if name == "request" else (EVENTS_AT_ONCE, EVENTS_PER_SECOND)
        tokens, updated_at, dropped = self._buckets.pop(name, (float(burst), now, 0))
        tokens = min(float(burst), tokens + (now - updated_at) * rate)
        allowed = tokens >= 1
        self._buckets[name] = (tokens - 1, now, 0) if allowed else (tokens, now, dropped + 1)
        if len(self._buckets) > _MAX_EVENT_NAMES:
            self._buckets.popitem(last=False)
        if not allowed:
            raise structlog.DropEvent
        return {**event, "left_out": dropped} if dropped else event


def _dump(event: EventDict, default: Callable[[object], object]) -> str:
    """JSON of ASCII characters alone. The fast writer escapes no others, and refuses what JSON has no number or key for.

    Objects are written by `default`, which shows their repr: it has no secrets, while the fields of a dataclass may.
    """
    try:
        text = orjson.dumps(event, default=default, option=orjson.OPT_PASSTHROUGH_DATACLASS | orjson.OPT_PASSTHROUGH_DATETIME)
    except TypeError:
        text = b"\xff"
    return text.decode() if text.isascii() else json.dumps(event, default=default)


def configure_quiet() -> None:
    """Sets up structlog for short commands: warnings and errors only, to stderr."""
    global _frequent  # noqa: PLW0603 - see `configure`
    _frequent = None
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
        _sanitise,
    ]


def configure(*, json: bool | None, level: str = "info") -> None:
    """Sets up structlog and the standard library's logging for a daemon. Both write to stderr.

    `json`: one object per line; None means text at a terminal and JSON elsewhere.
    """
    json = not sys.stderr.isatty() if json is None else json
    shared, limiter = _shared(json=json), LogRateLimiter()
    renderer: Processor = (
        structlog.processors.JSONRenderer(_dump) if json else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
    )
    number = logging.getLevelNamesMapping().get(level.upper(), logging.INFO)
    processors: list[Processor] = [limiter, *shared, renderer]
    structlog.configure(
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=OrderedWriteLogger,
    )
    global _frequent  # noqa: PLW0603 - one of the process, as structlog's own configuration is
    _frequent = _Frequent(processors, limiter, renderer, number) if json else None
    formatter = structlog.stdlib.ProcessorFormatter(
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
        foreign_pre_chain=[*shared, _redact_urls],
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    handler.addFilter(_StandardLogRateLimiter())
    logging.basicConfig(handlers=[handler], level=max(number, logging.WARNING), force=True)


@dataclass(frozen=True, slots=True)
class _Frequent:
    """What the lines of `log_frequent` pass on their way: the same limiter and renderer as all others."""

    processors: Sequence[Processor]
    limiter: LogRateLimiter
    renderer: Processor
    level: int

    @property
    def in_use(self) -> bool:
        """Whether structlog's processors are still those of `configure`: a test may have others, or capture the events."""
        return structlog.get_config()["processors"] is self.processors and self.processors[0] is self.limiter

    def write(self, level: str, event: EventDict) -> None:
        try:
            event = self.limiter(None, level, event)
        except structlog.DropEvent:
            return
        event["level"], event["timestamp"] = level, _iso_time(time.time())
        lines.add(str(self.renderer(None, level, _sanitise(None, level, event))))


_frequent: _Frequent | None = None
_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO}


@lru_cache(maxsize=1)
def _iso_second(second: int) -> str:
    return datetime.fromtimestamp(second, UTC).strftime("%Y-%m-%dT%H:%M:%S")


def _iso_time(now: float) -> str:
    """The time of an event as structlog's TimeStamper writes it."""
    second = int(now)
    return f"{_iso_second(second)}.{int((now - second) * 1_000_000):06}Z"


def log_frequent(level: str, event: str, fields: Mapping[str, object]) -> None:
    """Logs an event at the level "debug" or "info" as structlog does, in a third of the time: for lines of every request or job.

    The lines of one turn of the event loop are written together.
    """
    frequent = _frequent
    if frequent is None or not frequent.in_use:
        getattr(log, level)(event, **fields)
    elif _LEVELS[level] >= frequent.level:
        frequent.write(level, {**fields, "event": event})


class _StandardLogRateLimiter(logging.Filter):
    """The same rate limit for log records of libraries, per logger, because their texts vary."""

    def __init__(self) -> None:
        super().__init__()
        self._limiter = LogRateLimiter()

    def filter(self, record: logging.LogRecord) -> bool:
        try:
            self._limiter(None, "warning", {"event": record.name})
        except structlog.DropEvent:
            return False
        return True
