"""The rows of files and batches in the database, and what they mean. Pure."""

from __future__ import annotations

from typing import Any

from tallystick.client.batches.records import Batch, BatchStatus, LineError, StoredFile, Usage
from tallystick.protocol.types import Amount


def file_row(file: StoredFile) -> dict[str, Any]:
    """The row of a file."""
    return {name: getattr(file, name) for name in StoredFile.__dataclass_fields__}


def read_file(row: Any) -> StoredFile:
    """The file of a row."""
    return StoredFile(row.id, row.caller, row.filename, row.purpose, row.bytes, row.created_at, row.expires_at)


_PLAIN = (
    "id",
    "caller",
    "endpoint",
    "input_file",
    "window",
    "created_at",
    "expires_at",
    "metadata",
    "options",
    "model",
    "total",
    "completed",
    "failed",
    "output_file",
    "error_file",
    "output_seconds",
)
"""Columns of a batch that are members of its record, unchanged."""


def batch_row(batch: Batch) -> dict[str, Any]:
    """The row of a batch."""
    usage = batch.usage
    return {name: getattr(batch, name) for name in _PLAIN} | {
        "status": batch.status.value,
        "stamps": dict(batch.stamps),
        "input_tokens": usage.input,
        "cached_tokens": usage.cached,
        "output_tokens": usage.output,
        "reasoning_tokens": usage.reasoning,
        "cost": int(batch.cost),
        "errors": [error.to_json() for error in batch.errors],
    }


def read_batch(row: Any) -> Batch:
    """The batch of a row."""
    values = row._mapping  # noqa: SLF001 - SQLAlchemy's public name for it
    return Batch(
        **{name: values[name] for name in _PLAIN},
        status=BatchStatus(row.status),
        stamps=row.stamps,
        usage=Usage(row.input_tokens, row.cached_tokens, row.output_tokens, row.reasoning_tokens),
        cost=Amount(row.cost),
        errors=tuple(LineError.of(error) for error in row.errors),
    )
