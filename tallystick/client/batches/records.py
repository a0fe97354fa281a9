"""Files and batches as the gateway keeps them, and as OpenAI's API shows them. Pure.

Source: OpenAI's API reference, "Files" and "Batch".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final

from tallystick.protocol.types import Amount, format_amount

BATCH_INPUT: Final = "batch"
BATCH_OUTPUT: Final = "batch_output"
"""Purpose of the files that a batch writes. No caller may upload one."""
PURPOSES: Final = (BATCH_INPUT, "user_data")
"""Purposes of files that callers may upload. Nothing here reads `user_data`."""


class BatchStatus(StrEnum):
    """State of a batch: VALIDATING, then IN_PROGRESS or FAILED, then FINALIZING and an end. CANCELLING lets running lines end."""

    VALIDATING = "validating"
    FAILED = "failed"
    IN_PROGRESS = "in_progress"
    FINALIZING = "finalizing"
    COMPLETED = "completed"
    EXPIRED = "expired"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"


OPEN: Final = (BatchStatus.VALIDATING, BatchStatus.IN_PROGRESS, BatchStatus.FINALIZING, BatchStatus.CANCELLING)
"""States of batches that are not at their end."""
CANCELLABLE: Final = (BatchStatus.VALIDATING, BatchStatus.IN_PROGRESS)
STAMPS: Final = (
    "in_progress_at",
    "finalizing_at",
    "completed_at",
    "failed_at",
    "expired_at",
    "cancelling_at",
    "cancelled_at",
)
"""Times of a batch's states."""
_ASKED: Final = ("caller", "endpoint", "input_file", "window", "metadata", "options", "output_seconds")
"""What the creation of a batch says."""


class LineState(StrEnum):
    """State of a line: whether it waits or runs, was answered, or ended with an error."""

    PENDING = "pending"
    COMPLETED = "completed"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file of one caller. Times are Unix seconds; `bytes` is the size of its content."""

    id: str
    caller: str
    filename: str
    purpose: str
    bytes: int
    created_at: int
    expires_at: int

    def to_json(self) -> dict[str, Any]:
        """OpenAI's file object."""
        return {
            "id": self.id,
            "object": "file",
            "bytes": self.bytes,
            "created_at": self.created_at,
            "expires_at": self.expires_at,
            "filename": self.filename,
            "purpose": self.purpose,
            "status": "processed",
            "status_details": None,
        }


@dataclass(frozen=True, slots=True)
class LineError:
    """A fault of the input, at a line counted from 1; None for the whole file."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None

    def to_json(self) -> dict[str, Any]:
        """OpenAI's batch error object."""
        return {"code": self.code, "line": self.line, "message": self.message, "param": self.param}

    @classmethod
    def of(cls, raw: Mapping[str, Any]) -> LineError:
        """Reads what `to_json` wrote."""
        return cls(raw["code"], raw["message"], raw["line"], raw["param"])


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens as engines reported them."""

    input: int = 0
    cached: int = 0
    output: int = 0
    reasoning: int = 0

    def to_json(self) -> dict[str, Any]:
        """OpenAI's usage of a batch."""
        return {
            "input_tokens": self.input,
            "input_tokens_details": {"cached_tokens": self.cached},
            "output_tokens": self.output,
            "output_tokens_details": {"reasoning_tokens": self.reasoning},
            "total_tokens": self.input + self.output,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """A batch of one caller. Times are Unix seconds; `cost` is what its answers cost, in base units.

    `options`: the header X-Tally-Options of its creation. `waiting`: why lines wait now, for a person; empty if they do not.
    `output_seconds`: how long its output files are kept; None for as long as other files.
    """

    id: str
    caller: str
    endpoint: str
    input_file: str
    window: str
    status: BatchStatus
    created_at: int
    expires_at: int
    stamps: Mapping[str, int] = field(default_factory=dict)
    metadata: Mapping[str, str] | None = None
    options: str = "{}"
    model: str | None = None
    total: int = 0
    completed: int = 0
    failed: int = 0
    usage: Usage = field(default_factory=Usage)
    cost: Amount = Amount(0)
    errors: tuple[LineError, ...] = ()
    output_file: str | None = None
    error_file: str | None = None
    output_seconds: int | None = None
    waiting: str = ""

    def asks_the_same(self, other: Batch) -> bool:
        """Whether one request could have created both."""
        return all(getattr(self, name) == getattr(other, name) for name in _ASKED)

    def to_json(self) -> dict[str, Any]:
        """OpenAI's batch object, with the member `tally` beside OpenAI's."""
        stamps = {name: self.stamps.get(name) for name in STAMPS}
        errors = {"object": "list", "data": [error.to_json() for error in self.errors]} if self.errors else None
        return {
            "id": self.id,
            "object": "batch",
            "endpoint": self.endpoint,
            "model": self.model,
            "errors": errors,
            "input_file_id": self.input_file,
            "completion_window": self.window,
            "status": self.status.value,
            "output_file_id": self.output_file,
            "error_file_id": self.error_file,
            "created_at": self.created_at,
            "expires_at": self.expires_at,
            **stamps,
            "request_counts": {"total": self.total, "completed": self.completed, "failed": self.failed},
            "usage": self.usage.to_json(),
            "metadata": None if self.metadata is None else dict(self.metadata),
            "tally": {"cost": format_amount(self.cost), "waiting": self.waiting or None},
        }


@dataclass(frozen=True, slots=True)
class InputLine:
    """Where a request stands in the input file. `number` counts lines from 1; `attempt` counts its jobs from 0."""

    number: int
    offset: int
    length: int
    attempt: int = 0
