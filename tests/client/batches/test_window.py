"""The window of a batch."""

from __future__ import annotations

import pytest

from tallystick.client.batches.window import (
    FULL_PRICE_STEP,
    MAX_WINDOW_SECONDS,
    PRICE_STEPS,
    elapsed_step,
    price_limit,
    read_window,
)
from tallystick.protocol.errors import BadMessage


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("24h", 86_400), ("1m", 60), ("90m", 5_400), ("1d", 86_400), ("7d", MAX_WINDOW_SECONDS), ("168h", 604_800)],
)
def test_windows(text: str, seconds: int) -> None:
    """Minutes, hours and days."""
    assert read_window(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "24", "h", "0h", "00h", "8d", "169h", "-1h", "1.5h", "24H", "24h ", "30s", "99999999h", "٣h", None, 24, []]
)
def test_what_is_no_window(text: object) -> None:
    """Anything else is refused by its name."""
    with pytest.raises(BadMessage, match="completion_window: expected"):
        read_window(text)


def test_steps_of_a_window() -> None:
    """From 0 at its begin to PRICE_STEPS at its end, and no further."""
    assert [elapsed_step(now, 100, 200) for now in (0, 100, 104.9, 105, 150, 199.9, 200, 10_000)] == [0, 0, 0, 1, 10, 19, 20, 20]
    assert elapsed_step(5, 5, 5) == 0


def test_the_price_limit_grows_from_the_cheapest_to_the_cap() -> None:
    """It never shrinks, never exceeds the cap, and reaches it for the last quarter of the window."""
    limits = [price_limit(100, 40, step) for step in range(PRICE_STEPS + 1)]
    assert limits[0] == 40
    assert limits == sorted(limits)
    assert set(limits[FULL_PRICE_STEP:]) == {100}
    assert limits[FULL_PRICE_STEP - 1] < 100
    assert price_limit(100, 40, 5) == 60
    assert {price_limit(30, 40, step) for step in range(PRICE_STEPS + 1)} == {30}
