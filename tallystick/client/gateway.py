"""The gateway: OpenAI's API on this machine, paid from this wallet. Any OpenAI client works with its base URL changed.

Bodies pass through untouched both ways; a stream is flushed chunk by chunk. A client that goes away cancels its job, whose
receipt is still booked. Without an API key only programs on this machine are served, since every request spends money: not web
pages (Origin), nor names that were made to point here (Host).
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import structlog
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from tallystick.client.aliases import draw_of, next_may_do, requests
from tallystick.client.choice import HEADER, Options, read_options, under
from tallystick.client.config import ApiKey, ClientConfig
from tallystick.client.guard import CALLER, Guard, check_exposed
from tallystick.client.job import Job, Result
from tallystick.client.openai import EVENT_STREAM, error_event, model_entry, render_error
from tallystick.client.sdk import Market
from tallystick.client.spending import DAY_SECONDS
from tallystick.client.story import tell_job
from tallystick.protocol.eip712 import Signer
from tallystick.protocol.errors import Code, Refusal, TallyError
from tallystick.protocol.routes import ALWAYS, FORM, JSON, media_type
from tallystick.protocol.types import parse_job_id
from tallystick.protocol.wire import ResponseHead, dumps
from tallystick.runtime.serving import serving, until_stopped

log = structlog.get_logger()
BODY_SECONDS = 60
_OURS = ("x-request-id", "x-tally-job", "x-tally-provider", "x-tally-cost", "x-tally-receipt")


@dataclass(frozen=True, slots=True)
class _Wanted:
    """One request of a caller: its route and body, and what its headers say."""

    path: str
    body: bytes
    content_type: str
    key: str | None
    options: str | None
    caller: ApiKey | None

    @classmethod
    def of(cls, scope: Scope, body: bytes) -> _Wanted:
        """Like OpenAI's own servers and engines, whatever does not say that it is a form is read as JSON."""
        headers = Headers(scope=scope)
        kind = headers.get("content-type", "")
        form = media_type(kind) == FORM
        key, options = headers.get("idempotency-key"), headers.get(HEADER)
        return cls(scope["path"], body, kind if form else JSON, key, options, scope.get(CALLER))


class Forward:
    """The hot routes, raw ASGI: one request is one job."""

    def __init__(self, market: Market) -> None:
        self._market = market

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Runs the job until its answer is sent or its client is gone."""
        try:
            body = await _read_body(receive, self._market.config.max_body_bytes)
        except TallyError as error:
            await _send_error(send, error)
            return
        if body is None:
            return
        wanted = _Wanted.of(scope, body)
        key = wanted.key
        relay = asyncio.create_task(self._relay(wanted, send), name="relay")
        gone = asyncio.create_task(_until_gone(receive), name="client-gone")
        try:
            await asyncio.wait({relay, gone}, return_when=asyncio.FIRST_COMPLETED)
            if key is not None:  # its client may come back for it
                await asyncio.wait({relay}, timeout=self._market.config.linger_seconds)
        finally:
            gone.cancel()
            if not relay.done():
                relay.cancel()
            await asyncio.gather(relay, gone, return_exceptions=True)
        if not relay.cancelled():
            relay.result()

    async def _relay(self, wanted: _Wanted, send: Send) -> None:
        """Leaving this, also by cancellation, ends the job: `async with` waits, for a bounded time, for its receipt."""
        market, key = self._market, wanted.key
        try:
            options, fallbacks = read_options(wanted.options)
            options = under(wanted.caller, options)
            bodies = [wanted.body]
            if wanted.content_type == JSON:
                draw = draw_of(key or secrets.token_hex())
                bodies = requests(wanted.body, market.config.aliases, fallbacks, draw)
            if key is not None:
                bodies = bodies[:1]  # a key stands for one job
            for left, body in zip(range(len(bodies) - 1, -1, -1), bodies, strict=True):
                try:
                    await self._answer(wanted, body, options, send)
                except TallyError as error:
                    if not left or not next_may_do(error):
                        raise
                    log.info("falling back to another model", code=error.code.value, reason=str(error))
                else:
                    return
        except TallyError as error:
            await _send_error(send, error)

    async def _answer(self, wanted: _Wanted, body: bytes, options: Options, send: Send) -> None:
        """One request for one model. Raises TallyError as long as nothing was sent."""
        market = self._market
        for again in (wanted.key is None, False):
            job = await market.submit(wanted.path, body, key=wanted.key, content_type=wanted.content_type, **options)
            async with job:
                try:
                    head = await job.start()
                except Refusal as error:
                    if error.code is Code.UNSECURED and again and await market.secure(job):
                        continue
                    raise
                if media_type(head.content_type) == EVENT_STREAM:
                    await self._stream(job, head, send)
                else:
                    await _send_result(send, await job.result())
                return

    async def _stream(self, job: Job, head: ResponseHead, send: Send) -> None:
        headers = {"content-type": head.content_type, "cache-control": "no-store", **_job_headers(job)}
        await _send_head(send, head.status, headers)
        tail = b"\n\n"
        try:
            async for chunk in job:
                tail = (tail + chunk)[-2:]
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        except TallyError as error:
            log.warning("a stream ended with an error", job=job.id.hex(), code=error.code.value, reason=str(error))
            gap = b"" if tail == b"\n\n" else b"\n\n"
            await send({"type": "http.response.body", "body": gap + error_event(error), "more_body": True})
        await send({"type": "http.response.body", "body": b""})


async def _read_body(receive: Receive, limit: int) -> bytes | None:
    """The request's body; None if the client left meanwhile. Raises Refusal where it is too long or too slow."""
    parts: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            while True:
                event = await receive()
                if event["type"] == "http.disconnect":
                    return None
                size += len(event.get("body", b""))
                if size > limit:
                    raise Refusal(Code.BODY_TOO_LARGE, f"the request is longer than {limit} bytes")
                parts.append(event.get("body", b""))
                if not event.get("more_body"):
                    return b"".join(parts)
    except TimeoutError:
        raise Refusal(Code.TIMED_OUT, f"the request did not arrive within {BODY_SECONDS} s") from None


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _job_headers(job: Job) -> dict[str, str]:
    return {"x-request-id": job.id.hex(), "x-tally-job": job.id.hex(), "x-tally-provider": job.provider or ""}


async def _send_head(send: Send, status: int, headers: dict[str, str]) -> None:
    raw = [(name.encode(), value.encode("latin-1", "replace")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})


async def _send_whole(send: Send, status: int, headers: dict[str, str], body: bytes) -> None:
    await _send_head(send, status, headers | {"content-length": str(len(body))})
    await send({"type": "http.response.body", "body": body})


async def _send_result(send: Send, result: Result) -> None:
    headers = {
        "content-type": result.head.content_type,
        "x-request-id": result.job.hex(),
        "x-tally-job": result.job.hex(),
        "x-tally-provider": result.provider,
        "x-tally-cost": str(int(result.cost)),
        "x-tally-receipt": "0x" + result.receipt.digest.hex(),
    }
    await _send_whole(send, result.head.status, headers, result.body)


async def _send_error(send: Send, error: TallyError) -> None:
    shown = render_error(error)
    log.info("request refused", status=shown.status, code=error.code.value, reason=str(error))
    await _send_whole(send, shown.status, {"content-type": JSON} | shown.headers, shown.body)


def build_app(market: Market) -> ASGIApp:
    """The gateway as an ASGI app over an open market."""
    forward = Forward(market)

    async def models(request: Request) -> Response:
        return _json({"object": "list", "data": await _models(market, request.scope.get(CALLER))})

    async def model(request: Request) -> Response:
        wanted = request.path_params["model"]
        for entry in await _models(market, request.scope.get(CALLER)):
            if entry["id"] == wanted:
                return _json(entry)
        raise Refusal(Code.UNKNOWN_MODEL, f"no provider offers the model {wanted!r}")

    async def job(request: Request) -> Response:
        known = await market.find(parse_job_id(request.path_params["job"]))
        if known is None:
            raise Refusal(Code.UNKNOWN_JOB, "this wallet's ledger has no such job")
        return _json(tell_job(known))

    async def health(_request: Request) -> Response:
        return _json({"status": "ok", "payer": market.address, "coordinator": market.config.coordinator, "jobs": market.running})

    routes = [
        Route("/health", health),
        Route("/v1/models", models),
        Route("/v1/models/{model:path}", model),
        Route("/tally/jobs/{job}", job),
        Route("/v1/{path:path}", _PostOnly(forward)),
    ]
    handlers: dict[Any, Callable[..., Any]] = {TallyError: _show_error, 404: _no_route, 405: _no_route}
    guarded = Guard(Starlette(routes=routes, exception_handlers=handlers), market.config, _send_error)
    origins = market.config.allow_origins
    if not origins:
        return guarded
    return CORSMiddleware(guarded, allow_origins=origins, allow_methods=["*"], allow_headers=["*"], expose_headers=_OURS)


async def _models(market: Market, caller: ApiKey | None) -> list[dict[str, Any]]:
    """What is for sale to a caller, and the names that stand for several models."""
    offered = [model_entry(offer.id, offer.to_json()) for offer in await market.models()]
    named = [model_entry(alias.name, {"models": alias.models}) for alias in market.config.aliases]
    allowed = () if caller is None else caller.models
    return [entry for entry in offered if not allowed or entry["id"] in allowed] + named


class _PostOnly:
    """Starlette takes instances as plain ASGI apps, for every method."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] == "POST":
            await self._app(scope, receive, send)
        else:
            await _send_error(send, Refusal(Code.UNKNOWN_ROUTE, f"{scope['path']} takes POST only"))


def _json(document: object) -> Response:
    return Response(dumps(document), media_type=JSON)


async def _show_error(_request: Request, error: Exception) -> Response:
    if not isinstance(error, TallyError):
        raise error
    shown = render_error(error)
    return Response(shown.body, shown.status, shown.headers, JSON)


async def _no_route(request: Request, _error: Exception) -> Response:
    text = (
        f"{request.method} {request.url.path}: not a route of this gateway; it has GET /v1/models and POST {', '.join(ALWAYS)}, …"
    )
    return await _show_error(request, Refusal(Code.UNKNOWN_ROUTE, text))


async def _watch_idle(market: Market) -> None:
    while True:
        try:
            await market.warn_idle()
        except TallyError as error:
            log.info("reservations could not be looked at", reason=str(error))
        await asyncio.sleep(DAY_SECONDS)


async def run_gateway(config: ClientConfig, signer: Signer, *, ready: Callable[[int], None] | None = None) -> None:
    """Serves until SIGTERM or SIGINT; then lets what runs go on for a while, and cancels the rest.

    `ready` gets the bound port (useful with port 0). Raises BadMessage for settings that cannot be served, Unavailable for a
    state file that cannot be used or a port that cannot be bound.
    """
    check_exposed(config)
    async with Market.of(config, signer) as market, serving(build_app(market), config.host, config.port) as port:
        host = f"[{config.host}]" if ":" in config.host else config.host
        log.info("gateway ready", url=f"http://{host}:{port}/v1", payer=market.address, coordinator=config.coordinator)
        if ready is not None:
            ready(port)
        idle = asyncio.create_task(_watch_idle(market), name="idle-reservations")
        await until_stopped()
        idle.cancel()
        log.info("gateway stopping", jobs=market.running)
        await market.drain(config.grace_seconds)
