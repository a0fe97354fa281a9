"""What must hold once everything is back: nothing acknowledged is lost, nothing is charged twice, and all books agree."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from dataclasses import dataclass, field, replace

from coordinator.domain.log_check import LogReplay
from scripts.faults.clients import Clients
from scripts.faults.site import NODES, NotReady, NotYet, Site, until
from tallystick.chain.escrow import Escrow
from tallystick.chain.rpc import Rpc
from tallystick.protocol.access import dump_access
from tallystick.protocol.messages import Access, Receipt
from tallystick.protocol.stored import load_signed
from tallystick.protocol.types import Hash

END_SECONDS = 180.0
"""How long after the last fault a job may be without an end."""
ASKED_AT_ONCE = 16
"""Jobs whose ends are asked for at the same time: one after the other, hundreds of them take minutes on a busy machine."""
TERMINAL = frozenset({"completed", "cancelled", "failed", "expired", "disputed"})
_NOT_KEPT = ("order_replayed", "dollars were billed", "no longer has its answer")
_PAYER_RECEIPTS = "SELECT o.job, r.receipt_doc FROM receipts r JOIN orders o ON o.receipt = r.id"


@dataclass(slots=True)
class Findings:
    """Violations in words; answers that came whole but were not kept; and orders that no receipt has released, by node.

    Answers are not kept whose stream broke between their last byte and their receipt. They are paid once, their clients have
    them, and a repeated request is told so.
    """

    violations: list[str] = field(default_factory=list)
    not_kept: int = 0
    unreleased: dict[str, int] = field(default_factory=dict)


async def check(site: Site, clients: Clients) -> Findings:
    """Compares what all sides know. The clients must have stopped."""
    findings = Findings()
    try:
        await until(site.all_serve, "every process serves again", END_SECONDS)
        await _repeat_answers(clients, findings)
        open_jobs = await _jobs_of(site, clients)
        await until(lambda: _all_ended(site, open_jobs), "every job has an end on all sides", END_SECONDS)
        findings.violations += await _double_charges(site)
        await until(lambda: _charges_are_known(site), "the payer's ledger has each receipt", END_SECONDS)
        findings.violations += await _unequal_books(site)
        findings.violations += await _faulty_log(site)
        findings.unreleased = await _unreleased(site)
        await until(lambda: _is_settled(site), "the chain pays the sum of the receipts", END_SECONDS)
    except NotReady as error:
        findings.violations.append(str(error))
    return findings


async def _repeat_answers(clients: Clients, findings: Findings) -> None:
    """Asks for all answers again that had come whole."""
    for request in clients.requests:
        if request.answer is None:
            continue
        if request.answer != request.chunks:
            findings.violations.append(f"request {request.key}: expected {request.chunks} words, got {request.answer}")
        again = replace(request, answer=None, refusal="")
        await clients.ask(again)
        if all(sign in again.refusal for sign in _NOT_KEPT):
            findings.not_kept += 1
        elif again.answer != request.answer:
            result = f"{again.answer} words {again.refusal}"
            findings.violations.append(f"request {request.key}: the answer of {request.answer} words is lost; again: {result}")


async def _jobs_of(site: Site, clients: Clients) -> dict[str, str]:
    """The jobs that were placed for the clients' keys, each with nothing known of it."""
    keys = {request.key for request in clients.requests}
    return {job: "" for key, job in await site.rows("gateway", "SELECT key, job FROM keys") if key in keys}


async def _all_ended(site: Site, open_jobs: dict[str, str]) -> bool:
    """Takes the jobs out that have ended on all sides. Raises NotYet if there are others."""
    for node in NODES:
        if rows := await site.rows(node, "SELECT hex(job) FROM open_orders WHERE receipt_id > 0"):
            raise NotYet(f"{node} waits for the coordinator's acknowledgement of receipts of {rows}")
    names = list(open_jobs)
    for at in range(0, len(names), ASKED_AT_ONCE):
        asked = names[at : at + ASKED_AT_ONCE]
        for job, where in zip(asked, await asyncio.gather(*(_where_open(site, job) for job in asked)), strict=True):
            open_jobs[job] = where
            if not where:
                del open_jobs[job]
    if open_jobs:
        raise NotYet(str(open_jobs))
    return True


async def _where_open(site: Site, job: str) -> str:
    """Where a job has no end, and its state there; empty if it has one everywhere."""
    async with site.session.get(f"{site.gateway}/tally/jobs/{job}") as response:
        payers = (await response.json()).get("state")
    if payers not in TERMINAL:
        return f"{payers} at the payer"
    headers = {"authorization": _access_token(site)}
    async with site.session.get(f"{site.coordinator}/v1/jobs/{job}", headers=headers) as response:
        state = (await response.json()).get("state")
        return "" if response.status == 404 or state in TERMINAL else f"{response.status} {state} at the coordinator"


def _access_token(site: Site) -> str:
    """The header value that proves to the coordinator that the payer asks."""
    payer, coordinator = site.signers["payer"], site.signers["coordinator"].address
    access = Access(account=payer.address, coordinator=coordinator, issued_at=int(time.time()))
    return dump_access(payer.sign(access, site.deployment.domain))


async def _double_charges(site: Site) -> list[str]:
    charges = await _provider_charges(site)
    return [
        f"job {job}: charged {len(costs)} times: {costs} base units"
        for job, costs in charges.items()
        if len(list(filter(None, costs))) > 1
    ]


async def _charges_are_known(site: Site) -> bool:
    """Whether the payer's ledger has what the providers charge, job by job. Raises NotYet: the payer asks for what it lacks."""
    charges = await _provider_charges(site)
    payments: dict[str, list[int]] = defaultdict(list)
    for job, doc in await site.rows("gateway", _PAYER_RECEIPTS):
        payments[bytes(job).hex()].append(int(load_signed(Receipt, doc).message.cost))
    for job in charges.keys() | payments.keys():
        costs, paid = sorted(filter(None, charges[job])), sorted(filter(None, payments[job]))
        if costs != paid:
            raise NotYet(f"job {job}: the providers charge {costs} base units, the payer's ledger has {paid}")
    return True


async def _provider_charges(site: Site) -> dict[str, list[int]]:
    charges: dict[str, list[int]] = defaultdict(list)
    for node in NODES:
        for job, cost in await site.rows(node, "SELECT o.job, r.cost FROM receipts r JOIN orders o ON o.id = r.order_id"):
            charges[bytes(job).hex()].append(int(cost))
    return charges


async def _unequal_books(site: Site) -> list[str]:
    """Tabs whose totals differ between provider, payer and coordinator, and tabs that are blocked."""
    violations = []
    coordinator = {
        provider: int.from_bytes(total, "big")
        for provider, total in await site.rows("coordinator", "SELECT provider, total FROM tabs")
    }
    payer = dict(await site.rows("gateway", "SELECT provider, total FROM tabs"))
    for node in NODES:
        provider = site.signers[node].address
        total = await _total(site, node)
        totals = {"provider": total, "payer": payer.get(provider, 0), "coordinator": coordinator.get(provider, 0)}
        if len(set(totals.values())) > 1:
            violations.append(f"the tab with {node} differs, in base units: {totals}")
    violations += [
        f"the payer blocks {provider}: {reason}"
        for provider, reason in await site.rows("gateway", "SELECT provider, blocked_reason FROM tabs WHERE blocked_reason != ''")
    ]
    return violations


async def _unreleased(site: Site) -> dict[str, int]:
    """Orders of ended jobs that wait for a receipt. The client stops to sign orders for a provider with eight of them."""
    query = (
        "SELECT t.provider, count(*) FROM orders o JOIN tabs t ON t.id = o.tab WHERE o.state = 'dispatched' GROUP BY t.provider"
    )
    counts = dict(await site.rows("gateway", query))
    return {node: counts.get(site.signers[node].address, 0) for node in NODES}


async def _total(site: Site, node: str) -> int:
    rows = await site.rows(node, "SELECT CAST(cumulative AS INTEGER) FROM tabs")
    return int(rows[0][0]) if rows else 0


async def _faulty_log(site: Site) -> list[str]:
    """Faults of the match log, and what payer or nodes hold as evidence against the coordinator."""
    replay, violations = LogReplay(), []
    rows = await site.rows("coordinator", "SELECT number, hashes, leaf FROM match_log ORDER BY number")
    if [number for number, _, _ in rows] != list(range(len(rows))):
        violations.append("the match log has gaps")
    for number, hashes, leaf in rows:
        violations += [f"leaf {number} of the match log: {fault}" for fault in replay.add(Hash(hashes[:32]), leaf)]
    return violations + [f"evidence against the coordinator: {file}" for file in site.folder.rglob("evidence-*.json")]


async def _is_settled(site: Site) -> bool:
    """Whether the chain has paid what the receipts add up to."""
    rpc = Rpc(site.deployment.rpc)
    try:
        escrow = Escrow(rpc, site.deployment)
        settled = [int((await escrow.tab(site.payer, site.signers[node].address)).settled) for node in NODES]
    finally:
        await rpc.close()
    return settled == [await _total(site, node) for node in NODES]
