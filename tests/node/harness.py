"""The peers of a node in tests: a payer and a coordinator with their signatures, and a client that opens the responses."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from node.domain.admission_rules import AdmissionRules
from node.domain.order_admission import Admission, AdmittedJob, LinkIdentity
from node.domain.published_asks import Offer, PublishedAsks, Seller
from node.domain.tabs import CreditLimits, Tabs
from node.jobs.coordinator_credit import CoordinatorCredit
from node.jobs.deadlines import Deadlines
from node.jobs.pooled_engine import PooledEngine
from node.jobs.receipt_signer import ReceiptSigner
from node.jobs.runner import JobRunner
from node.ports import Engine
from node.testing.memory import MemoryChain, MemoryLink, MemoryStore, RecordingObserver
from tallystick.protocol.eip712 import Domain, Signer, Verified, read_signed_bytes
from tallystick.protocol.jobs import CHARGES, Charge
from tallystick.protocol.link import Capacity
from tallystick.protocol.messages import Ask, Order, Outcome, Receipt, Spec, Terms
from tallystick.protocol.plaintext_heads import RequestHead, ResponseHead, join_request, load_response_head
from tallystick.protocol.pricing import Prices, worst_case
from tallystick.protocol.sealing import X25519, ContentKey, Opener, SealingKey, Transcript, commit_request, is_evidence, wrap_key
from tallystick.protocol.tab import check_receipt
from tallystick.protocol.tiers import Tiers
from tallystick.protocol.types import Address, JobId
from tallystick.protocol.wire import Candidate, Dispatch, Failure, Kind, dumps
from tests.builders import build_match, build_order, terms_of

NOW = 1_800_000_000
DOMAIN = Domain(31_337, Address("0x" + "5e" * 20))
CHAT = RequestHead("/v1/chat/completions")
PRICES = Prices(100_000, 50_000, 400_000)


def signer(name: str) -> Signer:
    """Returns the same key for the same name."""
    return Signer(hashlib.sha256(name.encode()).digest())


PROVIDER, COORDINATOR, PAYER = signer("provider"), signer("coordinator"), signer("payer")
SEALING = SealingKey(X25519, hashlib.sha256(b"sealing").digest())
OFFER = Offer("model", "engine", "model", PRICES, 8_192, 1_024, Spec())
LINK = LinkIdentity(PROVIDER.address, COORDINATOR.address, DOMAIN)


def make_asks(*offers: Offer, now: int = NOW, sealing: SealingKey = SEALING) -> PublishedAsks:
    """Returns published asks for some offers."""
    asks = PublishedAsks(Seller(PROVIDER.address, sealing.suite, sealing.public), lambda ask: PROVIDER.sign(ask, DOMAIN))
    asks.publish(offers or (OFFER,), now)
    return asks


@dataclass
class PlacedJob:
    """A job as its client created it."""

    job: JobId
    key: ContentKey
    order: Verified[Order]
    terms: Terms
    dispatch: Dispatch
    body: bytes

    def read(self, chunks: list[bytes]) -> tuple[ResponseHead | None, bytes, Transcript, bool]:
        """Opens sealed chunks as a client does; returns head, body, transcript, and whether the last chunk came."""
        opener, transcript = Opener(self.key, self.job, self.order.digest), Transcript(self.key.commitment_key, self.order.digest)
        opened = []
        for chunk in chunks:
            plain = opener.open(chunk)
            if is_evidence(chunk):
                continue
            opened.append(plain)
            transcript.add(plain)
        head = load_response_head(opened[0]) if opened else None
        return head, b"".join(opened[1:]), transcript, opener.finished

    def evidence(self, chunks: list[bytes]) -> bytes:
        """Opens sealed chunks as a client does; returns the rows of evidence in them."""
        opener = Opener(self.key, self.job, self.order.digest)
        return b"".join(plain for chunk in chunks if (plain := opener.open(chunk)) and is_evidence(chunk))


@dataclass
class Client:
    """A payer that orders from one node. Keyword arguments of `order` change single members."""

    payer: Signer = PAYER
    ceiling: int = 0
    numbers: Any = field(default_factory=lambda: itertools.count(1))

    def order(
        self,
        ask: Verified[Ask],
        body: dict[str, Any] | bytes | None = None,
        *,
        head: RequestHead = CHAT,
        now: int = NOW,
        job: JobId | None = None,
        terms_with: dict[str, Any] | None = None,
        order_with: dict[str, Any] | None = None,
        match_with: dict[str, Any] | None = None,
        coordinator: Signer = COORDINATOR,
        output: int = 100,
    ) -> PlacedJob:
        """Seals, signs and matches a job."""
        number = next(self.numbers)
        if not isinstance(body, bytes):
            body = dumps(body if body is not None else {"model": "model", "messages": [], "stream": True, "max_tokens": 100})
        job = job or JobId(hashlib.sha256(f"{self.payer.address} {number}".encode()).digest()[:16])
        key = ContentKey(hashlib.sha256(b"content" + job).digest())
        plain = join_request(head, body)
        values: dict[str, Any] = {
            "max_cost": worst_case(len(body), output, PRICES),
            "max_output_tokens": output,
            "job": job,
            "request_commitment": commit_request(key.commitment_key, job, plain),
        }
        terms = terms_of(ask, **(values | (terms_with or {})))
        self.ceiling += terms.max_cost
        members: dict[str, Any] = {
            "seq": number,
            "deadline": now + 60,
            "claim_by": now + 86_400,
            "max_fee_bps": 100,
            "coordinator": coordinator.address,
            "terms_hash": terms.struct_hash(),
        }
        order_message = build_order(self.payer.address, ask.message.provider, self.ceiling, **(members | (order_with or {})))
        order = self.payer.sign(order_message, DOMAIN)
        wrapped = wrap_key(
            key,
            ask.message.sealing_suite,
            ask.message.sealing_key,
            job=job,
            order_hash=order.digest,
            provider=order.message.provider,
        )
        leaf: dict[str, Any] = {"at": now, "job": job} | (match_with or {})
        match = build_match(order, terms, **leaf)
        dispatch = Dispatch(match, Candidate(order, terms, wrapped), key.seal_request(job, plain))
        return PlacedJob(job, key, order, terms, dispatch, body)


def admitted(placed: PlacedJob) -> AdmittedJob:
    """Returns an admitted job."""
    return AdmittedJob(placed.job, placed.order, placed.terms, OFFER)


class RunnerHarness:
    """A job runner on in-memory ports, with a coordinator's link and a client."""

    def __init__(
        self,
        engine: Engine,
        *,
        slots: int = 2,
        deadlines: Deadlines | None = None,
        credit: CreditLimits | None = None,
        chain: MemoryChain | None = None,
        store: MemoryStore | None = None,
        offer: Offer = OFFER,
        sealing: SealingKey = SEALING,
        rules: AdmissionRules | None = None,
        tiers: Tiers | None = None,
    ) -> None:
        self.now = NOW
        self.asks = make_asks(offer, sealing=sealing)
        self._changes = asyncio.Event()
        self.engine = PooledEngine(engine, slots, on_change=self._changes.set)
        self.store, self.chain, self.observer = store or MemoryStore(), chain or MemoryChain(), RecordingObserver()
        self.tabs = Tabs(credit or CreditLimits())
        clock: Callable[[], float] = lambda: self.now  # noqa: E731
        self.coordinator_credit = CoordinatorCredit(self.store, rules or AdmissionRules(), now=clock)
        self.receipt_signer = ReceiptSigner(signer=PROVIDER, domain=DOMAIN, tabs=self.tabs, store=self.store, now=clock)
        self.runner = JobRunner(
            provider=PROVIDER.address,
            domain=DOMAIN,
            sealing_key=sealing,
            asks=self.asks,
            engines={offer.engine: self.engine},
            receipt_signer=self.receipt_signer,
            coordinator_credit=self.coordinator_credit,
            tabs=self.tabs,
            store=self.store,
            chain=self.chain,
            observer=self.observer,
            rules=rules,
            deadlines=deadlines or Deadlines(),
            now=clock,
            tiers=tiers,
            on_capacity_change=self._changes.set,
            on_stranded_receipt=self._strand,
        )
        self.stranded = 0
        self.link = self.connect()
        self.client = Client()

    def _strand(self) -> None:
        self.stranded += 1

    def connect(self) -> MemoryLink:
        """Returns a link whose coordinator confirms at once that it has output."""
        link = MemoryLink(COORDINATOR.address)
        link.on_first_chunk = lambda job: self.runner.grant_credit(link, job, bytes(4))
        return link

    def capacity(self) -> Capacity:
        """Returns the capacity of the only engine."""
        (capacity,) = self.runner.capacities().values()
        return capacity

    async def ended(self) -> None:
        """Waits until the node has no job left."""
        while self.runner.running:
            self._changes.clear()
            await self._changes.wait()

    def dispatch(self, body: dict[str, Any] | bytes | None = None, **changes: Any) -> PlacedJob:
        """Dispatches a new job to the node."""
        placed = self.client.order(self.asks.current[0], body, **changes)
        self.dispatch_again(placed)
        return placed

    def dispatch_again(self, placed: PlacedJob) -> None:
        """Dispatches a job to the node, perhaps once more."""
        self.runner.dispatch(self.link, placed.job, placed.dispatch.dumps())

    async def receipt(self, placed: PlacedJob) -> Receipt:
        """Returns the job's receipt, checked as coordinator and client would: one that may charge follows a last chunk."""
        raw = await self.link.until(Kind.RECEIPT, placed.job)
        receipt = read_signed_bytes(Receipt, raw).verify(DOMAIN).message
        check_receipt(placed.order, placed.terms, receipt)
        _, _, transcript, finished = self.answer(placed)
        may_charge = CHARGES[Outcome(receipt.outcome)] is not Charge.NOTHING
        assert finished is (may_charge or receipt.outcome == Outcome.UPSTREAM_ERROR)
        assert receipt.result_commitment == transcript.commitment
        return receipt

    async def refusal_receipt(self, placed: PlacedJob) -> Receipt:
        """Returns the receipt at no cost that came with the job's failure."""
        failure = Failure.loads(await self.link.until(Kind.FAIL, placed.job))
        assert failure.receipt is not None
        receipt = failure.receipt.verify(DOMAIN).message
        check_receipt(placed.order, placed.terms, receipt)
        assert receipt.cost == 0
        return receipt

    async def failure(self, placed: PlacedJob) -> dict[str, Any]:
        """Returns the error of a job that failed."""
        raw = await self.link.until(Kind.FAIL, placed.job)
        error: dict[str, Any] = Failure.split(raw)[0]["error"]
        return error

    def answer(self, placed: PlacedJob) -> tuple[ResponseHead | None, bytes, Transcript, bool]:
        """Returns what the client can read so far."""
        return placed.read(self.link.payloads(placed.job, Kind.CHUNK))


def admission(asks: PublishedAsks, *seen: PlacedJob, rules: AdmissionRules | None = None) -> Admission:
    """Returns the check of dispatches, with a memory of some jobs."""
    digests, jobs = {placed.order.digest for placed in seen}, {placed.job for placed in seen}
    return Admission(asks, rules or AdmissionRules(), lambda digest, job: digest in digests or job in jobs)
