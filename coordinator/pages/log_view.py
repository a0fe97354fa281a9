"""What the page of the match log shows of leaves. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tallystick.protocol.errors import BadMessage
from tallystick.protocol.log_leaves import ReportLeaf, RestartLeaf
from tallystick.protocol.match_log import MatchLeaf, load_leaf


@dataclass(frozen=True, slots=True)
class LogRow:
    """One leaf. `kind`: match, report or restart, or deleted once its contents were; `age`: seconds."""

    index: int
    kind: str
    age: float | None = None
    model: str = ""
    provider: str = ""
    text: str = ""


def rows_of(entries: Iterable[Mapping[str, Any]], now: float) -> list[LogRow]:
    """Returns the rows of entries of /v1/log/entries, newest first. `now`: Unix seconds."""
    return [_row(entry["index"], entry["leaf"], now) for entry in entries][::-1]


def _row(index: int, leaf: str | None, now: float) -> LogRow:
    if leaf is None:
        return LogRow(index, "deleted", text="its contents were deleted after their time; its hash stays")
    try:
        read = load_leaf(bytes.fromhex(leaf))
    except BadMessage as error:
        return LogRow(index, "unknown", text=str(error))
    age = max(0.0, now - read.at)
    if isinstance(read, RestartLeaf):
        return LogRow(index, "restart", age, text="a process of this coordinator began")
    if isinstance(read, ReportLeaf):
        verdict = "an audit by the coordinator" if read.is_probe else "an audit by a payer"
        return LogRow(index, "report", age, read.model, read.provider, verdict)
    return _match_row(index, read, age)


def _match_row(index: int, leaf: MatchLeaf, age: float) -> LogRow:
    others = len(leaf.considered) - 1
    how = "ranked by cost" if leaf.ranked else "in the client's order"
    attempt = "" if not leaf.attempt else f"attempt {leaf.attempt + 1}; "
    return LogRow(index, "match", age, leaf.model, leaf.chosen.provider, f"{attempt}{how}, {others} other candidates")
