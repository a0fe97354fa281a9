"""The market from Python: `async with Market(coordinator, wallet) as market: result = await market.chat(model, messages)`.

A job is sealed and signed here and checked here: what leaves this process is ciphertext and orders, and what comes back is
held against them. The coordinator is trusted with nothing but delay.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, Self, Unpack
from weakref import WeakValueDictionary

from tallystick.client import keys
from tallystick.client.answer import Answer
from tallystick.client.books import NewJob
from tallystick.client.candidates import affordable, wrap
from tallystick.client.choice import Choice, Explained, demand_of, explained, least
from tallystick.client.config import MAX_LABEL, ClientConfig
from tallystick.client.folder import ProofFolder
from tallystick.client.job import Desk, Job, Result, require_success
from tallystick.client.ledger import Ledger
from tallystick.client.lookups import Evidence, KnownJob
from tallystick.client.openai import Asked, Call
from tallystick.client.payer import Placed, Policy, Tab, sign_order, terms_for
from tallystick.client.pin import Pin
from tallystick.client.recover import Recovery
from tallystick.client.resolver import Resolver
from tallystick.client.resume import take_up
from tallystick.client.shortlist import Demand, Shortlists
from tallystick.client.tables import JobState
from tallystick.client.transport import Broken, Coordinator, Info, ModelOffer
from tallystick.protocol.eip712 import Domain, Signer, Verified
from tallystick.protocol.errors import BadMessage, Code, Fault, Refusal, TallyError, Unavailable
from tallystick.protocol.messages import Ask, Terms
from tallystick.protocol.reading import read_text
from tallystick.protocol.routes import CHAT, JSON
from tallystick.protocol.sealing import ContentKey, commit_request
from tallystick.protocol.types import Address, Amount, JobId, parse_address
from tallystick.protocol.wire import MAX_CANDIDATES, Submission, dumps

Named = tuple[str, str] | None
"""An idempotency key, and the fingerprint of its request."""
_STALE = (Code.NO_PROVIDER, Code.NODE_BUSY)
"""Refusals that a fresh shortlist may heal."""


class Market:
    """A client of one coordinator with one wallet. Use as an async context manager; many jobs may run at once.

    Entering raises BadMessage for a deployment file that cannot be read and Unavailable for a state file that cannot be used.
    The coordinator is first spoken to when it is needed. Leaving cancels the jobs that still run.
    """

    def __init__(
        self,
        coordinator_url: str,
        wallet: Signer,
        config: ClientConfig | None = None,
        *,
        clock: Callable[[], int] = time.time_ns,
        random: Callable[[int], bytes] = os.urandom,
    ) -> None:
        config = replace(config or ClientConfig(), coordinator=coordinator_url)
        self.config, self.wallet = config, wallet
        self._clock, self._random = clock, random
        self._coordinator = Coordinator(coordinator_url, config)
        self._shortlists = Shortlists(
            self._coordinator,
            wallet.address,
            limit=config.shortlist_size,
            seconds=config.shortlist_seconds,
            context=self._context,
            now=self._now,
        )
        self._policy = Policy(
            config.reserve_target, config.start_seconds, config.run_seconds, config.claim_seconds, config.max_fee_bps
        )
        self._pin = Pin()
        self._asking = asyncio.Lock()
        self._desk: Desk | None = None
        self._info: Info | None = None
        self._live: set[Job] = set()
        self._placing: set[JobId] = set()
        self._keys: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._idle = asyncio.Event()
        self._draining = False

    @classmethod
    def of(cls, config: ClientConfig, wallet: Signer) -> Market:
        """A market with everything from one config."""
        return cls(config.coordinator, wallet, config)

    @property
    def address(self) -> Address:
        """The payer."""
        return self.wallet.address

    @property
    def running(self) -> int:
        """Jobs under way."""
        return len(self._live)

    def __repr__(self) -> str:
        return f"Market({self.config.coordinator}, {self.address})"

    def _now(self) -> int:
        return self._clock() // 1_000_000_000

    # Opening and closing

    async def __aenter__(self) -> Self:
        self._pin = Pin.of(self.config)
        self._ledger = await Ledger.open(self.config.state_file(self.address), self.address)
        await self._coordinator.__aenter__()
        self._resolver = Resolver(
            self._ledger,
            self._coordinator,
            now=self._now,
            live=lambda: self._placing | {job.id for job in self._live},
            limit=self.config.max_jobs,
            every=self.config.start_seconds,
            recovery=Recovery.of(self._ledger, self._coordinator, self.wallet, self.info, now=self._now, config=self.config),
        )
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            await self.drain(0)
            await self._resolver.close(self.config.cancel_seconds)
        finally:
            await self._coordinator.__aexit__(kind, error, trace)
            await self._ledger.close()

    async def drain(self, seconds: float) -> None:
        """Takes no more jobs, lets those under way go on for so long, then cancels them and waits for their receipts."""
        self._draining = True
        if self._live:
            self._idle.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._idle.wait()
        await asyncio.gather(*(job.cancel() for job in list(self._live)), return_exceptions=True)

    async def info(self) -> Info:
        """Who the coordinator is; asked once. Raises Refusal if it is not the one, or not on the deployment, insisted on."""
        if self._info is None:
            async with self._asking:
                if self._info is None:
                    info = await self._coordinator.info()
                    self._pin.check(info, self.config.max_fee_bps)
                    self._resolver.keep()
                    self._info = info
                return self._info
        return self._info

    async def _open_desk(self) -> tuple[Info, Desk]:
        info = await self.info()
        if self._desk is None:
            self._desk = Desk(
                self.config,
                self._coordinator,
                self._ledger,
                self._resolver,
                info.domain,
                self._now,
                self._left,
                lambda job: any(other is not job and other.id == job.id for other in self._live),
                ProofFolder.of(self.config),
            )
        return info, self._desk

    def _left(self, job: Job) -> None:
        self._live.discard(job)
        if not self._live:
            self._idle.set()
        if job.disputed:
            self._shortlists.forget()

    async def _context(self) -> tuple[Domain, Iterable[Address]]:
        domain = (await self.info()).domain
        return domain, await self._ledger.frozen(domain)

    # Looking

    async def models(self) -> list[ModelOffer]:
        """The models on offer, as the coordinator tells them."""
        return await self._coordinator.models()

    async def shortlist(self, model: str, *, route: str = CHAT, **choice: Unpack[Choice]) -> list[Verified[Ask]]:
        """The verified asks that a job would be offered to, best first; what is not chosen here the config says.

        Raises Refusal or Unavailable that say why there is none.
        """
        found, _ = await self._shortlists.get(demand_of(self.config, model, route, choice))
        return found

    async def explain(self, model: str, *, route: str = CHAT, **choice: Unpack[Choice]) -> list[Explained]:
        """Every ask for a model and why it would not be offered a job; those that would come first. Places nothing."""
        demand = demand_of(self.config, model, route, choice)
        frozen = await self._ledger.frozen((await self.info()).domain)
        listed = await self._coordinator.explain(demand.to_json(self.address, MAX_CANDIDATES))
        return explained(listed, demand, frozen, self._now())

    # Jobs

    async def submit(
        self,
        path: str,
        body: bytes | Mapping[str, Any],
        *,
        model: str | None = None,
        max_cost: Amount | None = None,
        keep: bool = False,
        key: str | None = None,
        label: str | None = None,
        content_type: str = JSON,
        **choice: Unpack[Choice],
    ) -> Job:
        """Seals, signs and posts a request to an OpenAI route such as /v1/chat/completions; returns once it is admitted.

        Bytes go to the engine as they are. `max_cost` (base units) bounds what this job can cost, as do the config's budgets,
        those of its workload `label` among them. With `keep`, the job has a `proof` at its end. With an idempotency `key` a
        job survives a lost connection, of this process too, and the same request with the same key is that job. Raises
        TallyError: then nothing is owed but what an earlier job of the key costs.
        """
        raw = body if isinstance(body, bytes) else dumps(dict(body))
        if len(raw) > self.config.max_body_bytes:
            raise Refusal(
                Code.BODY_TOO_LARGE, f"the request has {len(raw)} bytes, at most {self.config.max_body_bytes} are taken"
            )
        label = self.config.label if label is None else read_text(label, "label", MAX_LABEL)
        asked = Asked.of(path, raw, content_type, label)
        call = asked.call
        if model is not None and model != call.model:
            raise BadMessage(f"model: {model!r} was asked for, but the body names {call.model!r}")
        if self._draining:
            raise Unavailable(Code.NODE_BUSY, "this client is stopping", fault=Fault.CLIENT)
        if len(self._live) >= self.config.max_jobs:
            raise Unavailable(Code.NODE_BUSY, f"this client already runs {len(self._live)} jobs", fault=Fault.CLIENT)
        demand = demand_of(self.config, call.model, path, choice)
        limit = least(self.config.max_cost, max_cost)
        cap = None if limit is None else Amount(limit)
        if key is None:
            return await self._find_and_place(asked, demand, cap, keep=keep)
        request = keys.fingerprint(path, raw)
        async with self._keys.setdefault(keys.check_key(key), asyncio.Lock()):
            known = await self._ledger.keyed(key)
            if known is None:
                return await self._find_and_place(asked, demand, cap, keep=keep, named=(key, request))
            keys.check_same(known, request)
            info, desk = await self._open_desk()
            job = await take_up(desk, info.coordinator, known, asked, keep_bytes=self._room(desk, keep))
            self._live.add(job)
            return job

    async def _find_and_place(self, asked: Asked, demand: Demand, cap: Amount | None, *, keep: bool, named: Named = None) -> Job:
        asks, remembered = await self._shortlists.get(demand)
        try:
            return await self._place(asked, asks, cap, keep=keep, named=named, ranked=demand.ranked)
        except Unavailable as error:
            self._shortlists.forget(demand)
            if not remembered or error.code not in _STALE:
                raise
        asks, _ = await self._shortlists.get(demand)
        return await self._place(asked, asks, cap, keep=keep, named=named, ranked=demand.ranked)

    def _room(self, desk: Desk, keep: bool) -> int:
        return self.config.max_answer_bytes if keep or desk.proofs is not None else 0

    async def _place(
        self,
        asked: Asked,
        asks: Sequence[Verified[Ask]],
        max_cost: Amount | None,
        *,
        keep: bool,
        named: Named,
        ranked: bool,
    ) -> Job:
        began = asyncio.get_running_loop().time()
        info, desk = await self._open_desk()
        await self._resolver.recovery.know(ask.message.provider for ask in asks)
        job, key = JobId(self._random(16)), ContentKey.new(self._random)
        call, plain = asked.call, asked.plain
        commitment = commit_request(key.commitment_key, job, plain)
        drafts: list[tuple[Address, Terms]] = []
        for ask in self._sold(call, asks):
            wanted = call.most_output(self.config.default_max_output_tokens, ask.message.max_output_tokens)
            terms = terms_for(ask, job=job, commitment=commitment, output_tokens=wanted, body_bytes=len(asked.body))
            drafts.append((ask.message.provider, terms))
        now = self._now()
        new = NewJob(
            domain=info.domain,
            payer=self.address,
            job=job,
            model=call.model,
            path=asked.head.path,
            commitment_key=key.commitment_key,
            created_at=now,
            label=asked.label,
            expires_at=now + self.config.start_seconds + self.config.run_seconds,
        )
        within = affordable(drafts, max_cost)
        async with self._closing(job, named):
            placed = await self._sign(info, new, within)
            candidates = wrap(job, key, placed, asks)
            header = Submission(job, candidates, b"", ranked).dumps()
            if named is not None:
                keyed = keys.Keyed(*named, job, key.secret, header, now)
                if (await self._ledger.keep_key(keyed, now - self.config.key_seconds)).job != job:
                    raise Unavailable(Code.NODE_BUSY, "another process placed this key's job just now", fault=Fault.CLIENT)
            linger = None if named is None else self.config.linger_seconds
            response = await self._coordinator.submit(header + key.seal_request(job, plain), linger=linger)
        room = self._room(desk, keep)
        answer = Answer(job, key, {p.order.digest: p for p in placed}, info.domain, info.coordinator, keep_bytes=room)
        made = Job(desk, answer, response, call, plain, keyed=named is not None, began=began)
        self._live.add(made)
        return made

    def _sold(self, call: Call, asks: Sequence[Verified[Ask]]) -> list[Verified[Ask]]:
        """The asks that sell as much output as the call names."""
        wanted = call.output_tokens or 0
        found = [ask for ask in asks if wanted <= ask.message.max_output_tokens]
        if not found:
            most = max(ask.message.max_output_tokens for ask in asks)
            text = f"{wanted} output tokens asked for; providers of {call.model!r} sell at most {most} a request"
            raise Refusal(Code.ORDER_TERMS, text)
        return found

    async def _sign(self, info: Info, job: NewJob, drafts: Sequence[tuple[Address, Terms]]) -> list[Placed]:
        now_ns = self._clock()

        def sign(tab: Tab, provider: Address, terms: Terms) -> Placed:
            return sign_order(
                tab,
                terms,
                signer=self.wallet,
                provider=provider,
                coordinator=info.coordinator,
                domain=info.domain,
                policy=self._policy,
                now_ns=now_ns,
            )

        placed = await self._ledger.take(job, drafts, sign, self.config.budgets)
        if not placed:
            text = f"every provider found for {job.model!r} once gave this wallet a dishonest receipt"
            raise Refusal(Code.NO_PROVIDER, text, fault=Fault.PROVIDER)
        return placed

    @contextlib.asynccontextmanager
    async def _closing(self, job: JobId, named: Named) -> AsyncIterator[None]:
        """However placing a job fails, its orders do not stay open longer than they must; those of a keyed job that may have
        arrived wait for the next request with the key.
        """
        self._placing.add(job)  # until it is among the live ones: nobody else is to settle it meanwhile
        try:
            yield
        except (Broken, asyncio.CancelledError):
            if named is None:
                self._resolver.abandon(job)
            raise
        except TallyError as error:
            if named is not None and (known := await self._ledger.keyed(named[0])) is not None and known.job == job:
                await self._ledger.forget_key(named[0])
            await self._ledger.end(job, JobState.FAILED, str(error), self._now())
            raise
        finally:
            self._placing.discard(job)

    async def chat(self, model: str, messages: Sequence[Mapping[str, Any]], **options: Any) -> Result:
        """One chat completion, not streamed; options are OpenAI's (max_tokens, temperature, …). `result.text` is the answer.

        Raises TallyError, also for an error answer of the engine.
        """
        body = {"model": model, "messages": list(messages)} | options | {"stream": False}
        async with await self.submit(CHAT, body) as job:
            return require_success(await job.result())

    # Remembering

    async def find(self, job: JobId) -> KnownJob | None:
        """What this wallet's ledger knows of a job."""
        return await self._ledger.find(job)

    async def tab(self, provider: str) -> Tab:
        """The tab with one provider: accepted, open caps, highest ceiling signed, in base units."""
        info = await self.info()
        return await self._ledger.tab(info.domain, parse_address(provider), self._now())

    async def evidence(self) -> list[Evidence]:
        """Dishonest receipts, kept for third parties."""
        return await self._ledger.evidence()
