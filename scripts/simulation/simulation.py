"""A run: nodes come and go, payers converse, and each request lives through shortlist, queue, attempts and charge.

The coordinator's code decides; this module plays its clients and nodes. Each party's random numbers are its own, so all policies
see the same demand.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from io import BytesIO
from itertools import count
from random import Random
from typing import Any

from coordinator.domain.listed_ask import ListedAsk
from coordinator.jobs.live_job import LiveJob
from coordinator.jobs.reputation_updates import count_failure, count_receipt
from scripts.simulation.clock import VirtualClock, sleep
from scripts.simulation.parties import Model, Payer, Session, SimulatedNode, models_of, nodes_of, payers_of
from scripts.simulation.policies import Policy
from scripts.simulation.records import JobResult, Recorder
from scripts.simulation.replica import Replica, SimulatedJob
from scripts.simulation.requests import Request, Turn, candidate_of, highest_cap, price_with, receipt_of, tags_of
from scripts.simulation.scenario import (
    ANSWER,
    FIRST_MESSAGE,
    HOUR,
    LATER_MESSAGE,
    MEAN_TURNS,
    THINKING,
    Scenario,
    capped_shares,
    pareto,
)
from tallystick.client.selection.affinity import Affinity, Preference, ranking_hints
from tallystick.client.selection.prefix_table import PrefixTable
from tallystick.client.selection.shortlist import objection
from tallystick.protocol.criteria import Demand
from tallystick.protocol.eip712 import Verified
from tallystick.protocol.errors import Code, Fault, Refusal, TallyError, Unavailable
from tallystick.protocol.jobs import ENDS, Event, State
from tallystick.protocol.link import read_ask
from tallystick.protocol.messages import Ask, Outcome
from tallystick.protocol.pricing import Usage, charge, cost, prices_of
from tallystick.protocol.queue_place import QueuePlace
from tallystick.protocol.replicas import replica_order
from tallystick.protocol.types import Address, JobId
from tallystick.protocol.wire import Candidate, Submission

FIRST_TOKEN = 0.2
"""Seconds to the first token without any input to read."""
STALLS, STALL_SECONDS = 0.2, 60.0
"""How often a client that stalls stops reading when it is told its place, and for how long."""
ONLINE, OFFLINE = 10 * HOUR, HOUR
"""Mean lengths of a node's connection and of the time between two of them, in seconds of the day's pattern."""
FLOODER_RESERVES = 500_000
"""What the payer who floods reserves with each provider, in base units, as many honest payers do."""
CRASHES = 0.3
"""The share of connections that are lost with jobs under way."""
LARGEST_PAYER = 0.2
"""The largest mean number of jobs of a payer, as a share of those that it may have at once: a larger one has several wallets."""
SHARED_BEAT_SECONDS, WAY_SECONDS = 0.05, 0.02
"""A node with several links tells each of a changed slot after a random part of the first; the second is the way of the news."""
ACTIVE, SILENT = 60.0, 90.0
"""Mean seconds that a payer sends requests, and that it does not."""


class Simulation:
    """See the module's docstring. Times are seconds of the virtual clock."""

    def __init__(self, scenario: Scenario, policy: Policy) -> None:
        self.scenario, self.policy, self.clock = scenario, policy, VirtualClock()
        self.models = models_of(scenario)
        self.nodes = nodes_of(scenario, self.models)
        self.payers = payers_of(scenario, self.models)
        self.flooder = self.payers[-1]
        self.by_provider = {node.provider: node for node in self.nodes}
        chances = [scenario.random("coordinator", *([number] if number else [])) for number in range(scenario.replicas)]
        self.replicas = [Replica(self.clock, self.payers, random.random, policy.queue()) for random in chances]
        by_url = {f"https://r{number}.example": replica for number, replica in enumerate(self.replicas)}
        self._beats = scenario.random("beats")
        self._replica_of = {payer.number: by_url[replica_order(payer.address, by_url)[0]] for payer in self.payers}
        self._affinity = Affinity(b"", PrefixTable(BytesIO(), self.replicas[0].unix_time))
        self._select = None if policy.selection is None else policy.selection(scenario.random("policy"))
        self.records = Recorder(scenario)
        self._conversations, self._jobs = count(1), count(1)
        self._shortlists: dict[tuple[int, Demand], tuple[float, list[ListedAsk]]] = {}

    def replica_of(self, payer: Payer) -> Replica:
        """Returns the replica that serves a payer."""
        return self._replica_of[payer.number]

    def run(self, progress: Callable[[float], None] = lambda _share: None) -> None:
        """Runs the whole day. `progress` is called with the share that is done."""
        for replica in self.replicas:
            replica.reputation.restore({node.provider: node.history for node in self.nodes if node.history is not None})
            self.clock.start(replica.sweep())
        for node in self.nodes:
            self.clock.start(self._node_life(node, self.scenario.random("node", node.number)))
        starts = self._conversations_per_second()
        for payer, share in zip(self.payers, self._shares(), strict=True):
            self.clock.start(self._payer_life(payer, starts * share, self.scenario.random("payer", payer.number)))
        if self.scenario.flood:
            self._plan_flood()
        for step in range(200):
            self.clock.run(self.scenario.seconds * (step + 1) / 200)
            progress((step + 1) / 200)
        self.clock.close()
        self.records.close(self.nodes, self.clock.now)

    def _shares(self) -> list[float]:
        """Returns each payer's share of the traffic: by weight, and no more than leaves room for bursts under its limit."""
        jobs = self.scenario.load * sum(node.capacity.slots for node in self.nodes)
        return capped_shares(
            [payer.weight for payer in self.payers], LARGEST_PAYER * self.replicas[0].limits.jobs_per_payer / jobs
        )

    def _conversations_per_second(self) -> float:
        """Returns the mean rate at which conversations begin, which fills the scenario's load of the slots."""
        weights = [node.capacity.slots for node in self.nodes]
        seconds = [ANSWER.mean / node.capacity.tokens_per_second + 2.0 for node in self.nodes]
        mean_seconds = sum(slots * time for slots, time in zip(weights, seconds, strict=True)) / sum(weights)
        return self.scenario.load * sum(weights) / mean_seconds / MEAN_TURNS

    # Nodes

    async def _node_life(self, node: SimulatedNode, random: Random) -> None:
        speedup = self.scenario.speedup
        if random.random() < OFFLINE / (ONLINE + OFFLINE):
            await sleep(pareto(random, OFFLINE) / speedup)
        while True:
            session = node.session = Session(self.clock.signal())
            for replica in self.replicas:
                replica.connect(node)
            self.records.node_online(node, self.clock.now)
            await sleep(pareto(random, ONLINE) / speedup)
            for replica in self.replicas:
                replica.matchmaker.drop(node.provider)
            node.session = None
            self.records.node_offline(node, self.clock.now)
            if random.random() < CRASHES:
                session.gone.set()
                node.forget()
            await sleep(max(pareto(random, OFFLINE) / speedup, 5.0))

    # Payers

    async def _payer_life(self, payer: Payer, starts: float, random: Random) -> None:
        """Starts conversations in bursts. `starts`: per second, on average."""
        share = ACTIVE / (ACTIVE + SILENT)
        if random.random() > share:
            await sleep(random.random() * SILENT)
        while True:
            until = self.clock.now + pareto(random, ACTIVE)
            while self.clock.now < until:
                await sleep(random.expovariate(starts / share * self.scenario.rate_at(self.clock.now)))
                number = next(self._conversations)
                self.clock.start(self._converse(payer, payer.pick(random), number, Random(random.getrandbits(64))))
            await sleep(pareto(random, SILENT))

    async def _converse(self, payer: Payer, model: Model, number: int, random: Random) -> None:
        earlier = 0
        while True:
            tokens = (LATER_MESSAGE if earlier else FIRST_MESSAGE).draw(random)
            turn = Turn(number, model, earlier, earlier + tokens, ANSWER.draw(random))
            answered = await self._request(payer, turn, Random(random.getrandbits(64)))
            earlier = turn.input + turn.output
            if not answered or random.random() < 1 / MEAN_TURNS or earlier > FIRST_MESSAGE.most:
                return
            await sleep(random.lognormvariate(0, 0.8) * THINKING)

    def _plan_flood(self) -> None:
        """Lets the last payer hold as many jobs as it may on one model that others use too."""
        limit = self.replicas[0].limits.jobs_per_payer
        slots = dict.fromkeys((model.name for model in self.models), 0)
        for node in self.nodes:
            slots[node.asks[0].message.model] += node.capacity.slots
        used = {model.name: model for payer in self.payers[: len(self.payers) // 4] for model in payer.models}
        target = min(used, key=lambda name: (abs(slots[name] - limit // 4), name))
        self.flooder.flooding, self.flooder.models, self.flooder.weights = True, [used[target]], [1.0]
        self.flooder.reserved = FLOODER_RESERVES
        self.records.flooded = target
        begin, end = self.scenario.flood_window
        for number in range(limit):
            random = self.scenario.random("flood", number)
            self.clock.call_at(begin, partial(self._begin_flood, used[target], end, random))

    def _begin_flood(self, model: Model, end: float, random: Random) -> None:
        self.clock.start(self._flood(model, end, random))

    async def _flood(self, model: Model, end: float, random: Random) -> None:
        while self.clock.now < end:
            turn = Turn(next(self._conversations), model, 0, FIRST_MESSAGE.draw(random), ANSWER.draw(random))
            if not await self._request(self.flooder, turn, random):
                await sleep(1.0)

    # Requests, as the client makes them

    async def _request(self, payer: Payer, turn: Turn, random: Random) -> bool:
        """Lives through one request. Returns whether it was answered."""
        result = self.records.began(JobResult(self.clock.now, payer, turn.model.name, turn.input, turn.earlier))
        payer.live += 1
        try:
            self._check_room(payer)
            demand = payer.demand(turn.model, turn.input, self.scenario.shortlist_size)
            await self._submit(Request(payer, turn, random, result, demand))
            result.answered = True
        except (Refusal, Unavailable) as error:
            result.error = error.code
            if result.wait is None:
                result.wait = self.clock.now - result.at
        finally:
            payer.live -= 1
            self.records.ended(result)
        return result.answered

    def _check_room(self, payer: Payer) -> None:
        if payer.live > self.replica_of(payer).limits.jobs_per_payer:
            raise Unavailable(Code.RATE_LIMITED, "too many jobs of this payer", fault=Fault.CLIENT)

    async def _submit(self, request: Request) -> None:
        """Submits to a shortlist, and once more to a fresh one if the shortlist was a cached one that has no free slot."""
        payer, demand = request.payer, request.demand
        request.cheapest = self.replica_of(payer).cheapest(demand)
        asks, cached = self._shortlist(payer, demand)
        try:
            job = await self._place(request, asks, 0 if cached else self.scenario.wait)
        except Unavailable:
            self._shortlists.pop((payer.number, demand), None)
            if not cached:
                raise
            asks, _ = self._shortlist(payer, demand)
            job = await self._place(request, asks, self.scenario.wait)
        await self._run(job, request)

    def _shortlist(self, payer: Payer, demand: Demand) -> tuple[list[ListedAsk], bool]:
        key = payer.number, demand
        expires, asks = self._shortlists.get(key, (0.0, []))
        if self.clock.now < expires:
            return asks, True
        replica = self.replica_of(payer)
        asks = replica.matchmaker.shortlist(demand) if self._select is None else self._select(replica, demand)
        self._shortlists[key] = self.clock.now + self.scenario.shortlist_seconds, asks
        return asks, False

    async def _place(self, request: Request, asks: list[ListedAsk], wait: int | None) -> LiveJob:
        payer, turn, ranked = request.payer, request.turn, self._select is not None
        holder: Preference | None = None
        if self.policy.affinity and turn.earlier:
            asks, holder = await self._prefer_holder(request, asks)
        replica, number = self.replica_of(payer), next(self._jobs)
        job_id = JobId(number.to_bytes(32, "big"))
        candidates = tuple(candidate_of(payer, turn, entry, job_id, replica.unix_time()) for entry in asks)
        submission = Submission(job_id, candidates, b"", ranked, wait, hints=ranking_hints(request.demand, holder))
        now = self.clock.now
        job = replica.new_job(SimulatedJob(submission, created_at=replica.unix_time(), started=now, last_frame_at=now))
        await replica.slot_queue.match_or_enter(job)
        if job.queued is not None:
            request.result.waited, request.result.beside_free = True, replica.has_free(request.demand)
        return job

    async def _prefer_holder(self, request: Request, asks: list[ListedAsk]) -> tuple[list[ListedAsk], Preference | None]:
        """Puts the provider first that has the beginning of the conversation, as the client does."""
        by_digest = {entry.digest: entry for entry in asks}

        async def find(provider: Address) -> list[Verified[Ask]]:
            try:
                pinned = replace(request.demand, pin=frozenset((provider,)))
                found = self.replica_of(request.payer).matchmaker.shortlist(pinned)
            except (Refusal, Unavailable):
                return []
            by_digest.update((entry.digest, entry) for entry in found)
            return [entry.ask for entry in found]

        arranged, holder = await self._affinity.arrange(tags_of(request.turn), [entry.ask for entry in asks], find)
        return [by_digest[ask.digest] for ask in arranged][: self.scenario.shortlist_size], holder

    async def _order_further(self, job: LiveJob, request: Request, invited: Sequence[Any]) -> None:
        """Orders on the asks that a waiting job is invited to, as the client does: those that fit, and not for more."""
        replica, payer, highest = self.replica_of(request.payer), request.payer, highest_cap(job.candidates)
        candidates: list[Candidate] = []
        for ask in (read_ask(raw).message for raw in invited):
            entries = [entry for entry in replica.book.of_provider(ask.provider) if entry.message == ask]
            if entries and objection(request.demand, ask, replica.unix_time()) is None:
                candidates.append(candidate_of(payer, request.turn, entries[0], job.id, replica.unix_time()))
        with contextlib.suppress(Refusal, Unavailable):
            await replica.slot_queue.add_orders(job, [each for each in candidates if each.terms.max_cost <= highest])

    # Jobs, as the coordinator runs them and nodes answer

    async def _run(self, job: LiveJob, request: Request) -> None:
        slot_queue = self.replica_of(request.payer).slot_queue

        async def tell(job: LiveJob, place: bytes) -> None:
            if b'"asks"' in place:
                await self._order_further(job, request, QueuePlace.loads(place).asks)
            if request.payer.stalled and request.random.random() < STALLS:
                await sleep(STALL_SECONDS)

        while True:
            await slot_queue.wait(job, tell)
            if await self._attempt(job, request):
                return
            await slot_queue.match_or_enter(job)

    async def _attempt(self, job: LiveJob, request: Request) -> bool:
        """Plays the node that has the job. Returns whether the job ended; raises the error of one that failed for good."""
        replica, turn, result = self.replica_of(request.payer), request.turn, request.result
        node, attempt, began = self.by_provider[job.provider], job.current, self.clock.now
        session = self._occupy(node)
        if session is None:
            await self._refuse(replica, job, node)
            return False
        result.attempts += 1
        if result.wait is None:
            result.wait = began - result.at
        cached = min(node.lookup(turn.conversation), turn.earlier)
        first_token = FIRST_TOKEN + (turn.input - cached) / (turn.model.input_rate * node.speed)
        fails = request.random.random() < node.failures
        seconds = first_token if fails else first_token + turn.output / (turn.model.output_rate * node.speed)
        try:
            lost = await session.gone.wait_for(seconds)
            if not fails and not lost:
                attempt.sent_at, attempt.body_at, attempt.last_at = began, began + first_token, self.clock.now
                attempt.chunks = turn.output + 2
                result.first_token, result.service = began + first_token - result.at, seconds
                self._finish(job, request, node, Usage(turn.input, cached, turn.output))
                return True
            error = Unavailable(Code.NODE_GONE if lost else Code.PROVIDER_FAILED, "the attempt failed", fault=Fault.PROVIDER)
            if self.clock.now > began + first_token:
                job.move(Event.OUTPUT)
            self._fail(replica, job, turn, error)
            return False
        finally:
            session.running -= 1
            self.records.busy(node, began, self.clock.now)
            job.open_attempts.remove(attempt)
            replica.matchmaker.release(attempt)
            self._beat(node)

    def _occupy(self, node: SimulatedNode) -> Session | None:
        """Takes one of a node's slots. Returns None if another replica's job has the last one.

        Raises RuntimeError if there is only one coordinator, which must know.
        """
        session = node.session
        if session is None or session.running == node.capacity.slots:
            if len(self.replicas) == 1:
                raise RuntimeError(f"{node.provider} got a job without a free slot")
            return None
        session.running += 1
        node.attempts += 1
        self._beat(node)
        return session

    def _beat(self, node: SimulatedNode) -> None:
        """Tells the replicas soon how many slots a node has free. A lone coordinator counts its own jobs and needs no beat."""
        if len(self.replicas) > 1:
            for replica in self.replicas:
                delay = SHARED_BEAT_SECONDS * self._beats.random()
                self.clock.call_at(self.clock.now + WAY_SECONDS + delay, partial(self._report, node, replica))

    def _report(self, node: SimulatedNode, replica: Replica) -> None:
        if node.session is not None:
            capacity = replace(node.capacity, free=node.capacity.slots - node.session.running)
            replica.matchmaker.set_capacity(node.provider, capacity)

    async def _refuse(self, replica: Replica, job: LiveJob, node: SimulatedNode) -> None:
        """Plays a node that has no slot for a job of this replica: the refusal tells it so, and the job is matched again."""
        attempt = job.current
        await sleep(WAY_SECONDS)
        self.records.refused += 1
        error = Unavailable(Code.NODE_BUSY, "all slots are taken", fault=Fault.PROVIDER)
        count_failure(replica.reputation, job, attempt, error)
        attempt.close(State.FAILED, str(error))
        job.last_error = error
        job.move(Event.ATTEMPT_FAILED)
        job.open_attempts.remove(attempt)
        self._report(node, replica)
        replica.matchmaker.release(attempt)

    def _fail(self, replica: Replica, job: LiveJob, turn: Turn, error: TallyError) -> None:
        """Ends a failed attempt. Raises the error if output began: no other provider may continue then."""
        self._affinity.forget(tags_of(turn), job.provider)
        count_failure(replica.reputation, job, job.current, error)
        job.current.close(State.FAILED, str(error))
        job.last_error = error
        if job.state is State.STREAMING:
            job.move(Event.FAIL)
            raise error
        job.move(Event.ATTEMPT_FAILED)

    def _finish(self, job: LiveJob, request: Request, node: SimulatedNode, usage: Usage) -> None:
        payer, turn, terms = request.payer, request.turn, job.current.candidate.terms
        job.move(Event.OUTPUT)
        job.current.mark_delivered()
        count_receipt(self.replica_of(payer).reputation, job, job.current, Outcome.COMPLETED)
        self.replica_of(payer).matchmaker.measure(job, job.current, usage.output)
        job.move(ENDS[Outcome.COMPLETED])
        paid = charge(terms, usage, Outcome.COMPLETED)
        payer.spent += paid
        node.income += paid
        node.remember(turn.conversation, turn.input + turn.output)
        self._affinity.end(tags_of(turn), receipt_of(payer, node, usage, paid))
        self.records.earned(node, 1e6 * int(paid) / (3 * turn.model.price * turn.model.output_rate))
        result, uncached = request.result, Usage(usage.input, 0, usage.output)
        connected, free = request.cheapest
        result.paid, result.cached, result.full_price = paid, usage.cached, cost(uncached, prices_of(terms))
        result.best_price = 0 if connected is None else price_with(connected, uncached)
        result.best_free_price = 0 if free is None else price_with(free, uncached)
