"""The coordinator's own audits: places made-up requests with a purse of its own, has referees judge the answers, and reports.

To a provider a probe is a job like any other: its payer is a key that nothing links to the coordinator. The report of a probe
carries the coordinator's seal, so it counts in full, and its verdict is published as a leaf of the match log.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import structlog

from tallystick.client.audit_settings import PromptConsent
from tallystick.client.audits.conduct import Conclusion
from tallystick.client.audits.probes import ProbeTarget, choose_target, read_targets, shape_of_traffic
from tallystick.client.audits.synthetic import make_up_request
from tallystick.client.audits.texts import load_texts
from tallystick.client.coordinator.http_client import CoordinatorClient
from tallystick.client.jobs.job import run_of
from tallystick.client.ledger.audit_spending import AUDIT_LABEL
from tallystick.client.sdk.audits import kept_job
from tallystick.client.sdk.market import Market, audits_of
from tallystick.protocol.audit_reports import ReportRequest
from tallystick.protocol.criteria import Demand
from tallystick.protocol.eip712 import Domain, Signed, Signer
from tallystick.protocol.errors import BadMessage, Code, Fault, Unavailable
from tallystick.protocol.json_members import read_items
from tallystick.protocol.match_log import MatchLeaf, load_leaf
from tallystick.protocol.messages import ProbeSeal
from tallystick.protocol.routes import CHAT

log = structlog.get_logger()
MAX_MODELS = 32
"""Models whose providers one probe chooses among."""
READ_LEAVES = 256
"""Latest leaves of the match log, from which the shape of the traffic is drawn."""


@dataclass(frozen=True, slots=True)
class Probe:
    """A probe that was judged."""

    target: ProbeTarget
    conclusion: Conclusion


@dataclass(frozen=True, slots=True)
class Prober:
    """See the module's docstring. `coordinator`: its key; `now`: Unix seconds; `random` returns that many random bytes."""

    market: Market
    client: CoordinatorClient
    coordinator: Signer
    now: Callable[[], int]
    random: Callable[[int], bytes]

    async def probe(self) -> Probe | None:
        """Probes one provider; None if nobody can be probed now. Raises TallyError, also if nobody can judge the answer."""
        target = choose_target(await self._targets(), self.random)
        if target is None:
            return None
        like = shape_of_traffic(target.model, await self._traffic(), self.random)
        body = make_up_request(CHAT, like, self.random, await load_texts(self.market.config.audits.texts))
        job = await self.market.submit(CHAT, body, pin=(target.provider,), label=AUDIT_LABEL, keep=True)
        async with job:
            await job.result()
        kept = kept_job(run_of(job), self.now(), consent=PromptConsent(may_share=True), label=AUDIT_LABEL, synthetic=True)
        if kept is None:
            raise Unavailable(Code.PROVIDER_FAILED, f"the probe of {target.provider} has no receipt", fault=Fault.PROVIDER)
        conclusion = await audits_of(self.market).auditor.audit(kept)
        log.info(
            "probed a provider", provider=target.provider, model=target.model, verdict=conclusion.verdict.value, job=job.id.hex()
        )
        return Probe(target, conclusion)

    async def _targets(self) -> list[ProbeTarget]:
        offers = (await self.client.models())[:MAX_MODELS]
        targets: list[ProbeTarget] = []
        for offer in offers:
            targets += read_targets(await self.client.explain(Demand(offer.id, route=CHAT).to_json(self.market.address)))
        return targets

    async def _traffic(self) -> list[MatchLeaf]:
        """The latest matches of the log, as far as they can be read."""
        size = (await self.client.log_head()).message.size
        answer = await self.client.log_entries(max(0, size - READ_LEAVES))
        leaves: list[MatchLeaf] = []
        for entry in read_items(answer.get("entries") if isinstance(answer, dict) else None, "entries", 4 * READ_LEAVES):
            text = entry.get("leaf") if isinstance(entry, dict) else None
            try:
                leaf = load_leaf(bytes.fromhex(text)) if isinstance(text, str) else None
            except (BadMessage, ValueError):
                continue
            if isinstance(leaf, MatchLeaf):
                leaves.append(leaf)
        return leaves


def seal_report(request: ReportRequest, coordinator: Signer, domain: Domain) -> ReportRequest:
    """A report with the coordinator's seal."""
    seal = ProbeSeal(coordinator=coordinator.address, report_hash=request.report.message.digest(domain))
    signed = coordinator.sign(seal, domain)
    return replace(request, seal=Signed(signed.message, signed.signature))
