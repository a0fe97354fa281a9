"""The coordinator's database tables, as the migrations create them."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

metadata = sa.MetaData()
_NUMBER = sa.BigInteger().with_variant(sa.Integer, "sqlite")
"""A row's number. SQLite stores the rows themselves in the order of an integer key."""
_ORDERED: dict[str, Any] = {"sqlite_with_rowid": False}
"""SQLite stores the rows in the order of the whole key, without a second tree."""
open_jobs = sa.Table(
    "open_jobs",
    metadata,
    sa.Column("number", _NUMBER, primary_key=True, autoincrement=False),
    sa.Column("job", sa.LargeBinary),
    sa.Column("doc", sa.LargeBinary),
    sa.Column("owner", sa.String(64)),
)
jobs = sa.Table(
    "jobs",
    metadata,
    sa.Column("number", _NUMBER, primary_key=True, autoincrement=False),
    sa.Column("job", sa.LargeBinary),
    sa.Column("state", sa.String(16)),
    sa.Column("created_at", sa.BigInteger),
    sa.Column("finished_at", sa.BigInteger),
    sa.Column("doc", sa.LargeBinary),
)
job_segments = sa.Table(
    "job_segments",
    metadata,
    sa.Column("segment", _NUMBER, primary_key=True, autoincrement=False),
    sa.Column("first", sa.BigInteger),
    sa.Column("newest_at", sa.BigInteger),
)
job_index = sa.Table(
    "job_index",
    metadata,
    sa.Column("segment", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("job", sa.LargeBinary, primary_key=True),
    sa.Column("number", sa.BigInteger),
    **_ORDERED,
)
tabs = sa.Table(
    "tabs",
    metadata,
    sa.Column("tab", _NUMBER, primary_key=True, autoincrement=False),
    sa.Column("provider", sa.String(42)),
    sa.Column("payer", sa.String(42)),
    sa.Column("total", sa.LargeBinary),
    sa.Column("seq", sa.BigInteger),
    sa.Column("number", sa.BigInteger),
)
tab_receipts = sa.Table(
    "tab_receipts",
    metadata,
    sa.Column("tab", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("total", sa.LargeBinary, primary_key=True),
    sa.Column("seq", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("number", sa.BigInteger, primary_key=True, autoincrement=False),
    **_ORDERED,
)
kept_receipts = sa.Table(
    "kept_receipts",
    metadata,
    sa.Column("tab", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("seq", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("total", sa.LargeBinary),
    sa.Column("doc", sa.LargeBinary),
    **_ORDERED,
)
claims = sa.Table(
    "claims",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("digest", sa.String(64), unique=True),
    sa.Column("provider", sa.String(42)),
    sa.Column("received_at", sa.BigInteger),
    sa.Column("claim_doc", sa.Text),
    sa.Column("tx", sa.String(66)),
)
settlements = sa.Table(
    "settlements",
    metadata,
    sa.Column("payer", sa.String(42), primary_key=True),
    sa.Column("provider", sa.String(42), primary_key=True),
    sa.Column("settled", sa.String(29)),
    sa.Column("tx", sa.String(66)),
    sa.Column("block", sa.BigInteger),
)
cursors = sa.Table(
    "cursors",
    metadata,
    sa.Column("name", sa.String(32), primary_key=True),
    sa.Column("block", sa.BigInteger),
    sa.Column("tip", sa.String(66)),
)
reputations = sa.Table(
    "reputations",
    metadata,
    sa.Column("provider", sa.String(42), primary_key=True),
    sa.Column("good", sa.Float),
    sa.Column("bad", sa.Float),
    sa.Column("jobs", sa.BigInteger),
)
match_log = sa.Table(
    "match_log",
    metadata,
    sa.Column("number", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True, autoincrement=False),
    sa.Column("at", sa.BigInteger),
    sa.Column("hashes", sa.LargeBinary),
    sa.Column("leaf", sa.LargeBinary),
)
decisions = sa.Table(
    "decisions",
    metadata,
    sa.Column("id", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True),
    sa.Column("count", sa.BigInteger),
    sa.Column("doc", sa.LargeBinary),
)
log_heads = sa.Table(
    "log_heads",
    metadata,
    sa.Column("size", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True, autoincrement=False),
    sa.Column("head_doc", sa.Text),
)
speeds = sa.Table(
    "speeds",
    metadata,
    sa.Column("provider", sa.String(42), primary_key=True),
    sa.Column("model", sa.Text, primary_key=True),
    sa.Column("first_token_ms", sa.Float(53)),
    sa.Column("token_us", sa.Float(53)),
    sa.Column("output_tokens", sa.Float(53)),
    sa.Column("first_tokens", sa.BigInteger),
    sa.Column("outputs", sa.BigInteger),
)
responses = sa.Table(
    "responses",
    metadata,
    sa.Column("number", _NUMBER, primary_key=True),
    sa.Column("job", sa.LargeBinary),
    sa.Column("fingerprint", sa.LargeBinary),
    sa.Column("payer", sa.String(42)),
    sa.Column("ended_at", sa.BigInteger),
    sa.Column("size", sa.BigInteger),
    sa.Column("frames", sa.LargeBinary),
)
audit_reports = sa.Table(
    "audit_reports",
    metadata,
    sa.Column("job", sa.LargeBinary, primary_key=True),
    sa.Column("provider", sa.String(42), primary_key=True),
    sa.Column("convicts", sa.Boolean, primary_key=True),
    sa.Column("payer", sa.String(42)),
    sa.Column("model", sa.Text),
    sa.Column("precision", sa.String(32)),
    sa.Column("at", sa.BigInteger),
    sa.Column("leaf", sa.BigInteger),
    sa.Column("report_hash", sa.LargeBinary),
    sa.Column("leaf_hash", sa.LargeBinary),
    sa.Column("praises", sa.Boolean),
    sa.Column("effect", sa.BigInteger),
)
integrity = sa.Table(
    "integrity",
    metadata,
    sa.Column("provider", sa.String(42), primary_key=True),
    sa.Column("model", sa.Text, primary_key=True),
    sa.Column("precision", sa.String(32), primary_key=True),
    sa.Column("passes", sa.Float(53)),
    sa.Column("failures", sa.Float(53)),
    sa.Column("audits", sa.BigInteger),
    sa.Column("probe_failures", sa.BigInteger),
    sa.Column("leaf", sa.BigInteger),
)
replicas = sa.Table(
    "replicas",
    metadata,
    sa.Column("id", sa.String(64), primary_key=True),
    sa.Column("url", sa.Text),
    sa.Column("beat_at", sa.Float(53)),
    sa.Column("ready", sa.Boolean),
)
"""The coordinator's replicas. `beat_at`: Unix seconds of the database's clock; `ready`: whether clients may use it."""
placed_jobs = sa.Table(
    "placed_jobs",
    metadata,
    sa.Column("job", sa.LargeBinary, primary_key=True),
    sa.Column("owner", sa.String(64)),
    sa.Column("placed_at", sa.BigInteger),
    sa.Column("number", sa.BigInteger),
)
"""The jobs of replicas. `owner`: the replica's id; `number`: of the row in `jobs`, NULL while the job is open."""
log_tail = sa.Table(
    "log_tail",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("size", sa.BigInteger),
    sa.Column("edge", sa.LargeBinary),
    sa.Column("last_at", sa.BigInteger),
)
"""The end of the match log, one row, which replicas lock to append leaves. `edge`: the roots of its complete subtrees."""
wallet_sessions = sa.Table(
    "wallet_sessions",
    metadata,
    sa.Column("nonce", sa.String(128), primary_key=True),
    sa.Column("digest", sa.LargeBinary),
    sa.Column("account", sa.String(42)),
    sa.Column("origin", sa.Text),
    sa.Column("opened_at", sa.Float(53)),
    sa.Column("until", sa.Float(53)),
)
"""Sign-ins with a wallet, by the nonce that each used. `digest`: of the session's secret value, NULL once it was closed."""
