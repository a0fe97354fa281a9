"""Kills, pauses and starves the processes of a real market at named phases of a job, while clients ask without a break.

Once everything is back after a schedule: no acknowledged answer is lost, no job is charged twice or stays without an end, and
both ledgers, the coordinator's receipts, the match log and the chain tell the same story. The exit status is 1 otherwise.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from scripts.faults.clients import Clients
from scripts.faults.full_disk import NoSmallDisk, SmallDisk
from scripts.faults.invariants import check
from scripts.faults.packet_loss import NoNamespace, enter_namespace
from scripts.faults.postgres import NoPostgres
from scripts.faults.report import Report, Violation
from scripts.faults.schedule import FAULTS_A_SEED, Fault, Process, schedule
from scripts.faults.site import NotReady, Site, open_site
from scripts.faults.strikes import PhaseMissing, Striker
from tallystick.cli.output import note
from tallystick.cli.progress import activity

DISK_MIB = 64
DATABASES = ("sqlite", "postgres", "replicas")
"""The coordinator's database; the last is PostgreSQL for three replicas, with NATS between them."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What to run."""

    seeds: Sequence[int]
    databases: Sequence[str]
    faults: Sequence[Fault]
    only: str = ""
    keep: Path | None = None

    def repeat(self, seed: int, database: str) -> str:
        """The command that runs one schedule again."""
        only = f" --only '{self.only}'" if self.only else ""
        faults = "".join(f" --fault '{fault.value}'" for fault in self.faults) if list(self.faults) != list(Fault) else ""
        return f"scripts/chaos --seeds 1 --first-seed {seed} --database {database}{only}{faults}"


def main() -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(prog="scripts/chaos", description=__doc__)
    parser.add_argument(
        "--seeds", type=int, default=1, metavar="N", help=f"schedules per database, of {FAULTS_A_SEED} faults each"
    )
    parser.add_argument("--first-seed", type=int, default=0, metavar="N", help="the first of them; default 0")
    parser.add_argument("--only", default="", metavar="PROCESS/PHASE", help="faults of this process, this phase, or both")
    parser.add_argument("--fault", action="append", type=Fault, choices=list(Fault), metavar="FAULT", help=_list_faults())
    parser.add_argument(
        "--database",
        choices=DATABASES,
        help="the coordinator's database, or three replicas on PostgreSQL and NATS; default: each",
    )
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep databases and logs in this new folder")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    options = parser.parse_args()
    plan = Plan(
        range(options.first_seed, options.first_seed + options.seeds),
        (options.database,) if options.database else DATABASES,
        options.fault or list(Fault),
        options.only,
        options.keep,
    )
    try:
        schedule(plan.seeds[0], list(Process), plan.faults, plan.only)
    except (ValueError, IndexError) as error:
        parser.error(str(error) if isinstance(error, ValueError) else f"--seeds: expected at least 1, got {options.seeds}")
    report = asyncio.run(_run_until_stopped(plan))
    if options.json:
        print(json.dumps(report.to_json(), indent=2))
    else:
        report.show()
    return bool(report.violations) or not report.struck


def _list_faults() -> str:
    return f"faults of this kind, out of {', '.join(fault.value for fault in Fault)}; may be repeated; default: all"


async def _run_until_stopped(plan: Plan) -> Report:
    """As `run`, and ends everything that it started if it gets SIGTERM."""
    running = asyncio.ensure_future(run(plan))
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, running.cancel)
    return await running


async def run(plan: Plan) -> Report:
    """Runs all schedules. Raises ValueError if `only` matches nothing."""
    report, faults = Report(), list(plan.faults)
    with tempfile.TemporaryDirectory(prefix="tallystick-chaos-") as temporary:
        folder = plan.keep or Path(temporary)
        if Fault.FULL_DISK in faults and (reason := _no_disk(folder)):
            report.skipped.append(f"full disk: {reason}")
            faults.remove(Fault.FULL_DISK)
        if Fault.PACKET_LOSS in faults:
            try:
                enter_namespace()
            except NoNamespace as error:
                report.skipped.append(f"packet loss: {error}")
                faults.remove(Fault.PACKET_LOSS)
        for database in plan.databases:
            try:
                await _run_database(plan, faults, database, folder / database, report)
            except NoPostgres as error:
                report.skipped.append(f"PostgreSQL: {error}")
    return report


def _no_disk(folder: Path) -> str:
    """Why a small file system cannot be had; empty if it can."""
    probe = folder / "probe"
    probe.mkdir(parents=True)
    try:
        SmallDisk(probe, 1).close()
    except NoSmallDisk as error:
        return str(error)
    finally:
        probe.rmdir()
    return ""


async def _run_database(plan: Plan, faults: Sequence[Fault], database: str, folder: Path, report: Report) -> None:
    disk_mib = DISK_MIB if Fault.FULL_DISK in faults else 0
    with activity(f"starting a market, database {database}"):
        site = await open_site(
            folder,
            on_postgres=database == "postgres",
            replicas=database == "replicas",
            disk_mib=disk_mib,
            loses_packets=Fault.PACKET_LOSS in faults,
        )
    try:
        for seed in plan.seeds:
            violations = await _run_seed(site, seed, faults, plan.only, report)
            for text in violations:
                note(f"seed {seed}, {database}: VIOLATION: {text}")
            report.violations += [Violation(seed, database, text, plan.repeat(seed, database)) for text in violations]
            if violations:  # what is broken stays broken, so the next seed would report it again
                break
    finally:
        await site.stop()


async def _run_seed(site: Site, seed: int, faults: Sequence[Fault], only: str, report: Report) -> list[str]:
    """Runs one schedule, and returns what does not hold after it."""
    absent = {process for process in (Process.POSTGRES, Process.NATS) if process.value not in site.processes}
    processes = [process for process in Process if process not in absent]
    impossible = [(Process.COORDINATOR, Fault.FULL_DISK)] if site.on_postgres else []
    alone = [process for process in (Process.GATEWAY, Process.NODE) if process.value not in site.partitioned]
    impossible += [
        (process, fault) for process in alone for fault in (Fault.PARTITION, Fault.PACKET_LOSS, Fault.RESET, Fault.CRASH)
    ]
    entries = schedule(seed, processes, faults, only, impossible)
    clients = Clients(site, f"seed-{seed}", random.Random(f"clients {seed}"))
    striker = Striker(site, clients, random.Random(f"strikes {seed}"))
    starts = {name: process.starts for name, process in site.processes.items()}
    clients.start()
    kills: list[str] = []
    try:
        for number, entry in enumerate(entries, 1):
            text = f"seed {seed}, fault {number} of {len(entries)}: {entry.fault.value}, {entry.phase.value}"
            with activity(text):
                struck = await striker.strike(entry)
            report.struck.append(struck)
            if entry.fault in {Fault.KILL, Fault.CRASH} and struck.name != "rpc":
                kills.append(struck.name)
            note(f"seed {seed}: {entry.fault.value} {struck.name}, {entry.phase.value}: {struck.outage:.1f} s")
        with activity(f"seed {seed}: checking what holds after the faults"):
            await clients.stop()
            findings = await check(site, clients)
        violations = findings.violations
        report.not_kept += findings.not_kept
        report.unreleased = findings.unreleased
    except (PhaseMissing, NotReady) as error:
        violations = [str(error)]
    finally:
        site.watch.disarm()
        await clients.cancel()
    report.answers += sum(request.answer is not None for request in clients.requests)
    report.refusals += [request.refusal for request in clients.requests if request.refusal]
    for name, before in starts.items():
        own = site.processes[name].starts - before - kills.count(name)
        if own:
            report.exits[name] = report.exits.get(name, 0) + own
    return violations


if __name__ == "__main__":
    sys.exit(main())
