"""The time in which a batch is to be done, `completion_window`, and the price that a line may have as it runs out. Pure."""

from __future__ import annotations

import re
from typing import Final

from tallystick.protocol.errors import BadMessage

MIN_WINDOW_SECONDS: Final = 60
MAX_WINDOW_SECONDS: Final = 7 * 86_400
PRICE_STEPS: Final = 20
"""Steps of a window, in each of which the price limit is the same, so that lines share their shortlists."""
FULL_PRICE_STEP: Final = 15
"""The step from which on a line may cost as much as its caller allows: the last quarter of the window."""
_WINDOW = re.compile(r"([1-9][0-9]{0,4})([mhd])")
_UNITS: Final = {"m": 60, "h": 3_600, "d": 86_400}


def read_window(value: object, member: str = "completion_window") -> int:
    """The seconds of a window: whole minutes, hours or days, such as "30m", "24h" or "7d". Raises BadMessage."""
    match = _WINDOW.fullmatch(value) if isinstance(value, str) else None
    seconds = 0 if match is None else int(match[1]) * _UNITS[match[2]]
    if not MIN_WINDOW_SECONDS <= seconds <= MAX_WINDOW_SECONDS:
        raise BadMessage(f'{member}: expected "1m" to "7d" in minutes, hours or days, such as "24h", got {str(value)[:60]!r}')
    return seconds


def elapsed_step(now: float, begin: int, end: int) -> int:
    """The step of a window at `now`, from 0 to PRICE_STEPS. Times are Unix seconds."""
    return max(0, min(PRICE_STEPS, int((now - begin) * PRICE_STEPS // max(1, end - begin))))


def price_limit(cap: int, cheapest: int, step: int) -> int:
    """The highest price of a line that begins in this step: the cheapest on offer at first, then more, and `cap` at last.

    Prices are base units per 1,000,000 tokens. The limit grows evenly until FULL_PRICE_STEP, and never exceeds `cap`.
    """
    low = min(cheapest, cap)
    return low + (cap - low) * min(step, FULL_PRICE_STEP) // FULL_PRICE_STEP
