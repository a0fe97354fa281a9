"""Lines of the log: in their order, together if they are of one turn of the event loop, and none is lost at the end."""

from __future__ import annotations

import asyncio
import json
from datetime import datetime

import pytest
import structlog
from structlog.testing import capture_logs

from tallystick.runtime import logs
from tallystick.runtime.log_lines import MAX_LINES, LogLines
from tests.runtime.processes import TIMEOUT_SECONDS, script

_FIRST = "import asyncio, sys, structlog\nfrom tallystick.runtime import logs\nlogs.configure(json=True, level=sys.argv[1])\n"
IN_TURNS = (
    _FIRST
    + """
log = structlog.get_logger()
writes = []
class Written:
    def write(self, text): writes.append(text.count("\\n")); return sys.__stderr__.write(text)
    def flush(self): sys.__stderr__.flush()
sys.stderr = Written()
async def main():
    for turn in range(2):
        for number in range(3):
            logs.log_frequent("info", "request", {"turn": turn, "number": number})
        await asyncio.sleep(0)
    logs.log_frequent("info", "request", {"turn": 2, "number": 0})
    log.info("between")
    logs.log_frequent("debug", "request", {"turn": 2, "number": 1})
    logs.log_frequent("info", "request", {"turn": 2, "number": 2})
asyncio.run(main())
logs.log_frequent("info", "request", {"turn": 3, "number": 0})
print(writes)
"""
)
AT_THE_END = (
    _FIRST
    + """
async def main():
    logs.log_frequent("info", "request", {"number": 1})
    sys.exit(3)
asyncio.run(main())
"""
)


def _events(errors: str) -> list[tuple[object, ...]]:
    return [tuple(event.get(name) for name in ("event", "turn", "number")) for event in map(json.loads, errors.splitlines())]


def test_lines_of_a_turn_leave_together_and_in_order() -> None:
    """A turn is one write. A line of another event comes behind those before it, and nothing waits without a loop."""
    with script(IN_TURNS, "info") as process:
        out, errors = process.communicate(timeout=TIMEOUT_SECONDS)
    expected: list[tuple[object, ...]] = [("request", turn, number) for turn in range(2) for number in range(3)]
    expected += [("request", 2, 0), ("between", None, None), ("request", 2, 2), ("request", 3, 0)]
    assert _events(errors) == expected
    assert json.loads(out)[:3] == [3, 3, 1]


def test_the_level_holds_for_frequent_lines_too() -> None:
    """Debug shows more, warning less."""
    for level, count in (("debug", 10), ("info", 9), ("warning", 0)):
        with script(IN_TURNS, level) as process:
            _, errors = process.communicate(timeout=TIMEOUT_SECONDS)
        assert len([event for event in _events(errors) if event[0] == "request"]) == count, level


def test_a_process_that_ends_writes_what_waits() -> None:
    """Also in the middle of a turn."""
    with script(AT_THE_END, "info") as process:
        _, errors = process.communicate(timeout=TIMEOUT_SECONDS)
    assert _events(errors) == [("request", None, 1)]


def test_a_line_is_the_one_that_structlog_writes(capsys: pytest.CaptureFixture[str]) -> None:
    """The same members, order, escapes and form of the time."""
    before = structlog.get_config()
    evil: dict[str, object] = {"job": "ab", "text": "\x1b[31m" + "x" * 5_000, "none": None, "cost": 0.25, "list": ["\x07"]}
    try:
        logs.configure(json=True)
        logs.log_frequent("info", "request", evil)
        quick = capsys.readouterr().err
        structlog.get_logger().info("request", **evil)
        slow = capsys.readouterr().err
    finally:
        structlog.configure(**before)
        logs._frequent = None
    first, second = (list(json.loads(line).items()) for line in (quick, slow))
    assert [item for item in first if item[0] != "timestamp"] == [item for item in second if item[0] != "timestamp"]
    assert [name for name, _ in first] == [name for name, _ in second]
    assert [len(str(dict(items)["timestamp"])) for items in (first, second)] == [27, 27]
    assert quick.isascii()


@pytest.mark.parametrize("now", [0.0, 1_700_000_000.0, 1_700_000_000.999_999_9, 1_700_000_059.000_001, 4_102_444_800.5])
def test_the_time_has_six_places(now: float) -> None:
    """Whatever the fraction of the second is."""
    shown = logs._iso_time(now)
    assert len(shown) == 27
    assert abs(datetime.fromisoformat(shown).timestamp() - now) < 0.000_01


def test_a_flood_is_limited_and_counted(capsys: pytest.CaptureFixture[str]) -> None:
    """The limit is that of the event, whichever way its lines come."""
    before = structlog.get_config()
    try:
        logs.configure(json=True)
        for _ in range(logs.REQUESTS_AT_ONCE + 500):
            logs.log_frequent("info", "request", {})
        written = len(capsys.readouterr().err.splitlines())
    finally:
        structlog.configure(**before)
        logs._frequent = None
    assert logs.REQUESTS_AT_ONCE <= written < logs.REQUESTS_AT_ONCE + 500


def test_tests_capture_frequent_lines() -> None:
    """As all others, also in a process that writes JSON."""
    before = structlog.get_config()
    try:
        logs.configure(json=True)
        with capture_logs() as events:
            logs.log_frequent("info", "request", {"job": "ab"})
    finally:
        structlog.configure(**before)
        logs._frequent = None
    assert events == [{"event": "request", "job": "ab", "log_level": "info"}]


async def test_many_lines_do_not_wait_for_the_turn(capsys: pytest.CaptureFixture[str]) -> None:
    """The lines that wait are bounded, and a loop that ended holds no lines back."""
    lines = LogLines()
    for number in range(MAX_LINES + 1):
        lines.add(str(number))
    assert len(capsys.readouterr().err.splitlines()) == MAX_LINES
    lines._loop = asyncio.new_event_loop()
    lines._loop.close()
    lines.add("last")
    await asyncio.sleep(0)
    assert capsys.readouterr().err.splitlines() == [str(MAX_LINES), "last"]
