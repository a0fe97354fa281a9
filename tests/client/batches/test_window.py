"""The window of a batch."""

from __future__ import annotations

import pytest

from tallystick.client.batches.window import MAX_WINDOW_SECONDS, read_window
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
