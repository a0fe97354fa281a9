"""The load of the relay benchmark: OpenAI requests to any base URL, or signed jobs to a coordinator with an engineless node."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, cast

import aiohttp
import orjson
from websockets.asyncio.client import connect

from scripts.relay.mock import BODY, MODEL
from tallystick.client.config import ClientConfig
from tallystick.client.coordinator.http_client import CoordinatorClient
from tallystick.protocol.eip712 import Domain, Signed, Signer, Verified
from tallystick.protocol.link import Beat, Capacity, Challenge, Hello, Listing, endpoint_of
from tallystick.protocol.messages import Ask, Connect, Order, Outcome, Receipt, Spec, Terms
from tallystick.protocol.plaintext_heads import RequestHead, ResponseHead, dump_response_head, join_request
from tallystick.protocol.pricing import Usage, charge
from tallystick.protocol.sealing import X25519, ContentKey, Sealer, SealingKey, commit_request, wrap_key
from tallystick.protocol.types import ZERO_ADDRESS, ZERO_HASH, Address, Amount, Hash, JobId
from tallystick.protocol.wire import (
    INITIAL_CREDIT,
    MAX_BODY,
    Candidate,
    Dispatch,
    Kind,
    Submission,
    dumps,
    loads,
    pack_link,
    unpack_link,
)
from tallystick.runtime.websocket_client import FastPathConnection

CAP = Amount(1_000)
CHAT = "/v1/chat/completions"
TEXT = "word " * 60
"""The prompt: 300 bytes."""
BARE_MODEL = "bench-bare"
HOLD_SECONDS = 20.0
"""Between two chunks of an answer that is held; a coordinator waits longer for the next one."""
_REPLY, _PIECE = b"x" * BODY, b"x" * 150


@dataclass(slots=True)
class Latencies:
    """Measured by the clients: seconds to the first text and to the end of each request, and seconds of the whole run."""

    first: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    seconds: float = 0.0
    chunks: int = 0


def percentile(values: list[float], share: float) -> float:
    """The value below which this share of the values lies."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


# ------------------------------------------------------------------------------------------------------- OpenAI requests


def _body(chunks: int | None, gap: float, options: Mapping[str, object]) -> bytes:
    request: dict[str, object] = {"model": MODEL, "messages": [{"role": "user", "content": TEXT}], "max_tokens": 512, **options}
    if chunks is not None:
        request |= {"stream": True, "user": f"{chunks} {gap}"}
    return orjson.dumps(request)


async def ask(
    url: str,
    *,
    requests: int,
    concurrency: int,
    chunks: int | None = None,
    gap: float = 0.0,
    options: Mapping[str, object] = MappingProxyType({}),
) -> Latencies:
    """Sends requests, `concurrency` at a time; if `chunks` is given, streamed in so many pieces, `gap` seconds apart.

    `options`: further members of the request's body.
    """
    latencies, body = Latencies(), _body(chunks, gap, options)
    remaining = iter(range(requests))
    headers = {"content-type": "application/json", "authorization": "Bearer none"}
    timeout = aiohttp.ClientTimeout(total=120)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout, headers=headers) as session:
        began = time.perf_counter()
        await asyncio.gather(*(_client(session, url + CHAT, body, remaining, latencies) for _ in range(concurrency)))
        latencies.seconds = time.perf_counter() - began
    return latencies


async def _client(session: aiohttp.ClientSession, url: str, body: bytes, remaining: Iterator[int], latencies: Latencies) -> None:
    for _ in remaining:
        began, first, words, tail = time.perf_counter(), 0.0, 0, b""
        async with session.post(url, data=body) as response:
            async for piece in response.content.iter_any():
                tail = tail[-16:] + piece
                if b'"content":"word' in tail and not first:
                    first = time.perf_counter() - began
                words += piece.count(b'"content":"word')
            if response.status != 200:
                raise RuntimeError(f"{url} answered {response.status}: {tail[-300:]!r}")
        latencies.first.append(first or time.perf_counter() - began)
        latencies.whole.append(time.perf_counter() - began)
        latencies.chunks += words


# ------------------------------------------------------------------------------------------------- the coordinator alone


class EnginelessNode:
    """A node without an engine: answers each dispatch with a sealed reply of `chunks` pieces and a signed receipt.

    Its frames of one turn of the event loop leave in one write, as those of a real node do.
    """

    def __init__(self, socket: FastPathConnection, signer: Signer, domain: Domain, key: SealingKey, ask: Verified[Ask]) -> None:
        self.socket, self._signer, self._domain, self._key, self.ask = socket, signer, domain, key, ask
        self.chunks = 1
        self.piece = _PIECE
        """What a chunk of several carries."""
        self.holding: asyncio.Event | None = None
        """If it is given, each answer goes on slowly from its first chunk until the event is set."""
        self._seq = self._total = 0
        self._credit: dict[JobId, asyncio.Semaphore] = {}
        self._jobs: set[asyncio.Task[None]] = set()

    @classmethod
    async def join(
        cls, url: str, signer: Signer, domain: Domain, *, models: Sequence[str] = (BARE_MODEL,), source: str | None = None
    ) -> EnginelessNode:
        """Connects and publishes its asks to the coordinator; `ask` is that for the first model. `source`: its own IP address."""
        key = SealingKey(X25519, secrets.token_bytes(SealingKey.secret_bytes(X25519)))
        message = Ask(
            provider=signer.address,
            model=models[0],
            input_price=1_000_000,
            cached_input_price=1_000_000,
            output_price=1_000_000,
            context_tokens=8_192,
            max_output_tokens=4_096,
            sealing_suite=X25519,
            sealing_key=key.public,
            valid_from=0,
            valid_until=int(time.time()) + 3_600,
            seq=1,
            spec=Spec(),
        )
        asks = tuple(signer.sign(replace(message, model=model), domain) for model in models)
        local = None if source is None else (source, 0)
        address = f"ws{url.removeprefix('http')}/v1/node"
        options: dict[str, Any] = {"compression": None, "ping_interval": None, "proxy": None, "local_addr": local}
        connection = await connect(address, create_connection=FastPathConnection, max_size=MAX_BODY, **options)
        socket = cast("FastPathConnection", connection)
        challenge = Challenge.from_json(loads(unpack_link(await socket.recv())[2], "challenge"))
        answer = Connect(
            provider=signer.address,
            coordinator=challenge.coordinator,
            challenge=challenge.challenge,
            endpoint=endpoint_of(url),
        )
        hello = Hello(signer.sign(answer, domain), Listing.of_one_group(asks, Capacity(1_000, 1_000)), "bench")
        await socket.send(pack_link(Kind.HELLO, payload=dumps(hello.to_json())))
        await socket.recv()
        return cls(socket, signer, domain, key, asks[0])

    async def run(self) -> None:
        """Serves until cancelled."""
        beats = asyncio.create_task(self._beat())
        try:
            async for frame in self.socket:
                kind, job, payload = unpack_link(frame)
                if kind is Kind.DISPATCH:
                    self._credit[job] = asyncio.Semaphore(INITIAL_CREDIT)
                    task = asyncio.create_task(self._answer(job, Dispatch.loads(payload)))
                    self._jobs.add(task)
                    task.add_done_callback(self._jobs.discard)
                elif kind is Kind.CREDIT and job in self._credit:
                    for _ in range(int.from_bytes(payload, "big")):
                        self._credit[job].release()
        finally:
            beats.cancel()

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(5)
            await self.socket.send(pack_link(Kind.BEAT, payload=dumps(Beat({}).to_json())))

    async def _answer(self, job: JobId, dispatch: Dispatch) -> None:
        order, terms = dispatch.candidate.order.message, dispatch.candidate.terms
        order_hash = dispatch.match.order_hash
        key = self._key.unwrap(dispatch.candidate.wrapped_key, job=job, order_hash=order_hash, provider=order.provider)
        sealer, send, credit = Sealer(key, job, order_hash), self._send, self._credit[job]
        send(pack_link(Kind.ACCEPT, job))
        await credit.acquire()
        send(pack_link(Kind.CHUNK, job, sealer.seal(dump_response_head(ResponseHead(200, "application/json")))))
        while self.holding is not None and not self.holding.is_set():
            await credit.acquire()
            send(pack_link(Kind.CHUNK, job, sealer.seal(_PIECE)))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(HOLD_SECONDS):
                    await self.holding.wait()
        for remaining in range(self.chunks - 1, -1, -1):
            await credit.acquire()
            send(pack_link(Kind.CHUNK, job, sealer.seal(self.piece if self.chunks > 1 else _REPLY, last=remaining == 0)))
        send(pack_link(Kind.RECEIPT, job, self._receipt(order, order_hash, terms).to_bytes()))
        del self._credit[job]

    def _send(self, frame: bytes) -> None:
        if not self.socket.send_parts((frame,)):
            raise RuntimeError("the coordinator closed the link")

    def _receipt(self, order: Order, order_hash: Hash, terms: Terms) -> Signed[Receipt]:
        usage = Usage(9, 0, 9)
        cost = charge(terms, usage, Outcome.COMPLETED)
        self._seq, self._total = self._seq + 1, self._total + cost
        receipt = Receipt(
            payer=order.payer,
            provider=order.provider,
            seq=self._seq,
            cumulative_cost=Amount(self._total),
            order_hash=order_hash,
            result_commitment=ZERO_HASH,
            input_tokens=usage.input,
            cached_input_tokens=usage.cached,
            output_tokens=usage.output,
            cost=cost,
            outcome=Outcome.COMPLETED,
            finished_at=int(time.time()),
            evidence_root=ZERO_HASH,
        )
        return self._signer.sign(receipt, self._domain)


def sign_jobs(
    count: int, *, payer: Signer, coordinator: Address, domain: Domain, ask: Verified[Ask], first: int = 0
) -> list[bytes]:
    """Signs and seals `count` submissions for one provider, before the clock starts: signing is the work of clients.

    `first`: how many were signed for that provider before.
    """
    now, body, submissions = int(time.time()), _body(None, 0, {}), []
    for number in range(count):
        job, key = JobId(secrets.token_bytes(16)), ContentKey.new()
        plain = join_request(RequestHead(CHAT), body)
        terms = Terms(
            model=ask.message.model,
            ask=ask.digest,
            input_price=ask.message.input_price,
            cached_input_price=ask.message.cached_input_price,
            output_price=ask.message.output_price,
            max_cost=CAP,
            max_output_tokens=512,
            job=job,
            request_commitment=commit_request(key.commitment_key, job, plain),
        )
        order = Order(
            payer=payer.address,
            provider=ask.message.provider,
            ceiling=Amount(CAP * (first + number + 1)),
            reserve_target=Amount(0),
            seq=time.time_ns(),
            deadline=now + 300,
            claim_by=now + 7 * 86_400,
            max_fee_bps=500,
            coordinator=coordinator,
            terms_hash=terms.struct_hash(),
        )
        signed = payer.sign(order, domain)
        provider = ask.message.provider
        wrapped = wrap_key(key, X25519, ask.message.sealing_key, job=job, order_hash=signed.digest, provider=provider)
        submissions.append(Submission(job, (Candidate(signed, terms, wrapped),), key.seal_request(job, plain)).dumps())
    return submissions


async def post(url: str, jobs: list[bytes], *, concurrency: int, account: Address = ZERO_ADDRESS) -> Latencies:
    """Submits signed jobs on one link to a coordinator, as a gateway does, and reads their frames to the receipt.

    `account`: the payer, if the coordinator has several replicas.
    """
    latencies, remaining = Latencies(), iter(jobs)
    async with CoordinatorClient(url, ClientConfig(coordinator=url), account=account) as client:
        began = time.perf_counter()
        await asyncio.gather(*(_submitter(client, remaining, latencies) for _ in range(concurrency)))
        latencies.seconds = time.perf_counter() - began
    return latencies


async def _submitter(client: CoordinatorClient, remaining: Iterator[bytes], latencies: Latencies) -> None:
    for job in remaining:
        began, last = time.perf_counter(), (Kind.BEAT, b"")
        stream = await client.submit(job)
        while last[0] not in (Kind.RECEIPT, Kind.FAIL):
            frames = await stream.read()
            latencies.chunks += sum(kind is Kind.CHUNK for kind, _ in frames)
            last = frames[-1]
        stream.close()
        if last[0] is not Kind.RECEIPT:
            raise RuntimeError(f"a job failed: {last[1][:300]!r}")
        latencies.whole.append(time.perf_counter() - began)
