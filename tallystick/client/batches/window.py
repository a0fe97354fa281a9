"""The time in which a batch is to be done: `completion_window`. Pure."""

from __future__ import annotations

import re
from typing import Final

from tallystick.protocol.errors import BadMessage

MIN_WINDOW_SECONDS: Final = 60
MAX_WINDOW_SECONDS: Final = 7 * 86_400
_WINDOW = re.compile(r"([1-9][0-9]{0,4})([mhd])")
_UNITS: Final = {"m": 60, "h": 3_600, "d": 86_400}


def read_window(value: object, member: str = "completion_window") -> int:
    """The seconds of a window: whole minutes, hours or days, such as "30m", "24h" or "7d". Raises BadMessage."""
    match = _WINDOW.fullmatch(value) if isinstance(value, str) else None
    seconds = 0 if match is None else int(match[1]) * _UNITS[match[2]]
    if not MIN_WINDOW_SECONDS <= seconds <= MAX_WINDOW_SECONDS:
        raise BadMessage(f'{member}: expected "1m" to "7d" in minutes, hours or days, such as "24h", got {str(value)[:60]!r}')
    return seconds
