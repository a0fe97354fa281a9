"""The tables of a wallet's files and batches, which migrations/ creates. Contents are in sealed files beside them."""

from __future__ import annotations

import sqlalchemy as sa

metadata = sa.MetaData()

files = sa.Table(
    "files",
    metadata,
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("id", sa.String(48)),
    sa.Column("caller", sa.Text),
    sa.Column("filename", sa.Text),
    sa.Column("purpose", sa.String(32)),
    sa.Column("bytes", sa.BigInteger),
    sa.Column("created_at", sa.BigInteger),
    sa.Column("expires_at", sa.BigInteger),
)
batches = sa.Table(
    "batches",
    metadata,
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("id", sa.String(48)),
    sa.Column("caller", sa.Text),
    sa.Column("create_key", sa.Text),
    sa.Column("endpoint", sa.Text),
    sa.Column("input_file", sa.String(48)),
    sa.Column("window", sa.String(8)),
    sa.Column("status", sa.String(16)),
    sa.Column("created_at", sa.BigInteger),
    sa.Column("expires_at", sa.BigInteger),
    sa.Column("stamps", sa.JSON),
    sa.Column("metadata", sa.JSON),
    sa.Column("options", sa.Text),
    sa.Column("model", sa.Text),
    sa.Column("total", sa.Integer),
    sa.Column("completed", sa.Integer),
    sa.Column("failed", sa.Integer),
    sa.Column("input_tokens", sa.BigInteger),
    sa.Column("cached_tokens", sa.BigInteger),
    sa.Column("output_tokens", sa.BigInteger),
    sa.Column("reasoning_tokens", sa.BigInteger),
    sa.Column("cost", sa.BigInteger),
    sa.Column("errors", sa.JSON),
    sa.Column("output_file", sa.String(48)),
    sa.Column("error_file", sa.String(48)),
    sa.Column("output_seconds", sa.BigInteger),
    sa.Column("result_bytes", sa.BigInteger),
)
"""`create_key`: the Idempotency-Key of its creation. `result_bytes`: of its lines' results, until they are in its files."""
lines = sa.Table(
    "lines",
    metadata,
    sa.Column("batch", sa.Integer, primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("offset", sa.BigInteger),
    sa.Column("length", sa.BigInteger),
    sa.Column("state", sa.String(16)),
    sa.Column("attempt", sa.Integer),
    sa.Column("result", sa.LargeBinary),
)
"""Lines of batches that are not at their end. `result`: the sealed line of the output or error file."""
