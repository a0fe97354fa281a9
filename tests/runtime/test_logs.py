"""Logs: a line of JSON per event, or text for people, both on standard error."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from tallystick.protocol.types import Amount
from tallystick.runtime import logs
from tests.runtime.processes import TIMEOUT_SECONDS, script

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
        out, errors = process.communicate(timeout=TIMEOUT_SECONDS)
        assert process.returncode == 0, errors
        return out, errors.splitlines()


def test_machines_get_one_json_object_a_line() -> None:
    """Every event, also a library's and a traceback, is one line of JSON with level and time; standard output stays empty."""
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
    """The same events are readable lines, without colour codes if the output is no terminal."""
    out, lines = _run("text", "info")
    assert out == ""
    text = "\n".join(lines)
    assert "hello" in text
    assert "library says so" in text
    assert "ZeroDivisionError" in text
    assert "\x1b[" not in text


@pytest.mark.parametrize(("level", "shown"), [("debug", True), ("info", False), ("no such level", False)])
def test_the_level_decides(level: str, shown: bool) -> None:
    """Events below the level are not written; an unknown level counts as info."""
    assert any('"quiet"' in text for text in _run("json", level)[1]) == shown


def test_errors_of_a_child_are_readable() -> None:
    """The error of a failing script contains its standard error."""
    with script("raise SystemExit('reason')") as process:
        assert process.communicate(timeout=TIMEOUT_SECONDS)[1] == "reason\n"
    assert isinstance(process, subprocess.Popen)


FORGED = "\n2026-11-28T00:00:00Z [info     ] gateway ready   url=http://evil"
HOSTILE = ["\x1b[2J", "\x1b]0;owned\x07", "\x9b2J", "\r", FORGED, "\u2028line", "\u202etxt.exe", "\x00", "\x7f", "\x85"]


@pytest.fixture
def written(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[[], str]]:
    """Returns the logged text."""
    handlers = logging.root.handlers[:]
    logs.configure(json=False)
    yield lambda: capsys.readouterr().err
    structlog.reset_defaults()
    logging.root.handlers[:] = handlers


@pytest.mark.parametrize("evil", HOSTILE, ids=range(len(HOSTILE)))
@pytest.mark.parametrize("placement", ["value", "event", "library", "exception", "list", "object", "quiet"])
def test_a_stranger_does_not_write_to_the_terminal(written: Callable[[], str], evil: str, placement: str) -> None:
    """A log of any hostile text has no control characters and no line that looks like the start of an event."""

    class Told:
        def __str__(self) -> str:
            return evil

        __repr__ = __str__

    log, text = structlog.get_logger(), f"before{evil}after"
    if placement == "quiet":
        logs.configure_quiet()
        log = structlog.get_logger()
    try:
        if placement == "exception":
            int(text)
        if placement == "library":
            logging.getLogger("library").warning("it says %s", text)
        elif placement == "event":
            log.warning(text)
        else:
            log.warning("refused", reason={"list": [text], "object": Told()}.get(placement, text))
    except ValueError:
        log.exception("broke")
    output = written()
    assert output
    assert not logs._CONTROLS.search(output.replace("\n", ""))
    assert not any(line.startswith("2026-11-28T00:00:00Z") for line in output.splitlines())


def test_half_a_surrogate_pair_does_not_break_the_log() -> None:
    """Characters that cannot be encoded are escaped; ordinary text of any script stays unchanged."""
    assert logs.printable("a\ud800b") == "a\\ud800b"
    assert logs.printable("größer, 東京, مرحبا") == "größer, 東京, مرحبا"


def test_a_flood_of_refusals_does_not_fill_the_log(written: Callable[[], str]) -> None:
    """An event that occurs thousands of times is logged about a hundred times, with values cut; other events are still logged."""
    log, begin = structlog.get_logger(), time.monotonic()
    for _ in range(5_000):
        log.info("connection refused", reason="x" * 100_000)
        logging.getLogger("library").warning("connection refused")
    log.info("coordinator ready")
    most = logs.EVENTS_AT_ONCE + (time.monotonic() - begin + 1) * logs.EVENTS_PER_SECOND  # of each; errors repeat it
    output = written()
    assert output.count("connection refused") <= 4 * most
    assert len(output) < 3 * most * (logs.MAX_TEXT + 1_000)
    assert "coordinator ready" in output


def test_omitted_events_are_counted() -> None:
    """The next logged event states how many were omitted; errors are never omitted."""
    now = 0.0
    pace = logs.LogRateLimiter(lambda: now)
    for _ in range(logs.EVENTS_AT_ONCE):
        pace(None, "info", {"event": "refused"})
    for _ in range(7):
        with pytest.raises(structlog.DropEvent):
            pace(None, "info", {"event": "refused"})
    assert pace(None, "error", {"event": "refused"}) == {"event": "refused"}
    now = 1.0
    assert pace(None, "info", {"event": "refused"}) == {"event": "refused", "left_out": 7}
    for number in range(5_000):
        pace(None, "info", {"event": str(number)})
    assert len(pace._buckets) == logs._MAX_EVENT_NAMES


@dataclass(frozen=True)
class Secretive:
    """An object whose repr hides a field."""

    secret: str = field(repr=False)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("gr\u00fc\u00df dich", "gr\u00fc\u00df dich"),
        ([1, "zw\u00f6lf", None, True, 1.5], [1, "zw\u00f6lf", None, True, 1.5]),
        ([1 << 70], [1 << 70]),
        ([Amount(7)], [7]),
        ({1: "a"}, {"1": "a"}),
        (["\ud800", "\u202e", "\x9b"], ["\ud800", "\u202e", "\x9b"]),
        ([Secretive("s3cret")], ["Secretive()"]),
        ({"key": Secretive("s3cret")}, {"key": "Secretive()"}),
    ],
)
def test_a_line_of_json_is_ascii_and_shows_no_fields_of_objects(
    capsys: pytest.CaptureFixture[str], value: object, expected: object
) -> None:
    """Whatever is logged: text in other scripts, numbers that are too long, objects in lists."""
    handlers = logging.root.handlers[:]
    logs.configure(json=True)
    try:
        structlog.get_logger().info("event", value=value)
    finally:
        structlog.reset_defaults()
        logging.root.handlers[:] = handlers
    line = capsys.readouterr().err
    assert line.isascii()
    assert json.loads(line)["value"] == expected
    assert "s3cret" not in line


@given(st.text())
def test_text_is_escaped_as_if_every_character_was_looked_at(text: str) -> None:
    """Printable text is returned as it is; no other text has a control character afterwards."""
    escaped = logs._CONTROLS.sub(lambda match: match[0].encode("unicode_escape", "surrogatepass").decode(), text)
    assert logs.printable(text) == escaped


def test_no_control_character_counts_as_printable() -> None:
    """Each of them is escaped, alone and in text."""
    controls = [chr(code) for code in range(sys.maxunicode + 1) if logs._CONTROLS.match(chr(code))]
    assert len(controls) > 2_000
    assert not any(control in logs.printable(f"a{control}b") for control in controls)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (
            "Max retries exceeded with url: /v1/KEY/traces?token=KEY (Caused by x)",
            "Max retries exceeded with url: /… (Caused by x)",
        ),
        ("GET https://user:KEY@host.example:8443/v3/KEY failed", "GET https://host.example:8443/… failed"),
        ("'postgresql+asyncpg://a:KEY@db/x' is away", "'postgresql+asyncpg://db/…' is away"),
        ("see http://host?key=KEY.", "see http://host/…"),
        ("http://127.0.0.1:8420 answers, as does a/b", "http://127.0.0.1:8420 answers, as does a/b"),
        ("cannot reach https://user:KEY@host.example", "cannot reach https://host.example"),
        ("nats://KEY@one.example:4222: timeout", "nats://one.example:4222: timeout"),
        ("nats://u:KEY@a:4222,nats://u:KEY@b:4222 are away", "nats://… are away"),
        ("http://a:1,http://b:2/KEY", "http://a:1,http://b:2/…"),
        ("postgresql://u:KE@Y@db:5432/x, then", "postgresql://db:5432/…, then"),
        ("postgres://u:KEY@[::1]:5432,db2:5433/x?password=KEY", "postgres://[::1]:5432,db2:5433/…"),
        ("postgres://u:KEY/KEY@db/x", "postgres://…"),
        ("postgres://u:K@KEY/KEY@db", "postgres://…"),
        ("postgresql:///x?user=u&password=KEY", "postgresql:///…"),
        ("DATABASE_URL=mysql://u:KEY'KEY@db", "DATABASE_URL=mysql://db"),
        ("https://user:KEY", "https://…"),
        ("https://{host}/KEY", "https://…"),
        ("(see 'https://host/(KEY)'KEY')", "(see 'https://host/…')"),
        ("x://", "x://"),
    ],
)
def test_urls_of_libraries_are_cut(text: str, shown: str) -> None:
    """What a library logs of a URL is its host: users, passwords, paths and queries may be keys."""
    assert logs.redact_urls(text) == shown


_LETTERS = st.text(st.characters(exclude_characters="\N{NO-BREAK SPACE}", exclude_categories=["Z", "C"]), max_size=12).filter(
    lambda text: not any(character.isspace() for character in text) and "KEY" not in text
)


@given(
    scheme=st.sampled_from(["http", "https", "nats", "tls", "postgresql", "postgresql+asyncpg", "redis", "a-scheme.of+mine"]),
    login=st.tuples(_LETTERS, _LETTERS, _LETTERS),
    host=st.sampled_from(["host.example", "127.0.0.1:8420", "[::1]:5432", "a:1,b:2"]),
    path=st.none() | st.tuples(st.sampled_from("/?#"), _LETTERS, _LETTERS),
    around=st.sampled_from([("", ""), ("'", "'"), ("url=", ""), ("(", ")"), ('["', '"]'), ("Cannot reach ", ", as said")]),
)
def test_no_part_of_a_url_but_its_host_is_shown(
    scheme: str, login: tuple[str, str, str], host: str, path: tuple[str, str, str] | None, around: tuple[str, str]
) -> None:
    """Whatever characters a password, a path or a query has, escaped or not. The host stays where it cannot be a password."""
    user, before, after = login
    rest = "" if path is None else f"{path[0]}{path[1]}KEY{path[2]}"
    for secret in (f"{user}:{before}KEY{after}@", f"{before}KEY{after}@", ""):
        shown = logs.redact_urls(f"{around[0]}{scheme}://{secret}{host}{rest}{around[1]}")
        assert "KEY" not in shown
        assert shown.startswith(f"{around[0]}{scheme}://")
        assert logs.redact_urls(shown) == shown
        if "@" not in rest and not any(character in secret for character in "/?#"):
            assert host in shown


LIBRARY = """
import logging
from tallystick.runtime import logs
logs.configure(json=True)
def fail():
    raise OSError("no answer from https://host.example/v3/KEY")
try:
    fail()
except OSError:
    logging.getLogger("library").exception("Transient error with url: %s", "/v1/KEY")
"""


def test_a_record_of_a_library() -> None:
    """Both its text and its traceback are cut."""
    ended = subprocess.run([sys.executable, "-c", LIBRARY], capture_output=True, text=True, check=True, timeout=120)
    line = json.loads(ended.stderr)
    assert "KEY" not in ended.stderr
    assert line["event"] == "Transient error with url: /…"
    assert "https://host.example/…" in line["exception"]
