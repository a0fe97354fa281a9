"""Faults at named phases of real jobs, with real processes: `scripts/chaos`, whose report is checked here.

By default it kills 63 times in all. TALLYSTICK_CHAOS_SEEDS sets the number of schedules per database, TALLYSTICK_CHAOS_SEED the
first of them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FIRST = int(os.environ.get("TALLYSTICK_CHAOS_SEED", "0"))
SCHEDULES = {
    database: int(os.environ.get("TALLYSTICK_CHAOS_SEEDS", seeds))
    for database, seeds in (("sqlite", 3), ("postgres", 2), ("replicas", 2))
}
POSTGRES = bool(os.environ.get("TALLYSTICK_TEST_POSTGRES"))


@pytest.mark.timeout(1_800)
@pytest.mark.parametrize(
    ("only", "fault", "says"),
    [("last chunk", "reset", "the end of an answer is sent again"), ("node/last chunk", "crash", "receipts voided")],
)
def test_last_chunks_that_are_lost(tmp_path: Path, only: str, fault: str, says: str) -> None:
    """The payer pays what the provider charges, and the coordinator knows of it: the node sends the end of the answer again, or
    does not charge for it if it was killed.
    """
    command = [sys.executable, "-m", "scripts.faults", "--json", "--database", "sqlite", "--keep", str(tmp_path / "chaos")]
    command += ["--only", only, "--fault", fault]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout, done.stderr[-4_000:]
    report = json.loads(done.stdout)
    assert report["violations"] == [], done.stderr[-4_000:]
    assert sum(report["other_faults"][fault]["last chunk"].values()) >= 12
    logs = [log.read_text() for log in (tmp_path / "chaos").rglob("node-*.log")]
    assert any(says in log for log in logs)
    assert not any("the coordinator refused a receipt" in log for log in logs)


@pytest.mark.timeout(3_600 + 600 * max(SCHEDULES.values()))
@pytest.mark.parametrize("database", SCHEDULES)
def test_kills_at_every_phase(tmp_path: Path, database: str) -> None:
    """After kills and other faults, nothing acknowledged is lost, nothing is charged twice, and all books agree."""
    if database != "sqlite" and not POSTGRES:
        pytest.skip("PostgreSQL tests need TALLYSTICK_TEST_POSTGRES; run them with scripts/with-postgres")
    command = [sys.executable, "-m", "scripts.faults", "--json", "--database", database, "--keep", str(tmp_path / "chaos")]
    command += ["--seeds", str(SCHEDULES[database]), "--first-seed", str(FIRST)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout, done.stderr[-4_000:]
    report = json.loads(done.stdout)
    assert report["violations"] == [], done.stderr[-4_000:]
    assert done.returncode == 0
    assert report["kills_total"] >= 9 * SCHEDULES[database]
    assert report["answers"] > 0
    assert all(line.startswith(("full disk", "packet loss")) for line in report["skipped"]), report["skipped"]
    assert {"kills", "longest_outage_s", "other_faults", "answers_whole_but_not_kept"} <= report.keys()
