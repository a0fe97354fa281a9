"""The matchmaker: which asks a demand is shown, and which candidate of a job gets it now.

It keeps what a match rests on (the book, what payers owe, what providers are known for) and why each was decided as it was.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Iterable

from coordinator.domain.ask_book import AskBook, ConnectedNode, ListedAsk
from coordinator.domain.decision_log import DecisionLog
from coordinator.domain.exposure import Exposure
from coordinator.domain.limits import JobLimits
from coordinator.domain.matching import rank_candidates, rejection, shortlist, sort_by_demand
from coordinator.domain.reputation import Reputation
from coordinator.jobs.live_job import Attempt, LiveJob
from coordinator.ports import Funds
from tallystick.protocol.demand import Demand, Reason
from tallystick.protocol.eip712 import Domain, Signed
from tallystick.protocol.errors import BadMessage, Code, Fault, Refusal, Unavailable
from tallystick.protocol.link import Capacity
from tallystick.protocol.messages import Ask, Order, Terms
from tallystick.protocol.types import Address

EXPLAINED = 200
_AT_ONCE = 16
"""Questions to the chain."""
GONE_SECONDS = 300
"""How long a model that nobody sells any more is not yet an unknown one: engines are restarted."""
MODELS_REMEMBERED = 10_000
RETURN_SECONDS = 35
"""After a restart, providers may take this long to come back; what nobody offers meanwhile may be offered soon."""


class _NoPurse(Refusal):
    """The payer never deposited anything."""


class Matchmaker:
    """See the module's docstring. `now` is Unix time, `tick` a monotonic clock, both in seconds; `chance` draws evenly from 0
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
        self.book, self.exposure, self.reputation, self.decision_log = AskBook(), Exposure(), Reputation(), DecisionLog()
        self._domain, self._funds, self._limits, self._now, self._tick = domain, funds, limits, now, tick
        self._chance = chance
        self._whole_at = 0.0
        self._gone: OrderedDict[str, float] = OrderedDict()
        """When a provider last stopped selling each model; the newest MODELS_REMEMBERED."""

    def restarted(self) -> None:
        """This process follows another: its providers may not be back yet."""
        self._whole_at = self._tick() + RETURN_SECONDS

    def replace_asks(self, provider: Address, asks: Iterable[Signed[Ask]], capacity: Capacity | None = None) -> None:
        """Makes these a connected provider's standing asks. Raises PeerError if one is forged or another's."""
        verified = [ask.verify(self._domain) for ask in asks]
        if any(ask.message.provider != provider for ask in verified):
            raise BadMessage("asks: an ask of another provider")
        self._note_gone(provider)
        self.book.replace(provider, verified, capacity)

    def drop(self, provider: Address) -> None:
        """A provider went away."""
        self._note_gone(provider)
        self.book.drop(provider)

    def _note_gone(self, provider: Address) -> None:
        for listed_ask in self.book.of_provider(provider):
            self._gone[listed_ask.ask.message.model] = self._tick()
            self._gone.move_to_end(listed_ask.ask.message.model)
        while len(self._gone) > MODELS_REMEMBERED:
            self._gone.popitem(last=False)

    def set_capacity(self, provider: Address, capacity: Capacity) -> None:
        """A node's own word on what it can take."""
        node = self.book.node(provider)
        if node is not None:
            node.capacity = capacity

    async def load_stakes(self, model: str) -> None:
        """Has the chain say what stands behind the providers of a model. Raises Unavailable if it does not answer."""
        nodes = {listed_ask.node.provider: listed_ask.node for listed_ask in self.book.of_model(model)[:EXPLAINED]}
        some = asyncio.Semaphore(_AT_ONCE)

        async def learn(node: ConnectedNode) -> None:
            async with some:
                node.stake = await self._funds.stake(node.provider)

        await asyncio.gather(*map(learn, nodes.values()))

    def shortlist(self, demand: Demand) -> list[ListedAsk]:
        """The best asks for a demand, best first. Raises Refusal or Unavailable that say why there is none."""
        now, rejected, found = int(self._now()), list[tuple[Reason, ListedAsk]](), list[ListedAsk]()
        try:
            known = self.reputation
            found = shortlist(self.book, demand, now, rejected, known.score, newcomer=known.newcomer, chance=self._chance())
        except Refusal as error:
            if error.code is not Code.UNKNOWN_MODEL:
                raise
            if self._tick() < self._whole_at:
                text = f"nobody offers {demand.model!r} yet: this coordinator was restarted, and its providers are coming back"
                raise Unavailable(Code.NO_PROVIDER, text, fault=Fault.COORDINATOR) from error
            gone = self._tick() - self._gone.get(demand.model, float("-inf"))
            if gone < GONE_SECONDS:
                text = f"nobody offers {demand.model!r} now; the last who did stopped {int(gone)} s ago and may come back"
                raise Unavailable(Code.NO_PROVIDER, text, fault=Fault.PROVIDER) from error
            raise
        finally:
            against = ((listed_ask.node.provider, reason) for reason, listed_ask in rejected)
            self.decision_log.listed(demand, (listed_ask.node.provider for listed_ask in found), against, now)
        return found

    def explain(self, demand: Demand) -> list[tuple[ListedAsk, Reason | None]]:
        """Every ask for the demand's model with the reason against it, sorted as asked, at most EXPLAINED. Decides nothing."""
        now, score = int(self._now()), self.reputation.score
        listed = sort_by_demand(self.book.of_model(demand.model)[:EXPLAINED], demand, score)
        return [(listed_ask, rejection(listed_ask, demand, now, score)) for listed_ask in listed]

    async def match(self, job: LiveJob) -> None:
        """Begins an attempt with the best candidate left that the payer can pay. Raises the reason why there is none."""
        now, refused = int(self._now()), job.last_error
        fit, against = rank_candidates(
            job.submission.candidates,
            self.book,
            tried=job.tried,
            score=self.reputation.score,
            now=now,
            ranked=job.submission.ranked,
            newcomer=self.reputation.newcomer,
            chance=self._chance(),
        )
        lost = dict.fromkeys(
            (listed_ask.node.provider for listed_ask, _ in fit), "another was ranked before it: cheaper, or more reliable"
        )
        model = job.submission.candidates[0].terms.model
        for listed_ask, candidate in fit:
            order, node = candidate.order.verify(self._domain), listed_ask.node
            if node.free < 1 or node.assigned >= self._limits.jobs_per_node:
                against.append(f"{node.provider}: {Reason.BUSY.value}")
                continue
            node.assigned += 1
            try:
                await self._admit(order.message, candidate.terms)
            except BaseException as error:
                node.assigned -= 1
                if not isinstance(error, Refusal):
                    raise
                refused = refused or error
                if isinstance(error, _NoPurse):
                    break  # nor is there a reservation for another candidate: a stranger costs two chain reads
            else:
                job.begin(Attempt(candidate, order, node), self._tick() + self._limits.accept_within(len(job.submission.sealed)))
                self.decision_log.matched(model, node.provider, lost | _reasons(against), now)
                return
        lost = dict.fromkeys(lost, "the payer's purse did not cover the job") | _reasons(against)
        self.decision_log.matched(model, None, lost, now)
        raise refused or Unavailable(
            Code.NO_PROVIDER, "no candidate can take the job now: " + "; ".join(against), fault=Fault.PROVIDER
        )

    async def _admit(self, order: Order, terms: Terms) -> None:
        """Counts the job against the payer's funds. A no is said only of fresh figures: the payer may just have deposited."""
        for fresh in (False, True):
            backing = await self._funds.backing(order.payer, order.provider, fresh=fresh)
            if not backing.opened:
                continue
            self.exposure.observe(order.payer, order.provider, settled=backing.settled, reserved=backing.reserved)
            try:
                self.exposure.admit(order.payer, order.provider, terms.max_cost, backing.free)
            except Refusal:
                if fresh:
                    raise
            else:
                return
        raise _NoPurse(Code.INSUFFICIENT_FUNDS, f"{order.payer} has no purse yet. Deposit with: tally deposit AMOUNT")


def _reasons(against: list[str]) -> dict[Address, str]:
    """The reasons of `rank`, by provider."""
    return {Address(provider): reason for provider, _, reason in (one.partition(": ") for one in against)}
