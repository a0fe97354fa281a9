"""Conducts one audit: asks referees until they agree, records what they found, and draws the consequences.

A referee that cannot be asked now is asked again later. One whose numbers cannot be used counts as having none to say.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

import structlog

from tallystick.audit.referee_record import dispute_losers
from tallystick.audit.token_counts import PooledCounts
from tallystick.audit.verdicts import Finding, Referees, Verdict, judge, judge_job
from tallystick.client.audit_settings import AuditSettings, OwnReferee
from tallystick.client.audits.kept_job import KeptJob
from tallystick.client.audits.opinion_rules import (
    are_several,
    can_compare,
    describe,
    is_unscorable,
    votes_of,
    wants_comparison,
    wants_more,
)
from tallystick.client.audits.planning import (
    Random,
    RefereeChoice,
    choose_referee,
    draw,
    is_own,
    may_show,
)
from tallystick.client.audits.planted import bad_question, judge_bad, make_bad
from tallystick.client.audits.pools import bounded
from tallystick.client.audits.provider_verdict import judge_provider_and_counts
from tallystick.client.audits.records import AuditEnd, KnownAudit, NewAudit, Opinion
from tallystick.client.audits.referees import AuditMarket, BadScores, Scored, ask_referee
from tallystick.client.audits.schema import AuditKind, Origin
from tallystick.client.audits.store import AuditStore
from tallystick.client.audits.subject import WITHHELD, ShortAnswer, Subject, UnverifiableAnswer, pack_tokens, unpack_tokens
from tallystick.client.audits.synthetic import make_up_request
from tallystick.client.audits.texts import load_texts
from tallystick.client.audits.threshold_table import ThresholdTable
from tallystick.protocol.eip712 import Verified
from tallystick.protocol.errors import BadMessage, Code, Fault, Refusal, Unavailable
from tallystick.protocol.messages import Ask
from tallystick.protocol.token_scores import ScoreRequest
from tallystick.protocol.types import ZERO_ADDRESS, Address, Amount

log = structlog.get_logger()
EVIDENCE_ATTEMPTS: Final = 3
"""How often a provider is asked for the evidence of a job, before its answer is audited without."""
PLANTED_SECONDS: Final = 6 * 86_400
"""How long the check of a referee waits for an answer that can be planted."""
INCOMPARABLE: Final = (
    "the referee's numbers could not be compared with the evidence, and the text alone clears nobody who has more to show"
)
UNSCORABLE: Final = "no referee could read the tokens that the provider committed to, and the answer has no text to read instead"


@dataclass(frozen=True, slots=True)
class Conclusion:
    """The end of one audit. `provider`: the verdict on the provider by all its audits."""

    audit: KnownAudit
    opinions: tuple[Opinion, ...]
    verdict: Verdict
    provider: Verdict
    reason: str = ""


class NoReferee(Refusal):
    """Nobody is left who may be asked."""

    def __init__(self, text: str) -> None:
        super().__init__(Code.NO_PROVIDER, text, fault=Fault.CLIENT)


@dataclass(frozen=True, slots=True)
class Conductor:
    """Conducts the audits of one wallet. `now` is Unix seconds; `random` returns secret random bytes."""

    settings: AuditSettings
    own: Sequence[OwnReferee]
    store: AuditStore
    market: AuditMarket
    thresholds: ThresholdTable
    now: Callable[[], int]
    random: Random
    sharing_forbidden: bool
    """Whether the user forbids by now that prompts are shown, whatever was said when they were sent."""
    on_conclusion: Callable[[Conclusion, KeptJob], Awaitable[None]]
    """Called after each audit of a provider: blocks, reports, and writes files."""

    def referees_for(self, model: str, precision: str) -> Referees:
        """How far the referees of a model are trusted. One that always judges too cannot be captured: the user's own engine."""
        own = any(referee.serves(model, precision) for referee in self.own)
        return Referees(self.settings.opinions, 0.0) if own else Referees(self.settings.opinions)

    async def conduct(self, audit: KnownAudit) -> Conclusion:
        """Does an audit to its end. Raises NoReferee if nobody can be asked at all, TallyError if somebody may be later."""
        if audit.kept is None:
            raise BadMessage(f"audit {audit.id}: its job is not kept any more")
        kept = KeptJob.unpack(audit.kept)
        if audit.kind is AuditKind.SYNTHETIC and not audit.job:
            audit, kept = await self._place_synthetic(audit, kept)
        kept = await self._with_evidence(audit, kept)
        try:
            subject = Subject.of(kept)
        except UnverifiableAnswer as error:
            if audit.kind is not AuditKind.SYNTHETIC and (audit.kind.planted or isinstance(error, ShortAnswer)):
                raise
            return await self._end(audit, kept, (), AuditEnd(Verdict.INCONCLUSIVE, str(error), unverifiable=True))
        if audit.kind.planted:
            return await self._check_referee(audit, subject)
        rules = self.referees_for(audit.model, audit.precision)
        opinions = await self.store.opinions(audit.id)
        while wants_more(opinions, audit, rules) or wants_comparison(subject, opinions):
            choice = await self._choose(audit, kept, opinions)
            if choice is None:
                if not opinions:
                    raise NoReferee(self._why_nobody(kept))
                break
            opinions.append(await self._ask(audit, subject, choice))
        return await self._conclude(audit, kept, subject, opinions, rules)

    async def _with_evidence(self, audit: KnownAudit, kept: KeptJob) -> KeptJob:
        """The job with the evidence that did not come with its answer. Raises Unavailable if its provider may give it later."""
        if kept.evidence or not kept.has_root:
            return kept
        try:
            return replace(kept, evidence=await self.market.fetch_evidence(kept.job))
        except Unavailable as error:
            if error.fault not in (Fault.PROVIDER, Fault.ENGINE) or audit.attempts + 1 < EVIDENCE_ATTEMPTS:
                raise
            return kept

    async def _place_synthetic(self, audit: KnownAudit, like: KeptJob) -> tuple[KnownAudit, KeptJob]:
        """Places a request that was made up in the shape of a real one.

        It is ordered like any other, so that nothing tells its provider: whoever gets it is audited.
        """
        path, request = like.request()
        texts = await load_texts(self.settings.texts)
        body = await asyncio.to_thread(make_up_request, path, request, self.random, texts)  # a long one takes a while
        kept = await self.market.place_synthetic(path, body)
        await self.store.record_job(audit.id, kept)
        placed = replace(audit, job=kept.job.hex(), kept=kept.pack(), provider=kept.provider, precision=kept.precision)
        return placed, kept

    async def _choose(self, audit: KnownAudit, kept: KeptJob, opinions: Sequence[Opinion]) -> RefereeChoice | None:
        records = await self.store.referee_records()
        may_share = self._may_show(audit, kept)
        asks: Sequence[Verified[Ask]] = ()
        asked = {opinion.referee for opinion in opinions}
        if may_share and not _own_left(self.own, audit, asked):
            asks = await self.market.scoring_asks(audit.model)
        return choose_referee(
            provider=audit.provider,
            model=audit.model,
            precision=audit.precision,
            may_share=may_share,
            own=self.own,
            asks=asks,
            asked=asked,
            distrusted=[name for name, record in records.items() if not record.trusted],
            prices=(kept.proof.terms.input_price, kept.proof.terms.output_price),
            random=self.random,
        )

    def _may_show(self, audit: KnownAudit, kept: KeptJob) -> bool:
        if self.sharing_forbidden and audit.origin is Origin.DRAWN and not kept.synthetic:
            return False
        return may_show(kept.consent, synthetic=kept.synthetic)

    async def _ask(self, audit: KnownAudit, subject: Subject, choice: RefereeChoice) -> Opinion:
        """What a referee finds. Raises TallyError if it could not be asked; what it paid for in vain is recorded."""
        try:
            request, scored = await self._score(audit, subject, choice)
        except BadMessage as error:
            log.info("a referee had nothing to say", audit=audit.id, referee=choice.name, reason=str(error))
            cost = error.cost if isinstance(error, BadScores) else Amount(0)
            opinion = Opinion(choice.name, Verdict.INCONCLUSIVE, (), PooledCounts(), cost, self.now())
            if isinstance(error, BadScores):  # it took money for nothing
                await self.store.record_dispute(audit.id, {choice.name: True}, self.now())
        else:
            opinion = await self._opinion(audit, subject, choice, request, scored)
        await self.store.add_opinion(audit.id, opinion)
        return opinion

    async def _score(self, audit: KnownAudit, subject: Subject, choice: RefereeChoice) -> tuple[ScoreRequest, Scored]:
        """What a referee was asked, and its answer.

        A referee that refuses the tokens of the evidence, which may be none of the model's, is asked about the text.
        """
        request = subject.question(self.settings.positions, self.random)
        try:
            return request, await ask_referee(self.market, choice, request, self._key(audit, choice))
        except BadScores:
            raise
        except BadMessage:
            if isinstance(request.completion, str) or not subject.text:
                raise
        request = subject.question(self.settings.positions, self.random, text_only=True)
        return request, await ask_referee(self.market, choice, request, self._key(audit, choice, " text"))

    def _key(self, audit: KnownAudit, choice: RefereeChoice, form: str = "") -> str:
        """The idempotency key of a scoring job: it is paid once, also if this process ends meanwhile."""
        name = f"{audit.id} {audit.job} {choice.name} {audit.attempts}{form}"
        return "audit-" + hashlib.sha256(name.encode()).hexdigest()[:40]

    async def _opinion(
        self, audit: KnownAudit, subject: Subject, choice: RefereeChoice, request: ScoreRequest, scored: Scored
    ) -> Opinion:
        earlier = [unpack_tokens(tokens) for tokens in await self.store.earlier_tokens(audit.provider, audit.model, audit.job)]
        thresholds = self.thresholds.of(audit.model, audit.precision)
        findings = subject.judge(request, scored.response, thresholds, earlier)
        counts = subject.counts(request, scored.response)
        pool = bounded(subject.pool(request, scored.response))
        return Opinion(choice.name, judge(findings), tuple(findings), counts, scored.cost, self.now(), scored.document, pool)

    async def _conclude(
        self, audit: KnownAudit, kept: KeptJob, subject: Subject, opinions: Sequence[Opinion], rules: Referees
    ) -> Conclusion:
        votes = votes_of(audit, opinions)
        verdict = judge_job(votes, rules)
        reason = describe(opinions, verdict)
        withheld = ""
        if verdict is Verdict.PASS and subject.withheld:
            verdict, withheld = Verdict.INCONCLUSIVE, subject.withheld
        elif verdict is Verdict.PASS and kept.has_root and not can_compare(opinions):
            verdict, reason = Verdict.INCONCLUSIVE, INCOMPARABLE
            withheld = WITHHELD if are_several(opinions) else ""
        elif is_unscorable(subject, opinions):
            withheld = UNSCORABLE
        keep = verdict is Verdict.SUSPECT
        tokens = pack_tokens([row.token for row in subject.rows]) if subject.rows else None
        end = AuditEnd(verdict, withheld or reason, tokens, keep, subject.coverage, unverifiable=bool(withheld))
        losers = {referee.decode(): lost for referee, lost in dispute_losers(votes, rules).items()}
        if losers:
            await self.store.record_dispute(audit.id, losers, self.now())
        return await self._end(audit, kept, opinions, end)

    async def _end(self, audit: KnownAudit, kept: KeptJob, opinions: Sequence[Opinion], end: AuditEnd) -> Conclusion:
        """Records the end of an audit, and draws the consequences."""
        await self.store.finish(audit.id, end, self.now())
        disagree = {opinion.verdict for opinion in opinions} >= {Verdict.PASS, Verdict.SUSPECT}
        await self._plant(audit, kept, opinions, end.verdict, always=disagree)
        known = await self.store.get(audit.id) or audit
        conclusion = Conclusion(known, tuple(opinions), end.verdict, await self.judge_provider(audit), end.reason)
        await self.on_conclusion(conclusion, kept)
        return conclusion

    async def judge_provider(self, audit: KnownAudit) -> Verdict:
        """The verdict on a provider by all its audits of one product, and by its token counts."""
        rules = self.referees_for(audit.model, audit.precision)
        history = await self.store.history(audit.provider, audit.model, audit.precision)
        counts = await self.store.counts(audit.provider, audit.model)
        pools = await self.store.pools(audit.provider, audit.model, audit.precision)
        return judge_provider_and_counts(history, counts, rules, pools)

    # Checks of referees

    async def _plant(
        self, audit: KnownAudit, kept: KeptJob, opinions: Sequence[Opinion], verdict: Verdict, *, always: bool
    ) -> None:
        """Sometimes plans checks of the market's referees of a job; always if they disagreed.

        Only an answer that passed is good enough to be planted. A check that is due after another one waits for such an answer.
        """
        referees = [opinion.referee for opinion in opinions if not is_own(opinion.referee)]
        due = [referee for referee in referees if always or draw(self.random) * 100 < self.settings.planted_percent]
        usable = verdict is Verdict.PASS and audit.kept is not None and self._may_show(audit, kept)
        for referee in due:
            planted = NewAudit(
                AuditKind.PLANTED_BAD, Origin.DRAWN, Address(referee), audit.model, audit.precision, delay=PLANTED_SECONDS
            )
            await self.store.add(planted, self.now())
        if audit.kept is None or not usable:
            return
        await self.store.fill_planted(audit.model, audit.precision, audit.job, audit.kept, self.now())
        if len(referees) < len(opinions) and draw(self.random) * 100 < self.settings.planted_percent:
            nobody_yet = NewAudit(
                AuditKind.PLANTED_GOOD, Origin.DRAWN, ZERO_ADDRESS, audit.model, audit.precision, audit.job, audit.kept
            )  # the user's own engine passed it
            await self.store.add(nobody_yet, self.now())

    async def _check_referee(self, audit: KnownAudit, subject: Subject) -> Conclusion:
        """Shows a referee an answer that is known to be good or bad. `audit.provider`: the referee; zero: any new one."""
        if not self._may_show(audit, subject.kept):
            raise NoReferee("the user forbids by now that this prompt is shown")
        choice = await self._referee_to_check(audit, subject.kept)
        verdict, findings, scored = await self._planted(audit, subject, choice)
        opinion = Opinion(choice.name, verdict, findings, PooledCounts(), scored.cost, self.now())
        await self.store.add_opinion(audit.id, opinion)
        if verdict is not Verdict.INCONCLUSIVE:
            await self.store.record_dispute(audit.id, {choice.name: verdict is Verdict.SUSPECT}, self.now())
        reason = {Verdict.PASS: "the referee told it right", Verdict.SUSPECT: "the referee told it wrong"}.get(verdict, "")
        await self.store.finish(audit.id, AuditEnd(verdict, reason), self.now())
        known = await self.store.get(audit.id) or audit
        return Conclusion(known, (opinion,), verdict, Verdict.INCONCLUSIVE, reason)

    async def _referee_to_check(self, audit: KnownAudit, kept: KeptJob) -> RefereeChoice:
        """Raises NoReferee if it does not sell scoring now."""
        asks = await self.market.scoring_asks(audit.model)
        if audit.provider != ZERO_ADDRESS:
            asks = [ask for ask in asks if ask.message.provider == audit.provider]
        base = await self.store.find(kept.job)
        judged = [] if base is None or audit.provider != ZERO_ADDRESS else await self.store.opinions(base.id)
        choice = choose_referee(
            provider=kept.provider,
            model=audit.model,
            precision=audit.precision,
            may_share=True,
            own=(),
            asks=asks,
            asked=[opinion.referee for opinion in judged],
            distrusted=(),
            prices=(kept.proof.terms.input_price, kept.proof.terms.output_price),
            random=self.random,
        )
        if choice is None:
            raise NoReferee(f"no referee of {audit.model} that could be checked sells scoring now")
        return choice

    async def _planted(
        self, audit: KnownAudit, subject: Subject, choice: RefereeChoice
    ) -> tuple[Verdict, tuple[Finding, ...], Scored]:
        key, request = self._key(audit, choice), subject.question(self.settings.positions, self.random)
        if audit.kind is AuditKind.PLANTED_GOOD:
            scored = await ask_referee(self.market, choice, request, key)
            findings = tuple(subject.judge(request, scored.response, self.thresholds.of(audit.model, audit.precision)))
            return judge(findings), findings, scored
        tokens = tuple(row.token for row in subject.rows)
        bad = make_bad(tokens, request.positions, self.random)
        if bad is None:
            raise BadMessage("the answer has too few different tokens to be made a bad one")
        scored = await ask_referee(self.market, choice, bad_question(request, bad), key)
        return judge_bad(bad, scored.response), (), scored

    def _why_nobody(self, kept: KeptJob) -> str:
        own = ", ".join(referee.name for referee in self.own)
        engines = f"none of the [[referees]] ({own}) has" if own else "no engine of your own ([[referees]]) has"
        model = f"{kept.model!r} in the class {kept.precision!r}"
        if not may_show(kept.consent, synthetic=kept.synthetic):
            why = (
                "the request is private"
                if kept.consent.private
                else "you did not allow its prompt to be shown to other providers"
            )
            remedy = "" if kept.consent.private else "; for this answer alone: tally audit JOB --share"
            return f"nobody can judge this answer: {engines} {model}, and {why} ([audits] share_prompts){remedy}"
        return f"nobody can judge this answer: {engines} {model}, and no other provider that is trusted sells scoring of it now"


def _own_left(own: Sequence[OwnReferee], audit: KnownAudit, asked: set[str]) -> bool:
    return any(referee.serves(audit.model, audit.precision) and f"own:{referee.name}" not in asked for referee in own)
