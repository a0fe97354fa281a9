"""A coordinator in a test: real keys, in-memory ports, clocks that only the test moves, and fake nodes and clients."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from coordinator.bus.in_process import InProcessBus
from coordinator.domain.limits import JobLimits
from coordinator.jobs.live_job import LiveJob
from coordinator.jobs.market import Market
from coordinator.jobs.report_store import MemoryReportStore, ReportStore
from coordinator.jobs.shared_store import SharedStore
from coordinator.ports import JobStore, LogStore, node_subject
from coordinator.storage.memory import MemoryFunds, MemoryLogStore, MemoryStore
from tallystick.protocol.codecs import keccak
from tallystick.protocol.eip712 import Domain, Message, Signed, Signer, Verified
from tallystick.protocol.errors import Code, Fault, TallyError, Unavailable, error_from_json
from tallystick.protocol.jobs import State
from tallystick.protocol.link import Capacity, ClaimRequest
from tallystick.protocol.messages import Ask, Claim, ClaimRow, Order, Outcome, Receipt, Terms
from tallystick.protocol.pricing import Usage, charge
from tallystick.protocol.types import Address, Amount, Hash, JobId
from tallystick.protocol.wire import Candidate, Dispatch, Failure, Kind, Submission, loads, pack_link, unpack_link
from tallystick.runtime.lean_event import LeanEvent
from tests.builders import build_ask, build_order, receipt_for, terms_of

M = TypeVar("M", bound=Message)
DOMAIN = Domain(31337, Address("0x" + "ab" * 20))
MODEL = "stand-in/small"
START = 1_700_000_000
CAP = 1_000
LAST_CHUNK = b"\1the last sealed chunk"
USAGE = Usage(10, 0, 5)
COST = 20
"""What USAGE costs at the prices of `make_ask`."""


def person(name: str) -> Signer:
    """Returns a key derived from a name."""
    return Signer(keccak(name.encode()))


COORDINATOR, PAYER = person("coordinator"), person("payer")


@dataclass
class Clock:
    """Both clocks of a market, and its timers, which only the test moves."""

    seconds: float = 0.0
    timers: dict[object, tuple[float, Callable[[], None]]] = field(default_factory=dict)

    def now(self) -> float:
        return START + self.seconds

    def tick(self) -> float:
        return self.seconds

    def later(self, seconds: float, callback: Callable[[], None]) -> Callable[[], object]:
        timer = object()
        self.timers[timer] = self.seconds + seconds, callback
        return lambda: self.timers.pop(timer, None)

    def run_due(self) -> None:
        for timer, (due, callback) in list(self.timers.items()):
            if due <= self.seconds and timer in self.timers:
                del self.timers[timer]
                callback()


async def quiet() -> None:
    """Runs everything that can run without the clock moving."""
    for _ in range(30):
        await asyncio.sleep(0)


def make_ask(provider: Signer, **changes: Any) -> Verified[Ask]:
    """Returns an ask at one base unit per input token, half of that if cached, and two per output token."""
    return provider.sign(build_ask(provider.address, **({"model": MODEL} | changes)), DOMAIN)


def make_terms(ask: Verified[Ask], job: JobId, /, **changes: Any) -> Terms:
    """Returns terms that fit an ask."""
    values: dict[str, Any] = {"max_cost": Amount(CAP), "max_output_tokens": 100, "job": job}
    return terms_of(ask, **(values | changes))


def make_order(terms: Terms, provider: Address, /, payer: Signer = PAYER, now: int = START, **changes: Any) -> Verified[Order]:
    """Returns an order that fits its terms; changes are signed too."""
    values: dict[str, Any] = {
        "deadline": now + 600,
        "claim_by": now + 86_400,
        "max_fee_bps": 100,
        "coordinator": COORDINATOR.address,
        "terms_hash": terms.struct_hash(),
    }
    return payer.sign(build_order(payer.address, provider, 1_000_000, **(values | changes)), DOMAIN)


def make_submission(
    *asks: Verified[Ask],
    payer: Signer = PAYER,
    job: JobId | None = None,
    now: int = START,
    terms: dict[str, Any] | None = None,
    **order: Any,
) -> Submission:
    """Returns a job for the providers of these asks. `terms` changes fields of the terms, `order` fields of the orders."""
    number = job or JobId(keccak(repr((asks, terms, order, payer.address)).encode())[:16])
    listed = [make_terms(ask, number, **(terms or {})) for ask in asks]
    orders = [make_order(each, ask.message.provider, payer, now, **order) for ask, each in zip(asks, listed, strict=True)]
    pairs = zip(orders, listed, strict=True)
    return Submission(number, tuple(Candidate(unchecked(made), each, b"wrapped") for made, each in pairs), b"sealed")


def unchecked(signed: Signed[M]) -> Signed[M]:
    """Returns a signed message as it arrives: not verified."""
    return Signed(signed.message, signed.signature)


def make_receipt(provider: Signer, order: Verified[Order], terms: Terms, /, **changes: Any) -> Verified[Receipt]:
    """Returns an honest receipt of USAGE, by default the first of its tab; changes are signed too."""
    outcome = Outcome(changes.get("outcome", Outcome.COMPLETED))
    receipt = receipt_for(order, terms, USAGE, outcome, **({"finished_at": START} | changes))
    return Verified(receipt, provider.sign_digest(receipt.digest(DOMAIN)), receipt.digest(DOMAIN))


def make_claim(provider: Signer, *rows: tuple[Verified[Order], int, int]) -> ClaimRequest:
    """Returns a claim of (order, seq, cumulative cost) rows."""
    claim = Claim(
        provider=provider.address,
        rows=tuple(
            ClaimRow(payer=order.message.payer, order_hash=order.digest, seq=seq, cumulative_cost=Amount(total))
            for order, seq, total in rows
        ),
    )
    signed = provider.sign(claim, DOMAIN)
    return ClaimRequest(unchecked(signed), tuple(unchecked(order) for order, _, _ in rows))


@dataclass
class FakeNode:
    """A provider on the bus. It records the frames that it gets and sends only what the test says, as the hub would relay it."""

    market: Market
    bus: InProcessBus
    signer: Signer
    asks: tuple[Verified[Ask], ...]
    slots: int = 4
    sent: list[tuple[Kind, JobId, bytes]] = field(default_factory=list)
    tabs: dict[Address, tuple[int, Amount]] = field(default_factory=dict)

    @property
    def address(self) -> Address:
        return self.signer.address

    @property
    def ask(self) -> Verified[Ask]:
        return self.asks[0]

    def connect(self, capacity: Capacity | None = None) -> None:
        self.bus.attach(node_subject(self.address), self.receive)
        self.market.matchmaker.replace_asks(self.address, self.asks, capacity or Capacity(self.slots, self.slots))

    def leave(self) -> None:
        self.bus.detach(node_subject(self.address), self.receive)
        self.market.node_gone(self.address)

    def receive(self, frame: bytes) -> None:
        self.sent.append(unpack_link(frame))

    def got(self, kind: Kind, job: JobId | None = None) -> list[bytes]:
        """Returns the payloads of the frames of one kind that arrived so far."""
        return [payload for sent_kind, sent_job, payload in self.sent if sent_kind is kind and job in (None, sent_job)]

    def dispatch(self, job: JobId) -> tuple[Verified[Order], Terms]:
        """Returns the order and terms that were dispatched for a job."""
        dispatch = Dispatch.loads(self.got(Kind.DISPATCH, job)[0])
        return dispatch.candidate.order.verify(DOMAIN), dispatch.candidate.terms

    def send(self, kind: Kind, job: JobId, payload: bytes = b"") -> None:
        self.market.node_frames.take(self.address, (pack_link(kind, job, payload),))

    def has(self, job: JobId) -> bool:
        """Whether it has an attempt at a job now."""
        live = self.market.live_jobs.get(job)
        return live is not None and any(attempt.provider == self.address for attempt in live.open_attempts)

    def accept(self, job: JobId) -> None:
        self.send(Kind.ACCEPT, job)

    def chunk(self, job: JobId, data: bytes = b"sealed chunk") -> None:
        self.send(Kind.CHUNK, job, data)

    def last_chunk(self, job: JobId) -> None:
        """Sends the last chunk of the response."""
        self.chunk(job, LAST_CHUNK)

    def fail(self, job: JobId, error: TallyError | None = None, receipt: Signed[Receipt] | None = None) -> None:
        failure = error or Unavailable(Code.ENGINE_UNAVAILABLE, "the engine is away", fault=Fault.ENGINE)
        self.send(Kind.FAIL, job, Failure(failure, receipt).dumps())

    def receipt(self, job: JobId, **changes: Any) -> Verified[Receipt]:
        """Returns a signed receipt of a job on this node's tab; `hand_in` sends it."""
        order, terms = self.dispatch(job)
        seq, total = self.tabs.get(order.message.payer, (0, Amount(0)))
        cost = charge(terms, USAGE, Outcome(changes.get("outcome", 0)))
        made = make_receipt(self.signer, order, terms, **({"seq": seq + 1, "cumulative_cost": total + cost} | changes))
        self.tabs[order.message.payer] = (made.message.seq, made.message.cumulative_cost)
        return made

    def hand_in(self, job: JobId, receipt: Signed[Receipt]) -> None:
        """Sends a receipt for a live job."""
        self.send(Kind.RECEIPT, job, receipt.to_bytes())

    async def hand_in_late(self, job: JobId, receipt: Signed[Receipt]) -> bool:
        """Sends a receipt for a job that has ended."""
        return await self.market.accept_receipt(self.address, job, receipt.to_bytes())

    def complete(self, job: JobId, **changes: Any) -> Verified[Receipt]:
        """Ends a job as an honest node does: with the last chunk of the response, then the receipt."""
        self.last_chunk(job)
        return self.finish(job, **changes)

    def finish(self, job: JobId, **changes: Any) -> Verified[Receipt]:
        """Ends a job with its receipt, without sending a last chunk."""
        made = self.receipt(job, **changes)
        self.hand_in(job, made)
        return made


@dataclass
class Client:
    """The reader of a job's frames: reads all of them as they arrive, unless `reads` is cleared."""

    job: LiveJob
    frames: list[tuple[Kind, bytes]] = field(default_factory=list)
    task: asyncio.Task[None] | None = None
    reads: LeanEvent = field(default_factory=LeanEvent)

    @property
    def kinds(self) -> list[Kind]:
        return [kind for kind, _ in self.frames]

    @property
    def failure(self) -> TallyError:
        """The error of the FAIL at the end."""
        kind, payload = self.frames[-1]
        assert kind is Kind.FAIL
        return error_from_json(loads(payload, "failure"), 502)

    @property
    def ended(self) -> bool:
        return self.task is not None and self.task.done()

    def take_chunk(self, _payload: bytes) -> bool:
        return False

    def put_last(self, kind: Kind, payload: bytes) -> bool:
        self.put(kind, payload)
        return True

    def put(self, kind: Kind, payload: bytes, *, more: bool = False) -> bool:
        self.frames.append((kind, payload))
        return True

    async def wait(self) -> None:
        await self.reads.wait()


class Frames:
    """The frames of a job, one by one: the job goes on only when the test asks for the next one."""

    def __init__(self, market: Market, job: LiveJob) -> None:
        self._run = market.run(job, self)
        self._task: asyncio.Task[None] | None = None
        self._frames, self._asked, self._arrived = list[tuple[Kind, bytes]](), asyncio.Event(), asyncio.Event()

    def __aiter__(self) -> Frames:
        return self

    async def __anext__(self) -> tuple[Kind, bytes]:
        self._arrived.clear()
        self._asked.set()
        task = self._task = self._task or asyncio.create_task(self._run)
        arrived = asyncio.create_task(self._arrived.wait())
        await asyncio.wait({task, arrived}, return_when=asyncio.FIRST_COMPLETED)
        arrived.cancel()
        if self._frames:
            return self._frames.pop(0)
        await task
        raise StopAsyncIteration

    async def aclose(self) -> None:
        if self._task is None:
            self._run.close()
        else:
            self._task.cancel()
            await asyncio.wait({self._task})

    def take_chunk(self, _payload: bytes) -> bool:
        return False

    def put_last(self, kind: Kind, payload: bytes) -> bool:
        self.put(kind, payload)
        return True

    def put(self, kind: Kind, payload: bytes, *, more: bool = False) -> bool:
        self._frames.append((kind, payload))
        self._asked.clear()
        self._arrived.set()
        return True

    async def wait(self) -> None:
        await self._asked.wait()


@dataclass
class World:
    """A market with its nodes and clients."""

    clock: Clock = field(default_factory=Clock)
    limits: JobLimits = field(default_factory=JobLimits)
    store: JobStore = field(default_factory=MemoryStore)
    log_store: LogStore = field(default_factory=MemoryLogStore)
    report_store: ReportStore = field(default_factory=MemoryReportStore)
    shared: SharedStore | None = None
    funds: MemoryFunds = field(default_factory=MemoryFunds)
    bus: InProcessBus = field(default_factory=InProcessBus)
    market: Market = field(init=False)
    nodes: list[FakeNode] = field(default_factory=list)
    clients: list[Client] = field(default_factory=list)
    number: int = 0
    chance: float = 1.0
    """The market's uniform draw, from 0 to 1; 1 never explores."""

    def __post_init__(self) -> None:
        self.funds.free.setdefault(PAYER.address, Amount(100_000))
        self.market = self.make_market()

    def make_market(self) -> Market:
        return Market(
            domain=DOMAIN,
            signer=COORDINATOR,
            bus=self.bus,
            store=self.store,
            log_store=self.log_store,
            report_store=self.report_store,
            funds=self.funds,
            limits=self.limits,
            now=self.clock.now,
            tick=self.clock.tick,
            chance=lambda: self.chance,
            later=self.clock.later,
            draw=lambda _job, _attempt: self.chance,
            shared=self.shared,
        )

    async def restart(self) -> None:
        """Starts a new process on the same store; its nodes reconnect."""
        self.bus = InProcessBus()
        self.market = self.make_market()
        await self.market.start()
        for node in self.nodes:
            node.market, node.bus = self.market, self.bus
            node.connect()

    def node(self, name: str, slots: int = 4, **ask: Any) -> FakeNode:
        """Returns a connected provider with one ask."""
        key = person(name)
        node = FakeNode(self.market, self.bus, key, (make_ask(key, **ask),), slots)
        node.connect()
        self.nodes.append(node)
        return node

    def submission(self, *nodes: FakeNode, **changes: Any) -> Submission:
        """Returns a new job for these nodes; see `make_submission`."""
        self.number += 1
        job = JobId(self.number.to_bytes(16, "big"))
        values: dict[str, Any] = {"job": job, "now": int(self.clock.now())} | changes
        return make_submission(*(node.ask for node in nodes), **values)

    async def place(self, *nodes: FakeNode, **changes: Any) -> Client:
        """Places a job and reads its frames."""
        return self.read(await self.market.place_order(self.submission(*nodes, **changes)))

    def read(self, job: LiveJob) -> Client:
        client = Client(job)
        client.reads.set()
        client.task = asyncio.create_task(self.market.run(job, client), name="client")
        self.clients.append(client)
        return client

    async def started(self, *nodes: FakeNode, **changes: Any) -> Client:
        """Places a job that its first node gets."""
        client = await self.place(*nodes, **changes)
        await quiet()
        return client

    async def pass_time(self, seconds: float) -> None:
        """Moves the clock, then runs the timers that are due and the sweep."""
        self.clock.seconds += seconds
        self.clock.run_due()
        self.market.sweep()
        await quiet()

    async def stored(self, client: Client) -> State:
        """Returns the stored state of a job."""
        known = await self.store.job(client.job.id)
        assert known is not None
        return known.record.state

    def assert_idle(self) -> None:
        """Asserts that nothing is held: no live job, no exposure in flight, no slot."""
        assert self.market.live == 0
        assert self.market.exposure.in_flight == 0
        assert not self.clock.timers
        for node in self.nodes:
            known = self.market.book.node(node.address)
            assert known is None or known.assigned == 0


def altered(signed: Signed[Order], change: Callable[[Order], Order]) -> Signed[Order]:
    """Returns an order that was changed after it was signed."""
    return Signed(change(signed.message), signed.signature)


def hedged(submission: Submission, seconds: float) -> Submission:
    """A submission that asks for a second provider if there is no output after some seconds."""
    return replace(submission, hedge_after_ms=int(1_000 * seconds))


def with_orders(submission: Submission, change: Callable[[Signed[Order]], Signed[Order]]) -> Submission:
    """A submission whose orders were exchanged."""
    changed = tuple(replace(candidate, order=change(candidate.order)) for candidate in submission.candidates)
    return replace(submission, candidates=changed)


def hash_of(text: str) -> Hash:
    """Some hash."""
    return keccak(text.encode())
