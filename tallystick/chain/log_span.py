"""How many blocks one eth_getLogs may span at an endpoint, which is learned from its refusals. Pure.

Providers cap the range (10, 500, 2,000 or 10,000 blocks), the number of logs, or the size of the response. Many name the range
that would do: "limited to a 10,000 range", "this block range should work: [0x1, 0x7d0]".
"""

from __future__ import annotations

import re
from dataclasses import dataclass

UNLIMITED = 1 << 32
_PATIENCE, _PATIENCE_AFTER_NUMBER, _MAX_PATIENCE = 8, 512, 4_096
_NUMBER = r"(?<![\w.])(?:0x[0-9a-f]{1,16}|\d{1,3}(?:[,_' ]\d{3})+|\d{1,15}k?)(?!\w)"
_PAIR = re.compile(rf"({_NUMBER})\W{{1,6}}(?:to\W{{1,3}})?({_NUMBER})", re.IGNORECASE)
_LIMITS = re.compile(
    rf"({_NUMBER})\W{{0,3}}(?:blocks?|block.?range|range)\b"
    rf"|\b(?:max\w*|limit\w*|most|up to|exceed\w*|than|over|allowed|range|span)\b\D{{0,30}}?({_NUMBER})",
    re.IGNORECASE,
)


@dataclass
class LogSpan:
    """The widest range that is worth asking for. It shrinks on a refusal and doubles after enough accepted ranges of that width.

    A limit that the endpoint named as a number is tried again much later than one that was found by halving.
    """

    limit: int = UNLIMITED
    _accepted: int = 0
    _patience: int = _PATIENCE

    def refuse(self, first: int, last: int, message: str) -> int:
        """Records that a range was refused, with the endpoint's message. Returns the width to try instead, at least 1."""
        width = last - first + 1
        named = suggested_width(message, first, width)
        self.limit = max(1, width // 2 if named is None else named)
        self._patience = min(max(2 * self._patience, _PATIENCE if named is None else _PATIENCE_AFTER_NUMBER), _MAX_PATIENCE)
        self._accepted = 0
        return self.limit

    def accept(self, width: int) -> None:
        """Records that a range was answered."""
        if width < self.limit:
            return
        self._accepted += 1
        if self._accepted >= self._patience:
            self.limit, self._accepted = min(2 * self.limit, UNLIMITED), 0


def suggested_width(message: str, first: int, width: int) -> int | None:
    """The number of blocks that a refusal allows; None if it names none. `first` and `width` are the range that was refused.

    A number close to `width` is the refused range itself, as the endpoint counts it.
    """
    for match in _PAIR.finditer(message):
        low, high = _value(match[1]), _value(match[2])
        if low == first and 0 < high - low + 1 < width:
            return high - low + 1
    numbers = [_value(text) for match in _LIMITS.finditer(message) for text in match.groups() if text]
    return max((number for number in numbers if 0 < number <= width * 3 // 4), default=None)


def _value(text: str) -> int:
    digits = text.lower()
    if digits.startswith("0x"):
        return int(digits, 16)
    plain = re.sub(r"[^\dk]", "", digits)
    return int(plain[:-1]) * 1_000 if plain.endswith("k") else int(plain)
