"""The two forms of a coordinator's database: a lone coordinator's, and that of replicas on PostgreSQL.

| | lone | replicas |
|---|---|---|
| an ended job by its id | `job_segments` and `job_index`, and the newest ids in memory | `placed_jobs` |
| a replay | ids in memory | the key of `placed_jobs` |
| the end of the match log | memory | `log_tail` |

`log_tail` has a row in the form of replicas alone. The first process of the other kind converts the database when it starts; the
lock of the database keeps the kinds apart. That takes a time that grows with the number of stored jobs, and loses nothing.
"""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy import Connection

from coordinator.storage.schema import log_tail, match_log
from tallystick.protocol.merkle import HASH_SIZE, Edge, rows

FORM_LOCK = 0x7A17
"""The advisory lock of a conversion: replicas that start together wait for the one that converts."""
FORMER_OWNER = "lone"
"""The owner of the jobs that a lone coordinator left. No replica has this id."""


_TO_REPLICAS = (
    """INSERT INTO placed_jobs (job, owner, placed_at, number)
       SELECT DISTINCT ON (job) job, $1::text, created_at, number FROM jobs ORDER BY job, number DESC ON CONFLICT DO NOTHING""",
    """INSERT INTO placed_jobs (job, owner, placed_at)
       SELECT DISTINCT job, $1::text, 0 FROM open_jobs ON CONFLICT DO NOTHING""",
    "UPDATE open_jobs SET owner = $1::text",
    "DELETE FROM job_index",
    "DELETE FROM job_segments",
    """SELECT setval('job_numbers', GREATEST(
         1, (SELECT max(number) FROM jobs), (SELECT max(number) FROM open_jobs), (SELECT max(tab) FROM tabs)))""",
)
_TO_LONE = (
    """INSERT INTO job_index (segment, job, number)
       SELECT max(number) OVER (PARTITION BY part), job, number FROM
         (SELECT job, number, (row_number() OVER (ORDER BY number) - 1) / $1::bigint AS part
          FROM placed_jobs WHERE number IS NOT NULL) AS ended""",
    """INSERT INTO job_segments (segment, first, newest_at)
       SELECT segment, min(job_index.number), max(COALESCE(jobs.finished_at, jobs.created_at, 0))
       FROM job_index LEFT JOIN jobs ON jobs.number = job_index.number GROUP BY segment""",
    "UPDATE open_jobs SET owner = NULL",
    "DELETE FROM placed_jobs",
    "DELETE FROM log_tail",
)


def to_replicas(connection: Connection) -> None:
    """Brings the database into the form of replicas, if it is not in that."""
    connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({FORM_LOCK})")
    if connection.execute(sa.select(log_tail.c.id)).first() is not None:
        return
    for statement in _TO_REPLICAS:
        connection.exec_driver_sql(statement, (FORMER_OWNER,) if "$1" in statement else None)
    edge, last_at = _read_edge(connection)
    connection.execute(sa.insert(log_tail), {"id": 1, "size": edge.size, "edge": b"".join(edge.roots), "last_at": last_at})


def _read_edge(connection: Connection) -> tuple[Edge, int]:
    """Reads the end of the match log, and the time of its last leaf."""
    newest = sa.select(match_log.c.number, match_log.c.at).order_by(match_log.c.number.desc()).limit(1)
    last = connection.execute(newest).one_or_none()
    if last is None:
        return Edge(), 0
    size, at = last.number + 1, last.at
    needed = sa.select(match_log.c.number, match_log.c.hashes).where(match_log.c.number.in_(sorted(rows([(0, size)]))))
    hashes = {number: bytes(stored) for number, stored in connection.execute(needed)}
    return Edge.load(size, lambda row, level: hashes[row][HASH_SIZE * level : HASH_SIZE * (level + 1)]), at


def to_lone(connection: Connection, segment_jobs: int) -> None:
    """Brings the database into the form of a lone coordinator, if it is not in that."""
    if connection.execute(sa.select(log_tail.c.id)).first() is None:
        return
    for statement in _TO_LONE:
        connection.exec_driver_sql(statement, (segment_jobs,) if "$1" in statement else None)
