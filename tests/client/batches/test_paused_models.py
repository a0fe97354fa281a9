"""Models that nobody is asked for now, and the lines that wait for them."""

from __future__ import annotations

import math

from tallystick.client.batches.line_policy import wait_seconds
from tallystick.client.batches.paused_models import PausedModels
from tallystick.client.batches.records import InputLine


def line(number: int) -> InputLine:
    """A line of the input."""
    return InputLine(number, number * 100, 100)


def test_lines_wait_for_the_end_of_a_pause() -> None:
    """They come back in the order in which they were parked, and not before."""
    paused = PausedModels()
    assert not paused
    assert paused.due == math.inf
    paused.pause("m", 10.0)
    for number in (1, 2, 3):
        paused.park("m", line(number))
    assert paused
    assert paused.due == paused.until("m") == 10.0 + wait_seconds(0)
    assert paused.next(paused.due - 0.1) is None
    now = paused.due
    assert [paused.next(now) for _ in range(4)] == [line(1), line(2), line(3), None]
    assert not paused
    assert paused.due == math.inf


def test_a_new_pause_holds_the_rest() -> None:
    """The first line of a pause that is over is a try; if it fails, it waits again, behind the others and longer."""
    paused = PausedModels()
    assert paused.pause("m", 0.0)
    for number in range(3):
        paused.park("m", line(number))
    assert paused.next(1.0) == line(0)
    assert paused.pause("m", 1.0)
    assert not paused.pause("m", 1.5)  # during a pause: changes nothing
    paused.park("m", line(0))
    assert paused.next(2.9) is None
    assert paused.due == 1.0 + wait_seconds(1)
    assert [paused.next(3.0) for _ in range(3)] == [line(1), line(2), line(0)]


def test_models_wait_apart() -> None:
    """A pause of one model holds no line of another one, and a sale ends it at once."""
    paused = PausedModels()
    paused.pause("a", 0.0)
    paused.pause("b", 5.0)
    paused.park("b", line(2))
    paused.park("a", line(1))
    assert paused.next(1.0) == line(1)
    assert paused.next(1.0) is None
    paused.end("b")
    assert paused.until("b") == 0
    assert paused.next(1.0) == line(2)
    assert paused.next(100.0) is None
    assert not paused
