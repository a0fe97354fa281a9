"""Joins audits and market: keeps jobs for audits, and places scoring jobs and made-up requests as ordinary jobs."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING

import structlog

from tallystick.client.audit_settings import PromptConsent
from tallystick.client.audits.auditor import Auditor, AuditorPorts
from tallystick.client.audits.consent import decide_consent
from tallystick.client.audits.consent_file import read_answer
from tallystick.client.audits.kept_job import KeptJob
from tallystick.client.audits.report_queue import SendReport
from tallystick.client.config import ClientConfig
from tallystick.client.coordinator.http_client import CoordinatorClient
from tallystick.client.coordinator.info import CoordinatorInfo
from tallystick.client.jobs.job import Job, run_of
from tallystick.client.jobs.running_job import RunningJob
from tallystick.client.ledger.audit_spending import AUDIT_LABEL
from tallystick.client.ledger.ledger import Ledger
from tallystick.client.openai.requests import ApiRequest
from tallystick.client.receipts.proof import Proof
from tallystick.protocol.eip712 import Signed, Signer, Verified
from tallystick.protocol.errors import Code, Fault, TallyError, Unavailable
from tallystick.protocol.lenient_json import dump_lenient
from tallystick.protocol.messages import Ask
from tallystick.protocol.routes import SCORES, serves
from tallystick.protocol.token_evidence import EvidenceRow, pack_evidence
from tallystick.protocol.token_scores import ScoreRequest
from tallystick.protocol.types import Address, JobId

log = structlog.get_logger()
MAX_SCORING_ASKS = 64

if TYPE_CHECKING:
    from tallystick.client.jobs.result import Result


Submit = Callable[..., Awaitable[Job]]
"""`Market.submit`."""
FetchEvidence = Callable[[JobId], Awaitable[tuple[EvidenceRow, ...]]]
"""`Market.fetch_evidence`."""


class MarketAudits:
    """What audits need of a market; see `AuditMarket`. `now` is Unix seconds."""

    def __init__(
        self,
        submit: Submit,
        coordinator: CoordinatorClient,
        ledger: Ledger,
        info: Callable[[], Awaitable[CoordinatorInfo]],
        *,
        now: Callable[[], int],
        fetch_evidence: FetchEvidence,
    ) -> None:
        self._submit, self._fetch_evidence = submit, fetch_evidence
        self._coordinator, self._ledger, self._info, self._now = coordinator, ledger, info, now

    async def coordinator(self) -> Address:
        """The coordinator's account."""
        return (await self._info()).coordinator

    async def scoring_asks(self, model: str) -> Sequence[Verified[Ask]]:
        """See `AuditMarket`. Providers that this wallet excludes are left out."""
        domain, now = (await self._info()).domain, self._now()
        excluded = await self._ledger.excluded(domain, now)
        asks: dict[Address, Verified[Ask]] = {}
        for signed in await self._coordinator.asks(model):
            ask = signed.message
            if ask.provider in excluded or not ask.valid_from <= now < ask.valid_until or not serves(ask.spec.features, SCORES):
                continue
            try:
                asks.setdefault(ask.provider, signed.verify(domain))
            except TallyError:  # a coordinator that lists a forged ask
                continue
            if len(asks) == MAX_SCORING_ASKS:
                break
        return list(asks.values())

    async def score(self, ask: Verified[Ask], request: ScoreRequest, key: str) -> Proof:
        """See `AuditMarket`."""
        result = await self._run(SCORES, dump_lenient(request.to_json()), ask.message.provider, key=key)
        return _proof_of(result)

    async def place_synthetic(self, path: str, body: bytes) -> KeptJob:
        """See `AuditMarket`."""
        job = await self._submit(path, body, label=AUDIT_LABEL, keep=True)
        async with job:
            _proof_of(await job.result())
        kept = kept_job(run_of(job), self._now(), consent=PromptConsent(may_share=True), label=AUDIT_LABEL, synthetic=True)
        if kept is None:
            raise Unavailable(Code.PROVIDER_FAILED, "the made-up request of an audit has no receipt", fault=Fault.PROVIDER)
        return kept

    async def fetch_evidence(self, job: JobId) -> bytes:
        """See `AuditMarket`."""
        try:
            return pack_evidence(await self._fetch_evidence(job))
        except Unavailable:
            raise
        except TallyError as error:
            log.info("the evidence of a job cannot be had", job=job.hex(), reason=str(error))
            return b""

    async def _run(self, path: str, body: bytes, provider: Address, *, key: str) -> Result:
        job = await self._submit(path, body, pin=(provider,), label=AUDIT_LABEL, keep=True, key=key)
        async with job:
            return await job.result()


def _proof_of(result: Result) -> Proof:
    if result.proof is None:
        raise Unavailable(Code.PROVIDER_FAILED, "a job of an audit has no receipt yet", fault=Fault.PROVIDER)
    return result.proof


def kept_job(job: RunningJob, now: int, *, consent: PromptConsent, label: str, synthetic: bool = False) -> KeptJob | None:
    """A finished job as it is kept for audits. None if it has no honest receipt, or if its answer was too long to keep."""
    if not job.receipt_accepted:
        return None
    placed = job.placed
    proof = placed.record.audit_proof
    if proof is None:
        return None
    ask = next((ask for ask in placed.asks if ask.digest == proof.terms.ask), None)
    sold = None if ask is None else Signed(ask.message, ask.signature)
    return KeptJob(proof, placed.response.evidence.packed, sold, label, consent, now, synthetic)


class JobAudits:
    """The audits of a market's jobs: which are kept, who may see them, and what becomes of them. `now` is Unix seconds."""

    def __init__(self, config: ClientConfig, wallet: Signer, auditor: Auditor, now: Callable[[], int]) -> None:
        """Raises BadMessage for a damaged file of the user's consent."""
        self._config, self._now, self.auditor = config, now, auditor
        self._has_file = config.audits_path(wallet.address).exists
        self._answered = read_answer(config.consent_path(wallet.address))

    @classmethod
    def of(
        cls,
        config: ClientConfig,
        wallet: Signer,
        market: MarketAudits,
        ledger: Ledger,
        send_report: SendReport | None,
        *,
        now: Callable[[], int],
        random: Callable[[int], bytes],
    ) -> JobAudits:
        """The audits of one wallet. Raises BadMessage for thresholds, or a consent, that cannot be read."""
        ports = AuditorPorts(market, ledger, market.coordinator, send_report, now, random)
        return cls(config, wallet, Auditor(config, wallet, ports), now)

    def resume_pending(self) -> None:
        """Goes on with audits that an earlier process left, if there may be some."""
        if self._has_file():
            self.auditor.resume()

    def consent(self, label: str, *, share: bool | None, private: bool) -> PromptConsent:
        """Who may see a request because of its audit."""
        return decide_consent(self._config.audits, label, answered=self._answered, request=share, private=private)

    def keeps(self, request: ApiRequest) -> bool:
        """Whether the answer to a request is kept for audits."""
        return self.auditor.auditable(request.head.path) and request.label != AUDIT_LABEL

    def finished(self, job: RunningJob) -> None:
        """Keeps a job that ended, and perhaps draws it for an audit. Never waits."""
        if job.audit_consent is None:
            return
        kept = kept_job(job, self._now(), consent=job.audit_consent, label=job.request.label)
        if kept is not None:
            self.auditor.offer(kept)
