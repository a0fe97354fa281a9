"""`tally log`: the coordinator's match log. Reads and replays it, and judges evidence files."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tallystick.cli.options import DEFAULT_WALLET, Config, CoordinatorUrl, Json, Wallet
from tallystick.cli.output import counted, out, show_json, show_table
from tallystick.cli.progress import Activity, activity
from tallystick.protocol.errors import BadMessage, Fault

if TYPE_CHECKING:
    from coordinator.domain.log_check import Fault as LogFault
    from coordinator.domain.log_check import LogReplay
    from tallystick.client.coordinator.http_client import CoordinatorClient
    from tallystick.protocol.eip712 import Signed, Verified
    from tallystick.protocol.messages import LogHead, ReportAck

app = typer.Typer(no_args_is_help=True, help="Read and verify the coordinator's log of all matches.")
SHOWN_FAULTS = 100
MAX_MODELS = 1_000
"""Models whose current asks are compared with the log."""


@app.command("head")
def head(config: Config = None, coordinator_url: CoordinatorUrl = None, as_json: Json = False) -> None:
    """Show the newest signed head of the match log, after checking its signature."""
    verified = asyncio.run(_with_coordinator(config, coordinator_url, _head)).message
    if as_json:
        show_json(verified.to_json())
        return
    show_table(("leaves", "signed at", "root"), [(verified.size, _time(verified.signed_at), verified.root.hex())])


@app.command("show")
def show(
    index: Annotated[int, typer.Argument(min=0, metavar="NUMBER", help="Number of the leaf, from 0.")],
    config: Config = None,
    coordinator_url: CoordinatorUrl = None,
    as_json: Json = False,
) -> None:
    """Show one leaf of the match log, after checking that the newest signed head contains it."""
    from tallystick.protocol.audit_reports import AuditVerdict
    from tallystick.protocol.log_facts import INTEGRITY_STEPS
    from tallystick.protocol.log_leaves import WEIGHT_ONE, ReportLeaf
    from tallystick.protocol.match_log import MatchLeaf

    async def read(client: CoordinatorClient) -> dict[str, Any]:
        return await _proven_leaf(client, index)

    answer = asyncio.run(_with_coordinator(config, coordinator_url, read))
    leaf = answer["leaf"]
    if as_json:
        show_json({"index": index, "hash": answer["hash"], "leaf": None if leaf is None else leaf.to_json()})
        return
    if leaf is None:
        out.print(f"leaf {index}: the coordinator keeps its hash alone, {answer['hash']}", highlight=False)
    elif isinstance(leaf, ReportLeaf):
        verdict = AuditVerdict(leaf.verdict).name.lower() if leaf.verdict in tuple(AuditVerdict) else str(leaf.verdict)
        who = "the coordinator" if leaf.is_probe else "a payer"
        text = f"leaf {index}: {who} audited a job of {leaf.provider}, {leaf.model} {leaf.precision}: {verdict}"
        out.print(f"{text}, weight {leaf.weight / WEIGHT_ONE:g}, {_time(leaf.at)}", highlight=False)
    elif not isinstance(leaf, MatchLeaf):
        out.print(f"leaf {index}: the coordinator started at {_time(leaf.at)}", highlight=False)
    else:
        text = f"leaf {index}: {leaf.model}, {_time(leaf.at)}, job {leaf.job.hex()}, attempt {leaf.attempt}"
        out.print(text, highlight=False)
        rows = [
            (
                entry.provider,
                entry.outcome.value,
                "" if entry.facts is None else f"{entry.facts.score:.2f}",
                "" if entry.facts is None else f"{entry.facts.integrity / INTEGRITY_STEPS:.3f} ({entry.facts.audits})",
            )
            for entry in leaf.considered
        ]
        show_table(("provider", "outcome", "reputation", "integrity (audits)"), rows)


@app.command("verify")
def verify(
    file: Annotated[Path | None, typer.Argument(metavar="[FILE]", help="Evidence to judge, without any network.")] = None,
    config: Config = None,
    wallet: Wallet = DEFAULT_WALLET,
    coordinator_url: CoordinatorUrl = None,
    as_json: Json = False,
) -> None:
    """Replay the whole match log and name each decision that broke the coordinator's own rule; or judge an evidence FILE.

    The replay counts the reports of audits as the coordinator must, and looks for those that it promised this wallet to log.
    Exit code 1 if anything is wrong with the log, or if the file proves nothing to others.
    """
    if file is not None:
        _judge(file, as_json)
        return

    async def read(client: CoordinatorClient) -> tuple[LogReplay, list[LogFault], int]:
        promises = await _promises(config, wallet)
        with activity("replaying the match log") as shown:
            return await _replay(client, promises, shown)

    replay, faults, size = asyncio.run(_with_coordinator(config, coordinator_url, read))
    if as_json:
        shown = [{"index": fault.index, "fault": fault.text} for fault in faults]
        counts = {"matches": replay.matches, "reports": replay.reports, "promises": len(replay.promises)}
        counts |= {"restarts": replay.restarts, "forgotten": replay.forgotten}
        show_json({"size": size, "faults": shown} | counts)
    else:
        if faults:
            show_table(("leaf", "fault"), [(fault.index, fault.text) for fault in faults])
        text = (
            f"the signed head covers {size} leaves: {replay.matches} matches and "
            f"{counted(replay.reports, 'report')} of audits replayed, {counted(len(replay.promises), 'report')} of this wallet, "
            f"{counted(replay.restarts, 'start')} of the coordinator, "
            f"{replay.forgotten} of which only the hash is kept"
        )
        out.print(text, highlight=False)
        out.print("no decision broke the rule" if not faults else counted(len(faults), "fault"), highlight=False)
    if faults:
        raise typer.Exit(1)


def _judge(file: Path, as_json: bool) -> None:
    from tallystick.protocol.log_evidence import LogEvidence, judge

    judgement = judge(LogEvidence.loads(file.read_bytes()))
    if as_json:
        show_json({"proven": judgement.proven, "finding": judgement.text})
    else:
        out.print(f"{'proven' if judgement.proven else 'not proven to others'}: {judgement.text}", highlight=False)
    if not judgement.proven:
        raise typer.Exit(1)


async def _with_coordinator(config: Path | None, url: str | None, read: Any) -> Any:
    from tallystick.client.config import load_config
    from tallystick.client.coordinator.http_client import CoordinatorClient

    loaded = load_config(config, {"coordinator": url})
    async with CoordinatorClient(loaded.coordinator, loaded) as client:
        return await read(client)


async def _head(client: CoordinatorClient) -> Verified[LogHead]:
    info = await client.info()
    head = (await client.log_head()).verify(info.domain)
    if head.message.coordinator != info.coordinator:
        raise BadMessage(f"head.coordinator: expected {info.coordinator}, got another account", fault=Fault.COORDINATOR)
    return head


async def _proven_leaf(client: CoordinatorClient, index: int) -> dict[str, Any]:
    from tallystick.protocol.eip712 import read_signed
    from tallystick.protocol.json_members import read_members
    from tallystick.protocol.log_evidence import LogEntry
    from tallystick.protocol.log_monitor import LogQuestion
    from tallystick.protocol.match_log import load_leaf
    from tallystick.protocol.merkle import includes
    from tallystick.protocol.messages import LogHead

    info = await client.info()
    raw = await client.log_proof(LogQuestion((), (index,)))
    signed, inclusion = read_members(raw, "proof", "head", "inclusion")
    head = read_signed(LogHead, signed, "proof.head").verify(info.domain).message
    if index >= head.size:
        raise BadMessage(f"NUMBER: expected a leaf below {head.size}, the size of the log, got {index}", fault=Fault.CLIENT)
    entry = LogEntry.from_json(inclusion.get(str(index)), "proof.inclusion")
    if not includes(head.root, head.size, index, entry.hash, entry.path):
        raise BadMessage(f"leaf {index}: the signed head does not contain it", fault=Fault.COORDINATOR)
    return {"hash": entry.hash.hex(), "leaf": None if entry.leaf is None else load_leaf(entry.leaf)}


async def _promises(config: Path | None, wallet: str) -> list[Signed[ReportAck]]:
    """What coordinators promised to log of this wallet's reports; nothing without a wallet or audits."""
    from tallystick.cli.onchain import parse_account
    from tallystick.client.audits.store import AuditStore
    from tallystick.client.config import load_config
    from tallystick.runtime.keystore import keystore_path

    if wallet == DEFAULT_WALLET and not keystore_path(wallet).exists():
        return []
    path = load_config(config).audits_path(parse_account(wallet, "--wallet"))
    if not path.exists():
        return []
    store = await AuditStore.open(path)
    try:
        return await store.promises()
    finally:
        await store.close()


async def _replay(
    client: CoordinatorClient, promises: Iterable[Signed[ReportAck]] = (), shown: Activity | None = None
) -> tuple[LogReplay, list[LogFault], int]:
    from coordinator.domain.log_check import Fault as LogFault
    from coordinator.domain.log_check import LogReplay

    shown = shown or Activity()
    info, head = await client.info(), (await _head(client)).message
    own = {promise.message.index: promise.message for promise in promises if promise.message.coordinator == info.coordinator}
    replay, faults = LogReplay(promises=own), list[LogFault]()
    while replay.edge.size < head.size:
        start = replay.edge.size
        for digest, data in _entries(await client.log_entries(start), start):
            if replay.edge.size < head.size:
                faults += replay.add(digest, data)
        shown.update(done=replay.edge.size, total=head.size)
        if replay.edge.size == start:
            raise BadMessage(f"entries: expected leaf {start} of {head.size}, got none", fault=Fault.COORDINATOR)
    if replay.edge.root() != head.root:
        faults.append(LogFault(head.size - 1, "the leaves do not have the root that the coordinator signed"))
    faults += replay.check_missing(head)
    models = sorted(replay.models)[:MAX_MODELS]
    for number, model in enumerate(models):
        shown.update("checking the asks of each model", done=number, total=len(models))
        for ask in await client.asks(model):
            faults += replay.check_ask(ask.verify(info.domain))
    return replay, faults[:SHOWN_FAULTS], head.size


def _entries(raw: object, start: int) -> Iterator[tuple[Any, bytes | None]]:
    from tallystick.protocol.json_members import read_items, read_members
    from tallystick.protocol.log_evidence import read_hex
    from tallystick.protocol.types import Hash

    (listed,) = read_members(raw, "entries", "entries")
    for place, entry in enumerate(read_items(listed, "entries", 1_024)):
        index, digest, leaf = read_members(entry, "entries", "index", "hash", "leaf")
        if index != start + place:
            raise BadMessage(f"entries: expected leaf {start + place}, got {index}", fault=Fault.COORDINATOR)
        yield Hash(read_hex(digest, "entries.hash", 32)), None if leaf is None else read_hex(leaf, "entries.leaf")


def _time(at: int) -> str:
    return f"{datetime.fromtimestamp(at).astimezone():%Y-%m-%d %H:%M:%S}"
