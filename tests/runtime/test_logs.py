"""Logs: one line of JSON an event, or text for people, both on standard error."""

from __future__ import annotations

import json
import subprocess

import pytest

from tests.runtime.processes import PATIENCE, script

LOGGING = """
import logging, sys
import structlog
from tallystick.protocol.eip712 import Signer
from tallystick.runtime import logs

logs.configure(json=sys.argv[1] == "json", level=sys.argv[2])
log = structlog.get_logger()
log.debug("quiet")
log.info("hello", job="ab", signer=Signer(bytes(31) + b"\\1"))
logging.getLogger("library").info("not ours, not important")
logging.getLogger("library").warning("library says %s", "so")
try:
    1 / 0
except ZeroDivisionError:
    log.exception("broke")
    logging.getLogger("library").exception("library broke")
"""


def _run(form: str, level: str) -> tuple[str, list[str]]:
    with script(LOGGING, form, level) as process:
        out, errors = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, errors
        return out, errors.splitlines()


def test_machines_get_one_json_object_a_line() -> None:
    """Every event, a library's and a traceback too, is one line of JSON with level and time; standard output stays empty."""
    out, lines = _run("json", "info")
    assert out == ""
    events = [json.loads(text) for text in lines]
    assert [event["event"] for event in events] == ["hello", "library says so", "broke", "library broke"]
    assert [event["level"] for event in events] == ["info", "warning", "error", "error"]
    assert all(event["timestamp"].endswith("Z") for event in events)
    assert all("ZeroDivisionError" in event["exception"] for event in events[2:])
    assert events[0]["job"] == "ab"
    assert events[0]["signer"].startswith("Signer(0x"), "and a key that was passed by mistake shows its address only"


def test_people_get_text() -> None:
    """The same events as readable lines, without colour codes where no terminal is."""
    out, lines = _run("text", "info")
    assert out == ""
    text = "\n".join(lines)
    assert "hello" in text
    assert "library says so" in text
    assert "ZeroDivisionError" in text
    assert "\x1b[" not in text


@pytest.mark.parametrize(("level", "shown"), [("debug", True), ("info", False), ("no such level", False)])
def test_the_level_decides(level: str, shown: bool) -> None:
    """Below the level nothing is written; an unknown level counts as info."""
    assert any('"quiet"' in text for text in _run("json", level)[1]) == shown


def test_errors_of_a_child_are_readable() -> None:
    """A failing script reports what it wrote to standard error."""
    with script("raise SystemExit('reason')") as process:
        assert process.communicate(timeout=PATIENCE)[1] == "reason\n"
    assert isinstance(process, subprocess.Popen)
