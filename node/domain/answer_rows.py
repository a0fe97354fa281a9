"""Collects the rows of evidence of one answer, and decides whether they may stand for it. Pure.

A row that is missing would shift all later ones, and an audit would accuse an honest provider. Engines do leave rows out:
llama.cpp for parts of a character, vLLM's and llama.cpp's parsers for tokens that mark reasoning or tool calls. So the rows end
before the first text that no row accounts for. Without such a gap, their number must fit what the engine counted. llama.cpp gives
the row of a character's last part the whole character as its text, so only that number shows the others. If it does not fit, the
rows end before the first character that may have several tokens: the first that is not ASCII.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from tallystick.protocol.errors import BadMessage
from tallystick.protocol.token_evidence import EvidenceBuilder
from tallystick.protocol.types import ZERO_HASH, Hash


class TokenReport(NamedTuple):
    """One position as an engine reports it: the token, the best tokens with natural log-probabilities, and the bytes of its text.

    `text` is None if the engine does not tell them.
    """

    token: int
    logprobs: Sequence[tuple[int, float]]
    text: bytes | None


class CommittedRows(NamedTuple):
    """The rows that a receipt commits to, packed, and their Merkle root. Without rows the root is zero."""

    packed: bytes = b""
    root: Hash = ZERO_HASH
    tokens: int = 0


NO_ROWS = CommittedRows()


class AnswerRows:
    """The rows of one answer so far. Call `add` for each part of it."""

    def __init__(self) -> None:
        self._builder = EvidenceBuilder()
        self._ended = self._has_gap = self._is_invalid = False
        self._has_marks = self._has_end_row = False
        self._sure: CommittedRows | None = None
        """The rows before the first text that is not ASCII."""

    def add(self, reports: Sequence[TokenReport], text: bytes, *, marks: bool) -> None:
        """Adds the tokens of a part with this text. `marks`: it has reasoning or tool calls, whose own marks are no text."""
        self._has_marks = self._has_marks or marks
        if self._ended:
            return
        known = b"".join(report.text or b"" for report in reports)
        if len(text) > len(known) and all(report.text is not None for report in reports):
            self._ended = self._has_gap = True
            reports = _before_gap(reports, text)
        try:
            for report in reports:
                if self._sure is None and report.text and not report.text.isascii():
                    self._sure = self._all()
                self._builder.add(report.token, report.logprobs)
            if reports:
                shown = reports[-1].text
                self._has_end_row = shown is not None and (not shown or not text.endswith(shown))
        except BadMessage:  # numbers that are no log-probabilities
            self._ended = self._is_invalid = True

    def give_up(self) -> None:
        """Notes that the engine's log-probabilities cannot be read."""
        self._ended = self._is_invalid = True

    def commit(self, counted: int | None, *, truncated: bool) -> CommittedRows:
        """The rows for the receipt. `counted`: output tokens by the engine.

        `truncated`: it ended at its limit, and so without the end token, whose row may be missing.
        """
        if self._is_invalid or not self._builder.count:
            return NO_ROWS
        if counted is None or self._has_gap:
            return NO_ROWS if self._has_marks else self._all()
        missing = counted - self._builder.count
        if missing == 0 or (missing == 1 and not truncated and not self._has_end_row):
            return self._all()
        return self._sure if missing > 0 and self._sure is not None and not self._has_marks else NO_ROWS

    def _all(self) -> CommittedRows:
        return CommittedRows(bytes(self._builder.packed), self._builder.root, self._builder.count)


def _before_gap(reports: Sequence[TokenReport], text: bytes) -> Sequence[TokenReport]:
    """The tokens before the first text that none of them accounts for."""
    at = 0
    for number, report in enumerate(reports):
        piece = report.text or b""
        if not text.startswith(piece, at):
            return reports[:number]
        at += len(piece)
    return reports
