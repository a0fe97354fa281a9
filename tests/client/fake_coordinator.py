"""A fake coordinator and its providers in one, with real keys, over real HTTP. A script plays one job: `honest` by default.
The fake checks what the client sends by the protocol's rules, so every test also proves that orders, seals and
commitments are right.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from typing import Any

import orjson
from aiohttp import web

from tallystick.client.sdk.market import Market
from tallystick.protocol.access import load_access
from tallystick.protocol.eip712 import Signed, Verified, read_signed
from tallystick.protocol.errors import Code, Refusal, TallyError, Unavailable
from tallystick.protocol.jobs import ENDS, TERMINAL, State, step
from tallystick.protocol.link import LateReceipt
from tallystick.protocol.messages import Access, Inquiry, Order, Outcome, Receipt
from tallystick.protocol.plaintext_heads import RequestHead, ResponseHead, dump_response_head, split_request
from tallystick.protocol.pricing import Usage, charge, prices_of, worst_case
from tallystick.protocol.queue_place import QueuePlace
from tallystick.protocol.routes import ALWAYS, serves
from tallystick.protocol.sealing import ContentKey, Sealer, Transcript, commit_request
from tallystick.protocol.tab import Security
from tallystick.protocol.types import Address, Amount, JobId, parse_address, parse_job_id
from tallystick.protocol.wire import Candidate, Kind, Submission, dumps, pack_frame
from tests.builders import build_match, receipt_for
from tests.client.parties import DOMAIN, MODEL, Provider, signer

CHAT = "/v1/chat/completions"
JSON = "application/json"
EVENTS = "text/event-stream"
MESSAGES = [{"role": "user", "content": "What is a tally?"}]
BODY: dict[str, Any] = {"model": MODEL, "messages": MESSAGES, "max_tokens": 100}
STREAM = BODY | {"stream": True}
TRUST = Security(Amount(0), Amount(10**12), Amount(0))


_OPTIONAL_CRITERIA = {
    "needs",
    "essential",
    "inputTokens",
    "likelyTokens",
    "concurrent",
    "maxOutput",
    "weights",
    "require",
    "minStake",
    "minReputation",
    "sort",
    "batch",
}
_OF_ATTEMPT = ("candidate", "order", "provider", "key", "sealer", "transcript", "matched")


class Session:
    """One job and its script. `survives`: the job goes on after its stream has ended."""

    def __init__(self, market: FakeMarket, submission: Submission, response: web.StreamResponse) -> None:
        self.market, self.submission, self.response = market, submission, response
        self.cancelled = asyncio.Event()
        self.state = State.QUEUED
        self.receipt: Signed[Receipt] | None = None
        self.attempts = 0
        self.tried: list[dict[str, Any]] = []
        self.survives = False
        self.further_posted = asyncio.Event()
        """Set when the client posts further orders."""
        self.place: QueuePlace | None = None
        """Its place in the queue as the coordinator shows it."""
        self.provider = market.providers[0]
        self.candidate = submission.candidates[0]
        self.head = RequestHead("")
        self.body = b""
        self.output_bytes = 0

    @property
    def job(self) -> JobId:
        return self.submission.job

    @property
    def request(self) -> dict[str, Any]:
        parsed: dict[str, Any] = orjson.loads(self.body)
        return parsed

    async def send(self, kind: Kind, payload: bytes = b"") -> None:
        await self.response.write(pack_frame(kind, payload))

    async def hedge(self, index: int, **changes: Any) -> None:
        """Matches a candidate beside the one that was matched last. The script goes on with it; `swap` exchanges the two."""
        former = {name: getattr(self, name) for name in _OF_ATTEMPT}
        await self.match(index, kind=Kind.HEDGE, **changes)
        self.other = former

    def swap(self) -> None:
        """The script goes on with the other one of two attempts."""
        current = {name: getattr(self, name) for name in _OF_ATTEMPT}
        for name, value in self.other.items():
            setattr(self, name, value)
        self.other = current

    async def match(self, index: int = 0, *, kind: Kind = Kind.MATCH, **changes: Any) -> None:
        """Matches a candidate and opens its sealed request, as its node would."""
        self.take(index)
        match = build_match(self.order, self.candidate.terms, **({"attempt": self.attempts} | changes))
        self.attempts += 1
        self.tried.append({"attempt": len(self.tried), "provider": self.provider.address, "state": "failed", "reason": ""})
        self.matched = match.dumps()
        await self.send(kind, self.matched)

    def take(self, index: int) -> None:
        self.candidate = self.submission.candidates[index]
        self.order = self.candidate.order.verify(DOMAIN)
        self.provider = next(p for p in self.market.providers if p.address == self.order.message.provider)
        self.key = self.open_seal(self.candidate, self.provider)
        self.provider.tab = self.provider.tab.admit(self.order.message, self.candidate.terms.max_cost, TRUST)
        self.sealer = Sealer(self.key, self.job, self.order.digest)
        self.transcript = Transcript(self.key.commitment_key, self.order.digest)

    def open_seal(self, candidate: Candidate, provider: Provider) -> ContentKey:
        """The node's checks of a job, in short."""
        terms, digest = candidate.terms, candidate.order.message.digest(DOMAIN)
        key = provider.sealing.unwrap(candidate.wrapped_key, job=self.job, order_hash=digest, provider=provider.address)
        plain = key.open_request(self.job, self.submission.sealed)
        assert commit_request(key.commitment_key, self.job, plain) == terms.request_commitment
        self.head, self.body = split_request(plain)
        assert terms.max_cost >= worst_case(len(self.body), terms.max_output_tokens, prices_of(terms))
        assert terms.ask == provider.ask.digest
        return key

    async def chunk(self, data: bytes, *, last: bool = False) -> None:
        self.transcript.add(data)
        self.output_bytes += len(data)
        await self.send(Kind.CHUNK, self.sealer.seal(data, last=last))

    async def evidence(self, rows: bytes) -> None:
        """Sends a chunk with rows of evidence."""
        await self.send(Kind.CHUNK, self.sealer.seal_evidence(rows))

    async def answer(self, status: int = 200, content_type: str = JSON) -> None:
        """Sends the response head."""
        await self.chunk(dump_response_head(ResponseHead(status, content_type)))

    def bill(self, usage: Usage | None = None, outcome: Outcome = Outcome.COMPLETED, **changes: Any) -> Verified[Receipt]:
        """Returns the provider's next receipt and advances its tab."""
        used = usage or Usage(min(10, len(self.body)), 0, 5)
        terms, provider = self.candidate.terms, self.provider
        tab = provider.tab
        values: dict[str, Any] = {"result_commitment": self.transcript.commitment, "finished_at": 2}
        receipt = receipt_for(self.order, terms, used, outcome, (tab.seq, tab.cumulative), **(values | changes))
        provider.tab = tab.record(charge(terms, used, outcome), terms.max_cost)
        self.receipt = provider.signer.sign(receipt, DOMAIN)
        self.state = step(State.STREAMING, ENDS[outcome])
        entry = next((entry for entry in self.tried if entry["provider"] == provider.address), None)
        if entry is not None:
            entry["receipt"] = self.receipt.to_json()
        return self.receipt

    def release(self, outcome: Outcome = Outcome.REFUSED, **changes: Any) -> Verified[Receipt]:
        """The provider's receipt at no cost for the attempt that was matched last; the job goes on."""
        state = self.state
        receipt = self.bill(Usage(0, 0, 0), outcome, **changes)
        self.receipt, self.state = None, state
        return receipt

    async def void(self, outcome: Outcome = Outcome.REFUSED, **changes: Any) -> None:
        """Sends that receipt."""
        await self.send(Kind.VOID, self.release(outcome, **changes).to_bytes())

    async def finish(self, usage: Usage | None = None, outcome: Outcome = Outcome.COMPLETED, **changes: Any) -> None:
        await self.send(Kind.RECEIPT, self.bill(usage, outcome, **changes).to_bytes())

    async def fail(self, error: TallyError) -> None:
        self.state = State.FAILED
        if self.attempts and not self.tried[-1].get("receipt"):
            self.provider.tab = self.provider.tab.drop(self.candidate.terms.max_cost)
        await self.send(Kind.FAIL, dumps(error.as_json()))

    async def cut(self) -> None:
        """Drops the connection."""
        await asyncio.sleep(0.02)
        transport = self.response._req.transport if self.response._req else None
        if transport is not None:
            transport.abort()

    def late(self, provider: Address) -> LateReceipt | None:
        """Returns the late receipt that a client without its ledger may be shown."""
        if self.receipt is None or self.provider.address != provider:
            return None
        return LateReceipt(self.receipt, self.candidate.order, self.candidate.terms)

    async def hang(self) -> None:
        await asyncio.sleep(30)


Script = Callable[[Session], Awaitable[None]]


def completion(text: str) -> bytes:
    """A chat completion as an engine sends it."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    usage = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
    whole = {"id": "x", "object": "chat.completion", "created": 1, "model": MODEL, "choices": [choice], "usage": usage}
    return orjson.dumps(whole)


def event(text: str, finish: str | None = None) -> bytes:
    """One event of a streamed chat completion."""
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": finish}
    piece = {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": MODEL, "choices": [choice]}
    return b"data: " + orjson.dumps(piece) + b"\n\n"


WORDS = ("A ", "split ", "tally ", "stick.")


async def honest(session: Session) -> None:
    """Answers with WORDS, streamed if the request asks for a stream."""
    await session.match()
    await session.send(Kind.BEAT)
    if session.request.get("stream"):
        await session.answer(200, EVENTS)
        for word in WORDS:
            await session.chunk(event(word))
        await session.chunk(b"data: [DONE]\n\n", last=True)
    elif session.head.path == "/v1/embeddings":
        await session.answer()
        vector = {"object": "embedding", "index": 0, "embedding": [0.5, 0.25]}
        whole = {"object": "list", "data": [vector], "model": MODEL, "usage": {"prompt_tokens": 3, "total_tokens": 3}}
        await session.chunk(orjson.dumps(whole), last=True)
        await session.finish(Usage(3, 0, 0))
        return
    else:
        await session.answer()
        await session.chunk(completion("".join(WORDS)), last=True)
    await session.finish()


class FakeMarket:
    """A fake market. Use `async with market.serve()`; then `url` is a coordinator's URL."""

    def __init__(self, *providers: Provider) -> None:
        self.signer = signer("coordinator")
        self.providers = list(providers) or [Provider.make("alice"), Provider.make("bob")]
        self.script: Script = honest
        self.sessions: dict[JobId, Session] = {}
        self.shortlists: list[dict[str, Any]] = []
        self.inquiries: list[Inquiry] = []
        self.submissions: list[Submission] = []
        self.cancels: list[JobId] = []
        self.killed = self.hangs = False
        self.refuses_further: TallyError | None = None
        """The answer to further orders, instead of taking them."""
        self.refusals: list[TallyError] = []
        self.busy = False
        """Whether jobs that do not wait are refused."""
        self.asks: Callable[[], list[Any]] = self._asks
        self.info: dict[str, Any] = {
            "name": "fake",
            "version": "0",
            "coordinator": self.signer.address,
            "chainId": DOMAIN.chain_id,
            "contract": DOMAIN.contract,
            "token": "0x" + "cd" * 20,
            "tokenDecimals": 6,
            "feeBps": 0,
            "protocol": 2,
        }
        self.url = ""
        self.requests: list[str] = []
        """The paths of all requests, oldest first."""
        self._runner: web.AppRunner | None = None
        self.forgets = False
        self.shows: list[LateReceipt] = []
        self.crash: Exception | None = None
        self.drops, self.keeps = 0, False
        self.connections: set[int] = set()
        self.before_models: Callable[[], Awaitable[None]] = _at_once

    def _asks(self) -> list[Any]:
        return [{"ask": provider.ask.to_json(), "free": 1} for provider in self.providers]

    @property
    def last(self) -> Session:
        """The latest job."""
        return list(self.sessions.values())[-1]

    def orders(self) -> list[Order]:
        """All orders received, oldest first."""
        return [candidate.order.message for submission in self.submissions for candidate in submission.candidates]

    @contextlib.asynccontextmanager
    async def serve(self) -> AsyncIterator[FakeMarket]:
        app = web.Application(client_max_size=64 << 20, middlewares=[self._note])
        app.add_routes(
            [
                web.get("/v1/info", self._info),
                web.get("/v1/models", self._models),
                web.post("/v1/shortlist", self._shortlist),
                web.post("/v1/tabs", self._tabs),
                web.post("/v1/jobs", self._jobs),
                web.get("/v1/jobs/{job}", self._job),
                web.post("/v1/jobs/{job}/cancel", self._cancel),
                web.post("/v1/jobs/{job}/orders", self._further_orders),
            ]
        )
        self._runner = runner = web.AppRunner(app, shutdown_timeout=0.1, handler_cancellation=True)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        assert site._server is not None
        self.url = f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}"  # type: ignore[attr-defined]
        try:
            yield self
        finally:
            await runner.cleanup()
        if self.crash is not None:
            raise self.crash

    async def kill(self) -> None:
        """Drops all connections and accepts no more."""
        self.killed = True
        assert self._runner is not None
        assert self._runner.server is not None
        for site in list(self._runner.sites):
            await site.stop()
        for handler in list(self._runner.server.connections):
            if handler.transport is not None:
                handler.transport.abort()

    @web.middleware
    async def _note(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        self.requests.append(request.path)
        if self.hangs:
            await asyncio.Event().wait()
        return await handler(request)

    async def _info(self, _request: web.Request) -> web.Response:
        return web.json_response(self.info)

    async def _models(self, _request: web.Request) -> web.Response:
        await self.before_models()
        ask = self.providers[0].ask.message
        entry = {
            "id": ask.model,
            "providers": len(self.providers),
            "live": 1,
            "inputPrice": str(ask.input_price),
            "cachedInputPrice": str(ask.cached_input_price),
            "outputPrice": str(ask.output_price),
            "contextTokens": ask.context_tokens,
            "maxOutputTokens": ask.max_output_tokens,
        }
        return web.json_response({"data": [entry]})

    async def _shortlist(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.shortlists.append(body)
        known = {"model", "payer", "maxInputPrice", "maxOutputPrice", "providers", "exclude", "route", "limit"}
        assert body.keys() <= known | _OPTIONAL_CRITERIA
        parse_address(body["payer"])
        if self.refusals:
            return _refuse(self.refusals.pop(0))
        if all(body["model"] != provider.ask.message.model for provider in self.providers):
            return _refuse(Refusal(Code.UNKNOWN_MODEL, f"no provider offers the model {body['model']!r}"))
        excluded = set(body.get("exclude", ()))
        if body.get("route") not in (None, *ALWAYS):
            unable = {p.address for p in self.providers if not serves(p.ask.message.spec.features, body["route"])}
            if len(unable) == len(self.providers):
                return _refuse(Refusal(Code.UNKNOWN_ROUTE, f"no provider serves {body['route']}"))
            excluded |= unable
        asks = [entry for entry in self.asks() if not _is_of(entry, excluded)]
        if len({provider.ask.message.model for provider in self.providers}) > 1:
            asks = [entry for entry in asks if entry["ask"]["message"]["model"] == body["model"]]
        if not asks:
            return _refuse(Unavailable(Code.NO_PROVIDER, "all are excluded"))
        return web.json_response({"asks": asks})

    async def _tabs(self, request: web.Request) -> web.Response:
        inquiry = read_signed(Inquiry, await request.json()).verify(DOMAIN).message
        assert inquiry.coordinator == self.signer.address
        self.inquiries.append(inquiry)
        if self.forgets:
            return web.Response(status=404)
        receipts = [session.late(inquiry.provider) for session in self.sessions.values()]
        return web.json_response({"receipts": [receipt.to_json() for receipt in [*receipts, *self.shows] if receipt is not None]})

    async def _jobs(self, request: web.Request) -> web.StreamResponse:
        assert request.content_type == "application/vnd.tallystick.job"
        submission = Submission.loads(await request.read())
        transport = request.transport
        assert transport is not None
        self.connections.add(transport.get_extra_info("peername")[1])
        if self.drops:
            self.drops -= 1
            if self.keeps:
                self.submissions.append(submission)
                self.sessions[submission.job] = taken = Session(self, submission, web.StreamResponse())
                taken.state = State.FAILED
            transport.abort()
            return web.Response()
        if submission.job in self.sessions:
            return _refuse(Refusal(Code.ORDER_REPLAYED, "seen"))
        self.submissions.append(submission)
        if self.refusals:
            return _refuse(self.refusals.pop(0))
        if self.busy and not submission.wait:
            return _refuse(Unavailable(Code.NODE_BUSY, "all providers of the shortlist are busy"))
        response = web.StreamResponse(headers={"content-type": "application/vnd.tallystick.frames"})
        session = Session(self, submission, response)
        self.sessions[submission.job] = session
        await response.prepare(request)
        try:
            await self.script(session)
            await response.write_eof()
        except ConnectionError:
            pass
        except Exception as error:
            self.crash = error
            raise
        finally:
            if session.state not in TERMINAL and not session.survives:
                session.state = State.FAILED
        return response

    async def _job(self, request: web.Request) -> web.Response:
        job = parse_job_id(request.match_info["job"])
        if job not in self.sessions:
            return _refuse(Refusal(Code.UNKNOWN_JOB, "no such job"))
        session = self.sessions[job]
        if (refused := self._stranger(request, session)) is not None:
            return refused
        receipt = session.receipt.to_json() if session.receipt is not None else None
        return web.json_response(
            {
                "job": job.hex(),
                "state": session.state.value,
                "model": MODEL,
                "payer": session.submission.candidates[0].order.message.payer,
                "createdAt": 1,
                "finishedAt": None,
                "attempts": [{"receipt": None} | attempt for attempt in session.tried],
                "receipt": receipt,
                "settlement": None,
            }
            | ({} if session.place is None else {"queue": session.place.to_json()})
        )

    def _stranger(self, request: web.Request, session: Session | None) -> web.Response | None:
        """Refuses requests without the payer's key. Test clients have clocks of their own, so a token's time is not checked."""
        header = request.headers.get("authorization")
        try:
            account = load_access(header, DOMAIN, self.signer.address, _issued_at(header))
        except TallyError as error:
            return _refuse(error)
        if session is not None and account != session.submission.candidates[0].order.message.payer:
            return _refuse(Refusal(Code.UNAUTHENTICATED, "not this account's job"))
        return None

    async def _further_orders(self, request: web.Request) -> web.Response:
        session = self.sessions[parse_job_id(request.match_info["job"])]
        further = tuple(Candidate.from_bytes(base64.b64decode(raw)) for raw in (await request.json())["candidates"])
        if self.refuses_further is not None:
            session.further_posted.set()
            return _refuse(self.refuses_further)
        session.submission = replace(session.submission, candidates=(*session.submission.candidates, *further))
        session.further_posted.set()
        return web.json_response({"added": True})

    async def _cancel(self, request: web.Request) -> web.Response:
        job = parse_job_id(request.match_info["job"])
        if (refused := self._stranger(request, self.sessions.get(job))) is not None:
            return refused
        self.cancels.append(job)
        if job in self.sessions:
            session = self.sessions[job]
            session.cancelled.set()
            if session.market.killed and session.state not in TERMINAL:  # as a replica does for one that is gone
                session.state = State.FAILED
        return web.json_response({}, status=202)


async def _at_once() -> None:
    """Does nothing."""


def _issued_at(header: str | None) -> int:
    token = (header or "").partition(" ")[2]
    if not token:
        return 0
    access = read_signed(Access, orjson.loads(base64.urlsafe_b64decode(token + "=" * (-len(token) % 4))))
    return access.message.issued_at


def _is_of(entry: Any, providers: set[str]) -> bool:
    try:
        return entry["ask"]["message"]["provider"] in providers
    except (KeyError, TypeError):
        return False


def _refuse(error: TallyError) -> web.Response:
    return web.json_response(error.as_json(), status=error.status)


async def until_cancelled(session: Session) -> None:
    """Streams words until the job is cancelled, then bills what was delivered."""
    await session.match()
    await session.answer(200, EVENTS)
    await session.chunk(event("on and on "))
    await session.cancelled.wait()
    await session.chunk(b"", last=True)
    await session.finish(Usage(8, 0, 3), Outcome.CLIENT_CANCELLED)


async def run(market: Market, body: dict[str, Any] | None = None) -> bytes:
    """Runs one chat job to its end."""
    async with await market.submit(CHAT, body or BODY) as job:
        return (await job.result()).body


async def eventually(ready: Callable[[], Awaitable[bool] | bool]) -> None:
    """Waits until the condition holds."""
    async with asyncio.timeout(60):
        while True:
            result = ready()
            if result if isinstance(result, bool) else await result:
                return
            await asyncio.sleep(0.005)
