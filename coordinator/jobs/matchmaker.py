"""The matchmaker: the shortlist for a demand, and the candidate of a job that gets it now.

It holds what a match depends on: the ask book, the payers' exposure, the providers' reputation, and the log of decisions.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Sequence

from coordinator.domain.ask_book import AskBook
from coordinator.domain.decision_log import DecisionLog
from coordinator.domain.exposure import Exposure
from coordinator.domain.integrity_records import UNAUDITED, IntegrityRecords, product_key
from coordinator.domain.job_queue import JobQueue
from coordinator.domain.limits import JobLimits
from coordinator.domain.listed_ask import ConnectedNode, ListedAsk, SlotGroup
from coordinator.domain.match_leaf import consider
from coordinator.domain.matching import explain, rank_candidates, shape_of_demand, shortlist, spare_asks
from coordinator.domain.ranking import Ranked, quality_bound, reliability
from coordinator.domain.reputation import Reputation
from coordinator.domain.scoring import RequestShape, ScoreTerms, shape_of
from coordinator.domain.speeds import Speeds, Timing
from coordinator.jobs.attempt import Attempt
from coordinator.jobs.live_job import LiveJob
from coordinator.jobs.match_log import MatchDraft
from coordinator.ports import Funds
from tallystick.protocol.criteria import Demand, Reason
from tallystick.protocol.eip712 import Domain, Signed
from tallystick.protocol.errors import BadMessage, Code, Fault, Refusal, Unavailable
from tallystick.protocol.link import Capacities, Capacity
from tallystick.protocol.match_log import Verdict, draw_of
from tallystick.protocol.messages import Ask, Order, Terms
from tallystick.protocol.ranking_hints import NO_HINTS
from tallystick.protocol.types import Address, Amount, Hash, JobId

_BYTES_PER_TOKEN = 4
"""Bytes of a sealed request that count as one input token, if its client does not say more."""
MAX_EXPLAINED = 200
"""Asks that one explanation covers."""
_CONCURRENT_READS = 16
"""Chain reads at the same time."""
WITHDRAWN_SECONDS = 300
"""How long a model that no provider offers any more is reported as unavailable instead of unknown: engines are restarted."""
MAX_WITHDRAWN_MODELS = 10_000
RETURN_SECONDS = 35
"""How long after a restart a model that no provider offers is reported as unavailable: its providers may still reconnect."""


def _queue(limits: JobLimits) -> JobQueue:
    return JobQueue(limits.max_waiting, limits.max_waiting_per_model, limits.max_waiting_bytes)


async def _nothing_to_read(_payer: Address) -> None:
    pass


class SlotsBusy(Unavailable):
    """Some candidates, `busy`, could take the job as soon as they have a free slot."""

    busy: frozenset[Address] = frozenset()


class _NoPurse(Refusal):
    """The payer never deposited anything."""


class Matchmaker:
    """See the module's docstring. `now` is Unix time, `tick` a monotonic clock, both in seconds; `chance` draws uniformly from 0
    to 1.
    """

    def __init__(
        self,
        *,
        domain: Domain,
        funds: Funds,
        limits: JobLimits,
        now: Callable[[], float],
        tick: Callable[[], float],
        chance: Callable[[], float],
    ) -> None:
        self.book, self.exposure, self.decision_log = AskBook(max_jobs=limits.jobs_per_node), Exposure(), DecisionLog()
        self.reputation, self.queue = Reputation(self._score_changed), _queue(limits)
        self.integrity = IntegrityRecords(self._integrity_changed)
        self.book.standing = lambda ask: self.integrity.standing(product_key(ask))
        self.speeds = Speeds(self.book.set_speed)
        self.book.measured = self.speeds.measured
        self.book.on_free = self._slot_freed
        self.on_open: Callable[[SlotGroup], None] = lambda _group: None
        """Called with a slot group that may have free slots that no job waits for."""
        self.domain, self._funds, self._limits, self._now, self._tick = domain, funds, limits, now, tick
        self._chance = chance
        self.draw: Callable[[JobId, int], float] = draw_of
        """The draw of a match, from the job's id and the number of its attempt."""
        self.before_admission: Callable[[Address], Awaitable[None]] = _nothing_to_read
        """Awaited with a payer that has a purse, before its exposure is compared with its funds."""
        self._returned_at = 0.0
        self._withdrawn: OrderedDict[str, float] = OrderedDict()
        """When a provider last withdrew an ask for each model; the newest MAX_WITHDRAWN_MODELS."""

    def restarted(self) -> None:
        """Notes that this process follows another one, so its providers may not be connected yet."""
        self._returned_at = self._tick() + RETURN_SECONDS

    def replace_asks(
        self,
        provider: Address,
        asks: Iterable[Signed[Ask]],
        capacity: Capacity | Capacities | None = None,
        *,
        groups: Sequence[int] = (),
    ) -> None:
        """Replaces all asks of a connected provider. Raises PeerError for a forged ask, or one of another provider.

        `groups`: the number of each ask's slot group; without any, all asks share group 0.
        """
        verified = [ask.verify(self.domain) for ask in asks]
        if any(ask.message.provider != provider for ask in verified):
            raise BadMessage(f"asks: expected asks of {provider} alone, got one of another provider")
        self._note_withdrawn(provider)
        self.book.replace(provider, verified, capacity, *self.quality(provider), groups=groups)

    def drop(self, provider: Address) -> None:
        """Removes a provider that disconnected."""
        self._note_withdrawn(provider)
        self.book.drop(provider)

    def _note_withdrawn(self, provider: Address) -> None:
        for listed_ask in self.book.of_provider(provider):
            model = listed_ask.message.model
            self._withdrawn[model] = self._tick()
            self._withdrawn.move_to_end(model)
        while len(self._withdrawn) > MAX_WITHDRAWN_MODELS:
            self._withdrawn.popitem(last=False)

    def set_capacity(self, provider: Address, capacity: Capacity | Capacities) -> None:
        """Records the capacity that a node reports of some of its slot groups. Raises BadMessage for a group that it has not."""
        self.book.set_capacity(provider, capacity)

    def release(self, attempt: Attempt) -> None:
        """Frees the slot of an attempt that ended, and its exposure."""
        order, terms = attempt.order.message, attempt.candidate.terms
        self.exposure.release(order.payer, order.provider, terms.max_cost)
        self.book.release(attempt.slot_group)

    def _slot_freed(self, group: SlotGroup) -> None:
        self.queue.offer(group, self._tick())
        self.on_open(group)

    def measure(self, job: LiveJob, attempt: Attempt, output_tokens: int) -> None:
        """Measures how fast a provider answered. `output_tokens`: of its receipt."""
        reader = job.reader_seconds(self._tick())
        timing = Timing(attempt.sent_at, attempt.body_at, attempt.last_at, attempt.chunks, reader)
        self.speeds.record(attempt.provider, attempt.candidate.terms.model, timing, output_tokens)

    def measure_late(self, attempt: Attempt) -> None:
        """Counts the time that a provider had no output in, before another one had."""
        late = 1_000 * (self._tick() - attempt.sent_at)
        self.speeds.record_late(attempt.provider, attempt.candidate.terms.model, late)

    def _score_changed(self, provider: Address) -> None:
        self.book.set_reliability(provider, *self.quality(provider))

    def _integrity_changed(self, provider: Address) -> None:
        self.book.refresh_standing(provider)
        self.book.set_reliability(provider, *self.quality(provider))

    def find_ask(self, digest: Hash) -> Ask | None:
        """Returns the ask with this digest, a listed one or one that was replaced lately, or None."""
        listed_ask = self.book.find(digest)
        return None if listed_ask is None else listed_ask.message

    def quality(self, provider: Address) -> tuple[int, int]:
        """Returns a provider's class of reliability, and a bound of its quality."""
        score, best = self.reputation.score(provider), max(self.integrity.best(provider), UNAUDITED.integrity)
        return reliability(score), quality_bound(score, best)

    async def load_stakes(self, model: str) -> None:
        """Reads the stakes of a model's providers from the chain. Raises Unavailable if the chain does not answer."""
        nodes = {listed_ask.node.provider: listed_ask.node for listed_ask in self.book.of_model(model)[:MAX_EXPLAINED]}
        reads = asyncio.Semaphore(_CONCURRENT_READS)

        async def load(node: ConnectedNode) -> None:
            async with reads:
                node.stake = await self._funds.stake(node.provider)

        await asyncio.gather(*map(load, nodes.values()))

    def shortlist(self, demand: Demand) -> list[ListedAsk]:
        """Returns the best asks for a demand, best first. Raises Refusal or Unavailable that say why there is none."""
        now, rejected, chosen = int(self._now()), list[tuple[Reason, ListedAsk]](), list[ListedAsk]()
        reputation, scores, shape = self.reputation, dict[Address, ScoreTerms](), self.shape_of(demand)
        try:
            chosen = shortlist(
                self.book,
                demand,
                now,
                rejected,
                reputation.score,
                newcomer=reputation.newcomer,
                chance=self._chance(),
                backlog=self._backlog,
                is_open=None if self.queue.is_idle else self._is_open,
                mean_output=self.speeds.mean_output(demand.model),
                terms=scores,
            )
        except Refusal as error:
            if error.code is Code.UNKNOWN_MODEL:
                self._check_returning(demand.model, error)
            raise
        finally:
            self.decision_log.add_shortlist(demand, chosen, rejected, now, shape=shape, scores=scores)
            self.book.decisions = self.decision_log.count
        return chosen

    def spare_asks(self, demand: Demand) -> Iterator[ListedAsk]:
        """Yields the asks with a free slot whose spec meets a demand, the best class of reliability first, and cheapest first."""
        return spare_asks(self.book, demand, self.reputation.score, self._chance())

    def _backlog(self, group: SlotGroup) -> float:
        """Returns the jobs that would wait for a group per job that it has here: nobody can check the slots that it reports."""
        return (self.queue.waiting_for(group) + 1) / group.assigned if group.assigned else float("inf")

    def _is_open(self, group: SlotGroup) -> bool:
        return self.queue.is_open(group, None)

    def _check_returning(self, model: str, error: Refusal) -> None:
        """Raises Unavailable for a model whose providers may come back soon."""
        if self._tick() < self._returned_at:
            text = f"no provider offers {model!r} yet: this coordinator was restarted, and its providers are reconnecting"
            raise Unavailable(Code.NO_PROVIDER, text, fault=Fault.COORDINATOR) from error
        age = self._tick() - self._withdrawn.get(model, float("-inf"))
        if age < WITHDRAWN_SECONDS:
            text = f"no provider offers {model!r} now; the last one withdrew it {int(age)} s ago and may come back"
            raise Unavailable(Code.NO_PROVIDER, text, fault=Fault.PROVIDER) from error

    def shape_of(self, demand: Demand) -> RequestShape:
        """Returns the shape of the request that a demand is for."""
        return shape_of_demand(demand, self.speeds.mean_output(demand.model))

    def explain(self, demand: Demand) -> list[tuple[Ranked[ListedAsk], Reason | None]]:
        """Returns the model's asks, the lowest score first, each with the reason against it; at most MAX_EXPLAINED.

        Decides nothing and records nothing.
        """
        listed_asks, mean_output = self.book.of_model(demand.model)[:MAX_EXPLAINED], self.speeds.mean_output(demand.model)
        return explain(listed_asks, demand, int(self._now()), self.reputation.score, mean_output)

    async def match(self, job: LiveJob) -> None:
        """Begins an attempt with the best candidate left that the payer can pay. Raises the error that says why there is none;
        SlotsBusy if one may have a free slot later.
        """
        job.begin(await self.choose(job), self.deadline(job))

    def deadline(self, job: LiveJob) -> float:
        """Returns until when a node must answer a dispatch of the job that leaves now."""
        return self._tick() + self._limits.accept_within(len(job.submission.sealed))

    async def choose(self, job: LiveJob, *, free_slot: bool = False) -> Attempt:
        """Returns an attempt of the best candidate left, with its slot and exposure; raises as `match`.

        `free_slot`: a place in an engine's queue is not enough.
        """
        now, refused = int(self._now()), job.last_error
        candidates, draw = job.candidates, self.draw(job.id, len(job.attempts))
        shape = self._shape_of_job(job, candidates[0].terms)
        fitting, rejected = rank_candidates(
            candidates,
            self.book,
            tried=job.tried,
            score=self.reputation.score,
            now=now,
            ranked=job.submission.ranked,
            shape=shape,
            newcomer=self.reputation.newcomer,
            chance=draw,
            batch=job.submission.batch,
        )
        considered = consider(candidates, fitting, rejected, self.book.find, self.reputation)
        providers = [ranked.listed_ask.provider for ranked in fitting]
        scores = {ranked.listed_ask.provider: ranked.terms for ranked in fitting}
        model = job.model
        for place, ranked in enumerate(fitting):
            listed_ask, candidate = ranked.entry
            order, group = candidate.order.verify(self.domain), listed_ask.slot_group
            if not self.queue.is_open(group, job.queued) or (free_slot and not group.free):
                rejected[group.provider] = Reason.BUSY.value
                considered[place] = considered[place]._replace(outcome=Verdict.HELD)
                continue
            self.queue.use_grant(group, job.queued)
            self.book.assign(group)
            try:
                await self._admit(order.message.payer, order.message.provider, candidate.terms.max_cost)
            except BaseException as error:
                self.book.release(group)
                if not isinstance(error, Refusal):
                    raise
                refused = refused or error
                considered[place] = considered[place]._replace(outcome=Verdict.UNPAID)
                if isinstance(error, _NoPurse):
                    break  # nor is there a reservation for another candidate: a stranger costs two chain reads
            else:
                considered[place] = considered[place]._replace(outcome=Verdict.CHOSEN)
                outranked = dict.fromkeys(providers, Verdict.OUTRANKED.value)
                self.decision_log.add_match(model, group.provider, outranked | rejected, now, scores)
                draft = MatchDraft(model, shape, job.submission.ranked, draw, tuple(considered))
                return Attempt(candidate, order, group, draft)
        unpaid = dict.fromkeys(providers, Verdict.UNPAID.value)
        self.decision_log.add_match(model, None, unpaid | rejected, now, scores)
        reasons = "; ".join(f"{provider}: {reason}" for provider, reason in rejected.items())
        text = f"no candidate can take the job now: {reasons}"
        busy = frozenset(provider for provider, reason in rejected.items() if reason == Reason.BUSY.value)
        if busy and (refused is None or refused is job.last_error):
            no_slot = SlotsBusy(Code.NODE_BUSY, f"providers of {model!r} are busy: {reasons}", fault=Fault.PROVIDER)
            no_slot.busy = busy
            raise no_slot
        raise refused or Unavailable(Code.NO_PROVIDER, text, fault=Fault.PROVIDER)

    def _shape_of_job(self, job: LiveJob, terms: Terms) -> RequestShape:
        submission, hints = job.submission, job.submission.hints or NO_HINTS
        return shape_of(
            hints.likely_tokens or len(submission.sealed) // _BYTES_PER_TOKEN,
            terms.max_output_tokens,
            self.speeds.mean_output(terms.model),
            sort=hints.sort,
            weights=hints.weights,
            holder=hints.holder,
            cached_tokens=hints.cached_tokens,
        )

    async def check_waiting(self, job: LiveJob, busy: Collection[Address]) -> None:
        """Checks that the payer signed the orders of a job that is to wait, and could pay one of these providers now.

        Raises BadSignature, Refusal, Unavailable: strangers and other payers' names get no place in the queue. The job is packed,
        since thousands of jobs may come while the chain is read.
        """
        refused: Refusal | None = None
        for place, order in enumerate(job.orders):
            job.candidates[place].order.verify(self.domain)
            if order.provider not in busy:
                continue
            job.pack()
            try:
                await self._admit(job.payer, order.provider, order.max_cost)
            except Refusal as error:
                refused = refused or error
                if isinstance(error, _NoPurse):
                    break
            else:
                self.exposure.release(job.payer, order.provider, order.max_cost)
                return
        if refused is not None:
            raise job.last_error or refused

    async def check_order(self, order: Order, terms: Terms) -> None:
        """Checks that the payer could pay one more order now. Raises Refusal, Unavailable."""
        await self._admit(order.payer, order.provider, terms.max_cost)
        self.exposure.release(order.payer, order.provider, terms.max_cost)

    async def _admit(self, payer: Address, provider: Address, max_cost: Amount) -> None:
        """Counts a job against the payer's funds. Raises Refusal, after a fresh read: the payer may just have deposited."""
        for fresh in (False, True):
            backing = await self._funds.backing(payer, provider, fresh=fresh)
            if not backing.opened:
                continue
            await self.before_admission(payer)
            self.exposure.observe(payer, provider, settled=backing.settled, reserved=backing.reserved)
            try:
                self.exposure.admit(payer, provider, max_cost, backing.free)
            except Refusal:
                if fresh:
                    raise
            else:
                return
        raise _NoPurse(Code.INSUFFICIENT_FUNDS, f"{payer} has no purse yet. Deposit with: tally deposit AMOUNT")
