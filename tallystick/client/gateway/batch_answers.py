"""Answers the requests of batches as those of callers: by the same handler, with aliases, translations and repairs."""

from __future__ import annotations

import asyncio
import json
from typing import Any, cast

from starlette.types import Message, Scope

from tallystick.client.batches.ports import KeyState, LineAnswer, LineJob
from tallystick.client.batches.window import price_limit
from tallystick.client.config import ApiKey
from tallystick.client.gateway.auth import CALLER_KEY
from tallystick.client.gateway.handler import OWN_KEY, RUNS_ON, RequestHandler
from tallystick.client.ledger.queries import KnownJob
from tallystick.client.ledger.schema import COLLECTABLE, JobState
from tallystick.client.openai.errors import error_words, render_error
from tallystick.client.sdk.maintenance import Maintenance
from tallystick.client.sdk.market import Market, maintenance_of
from tallystick.client.selection.options import HEADER, ProviderCriteria, read_options, smallest_limit
from tallystick.protocol.errors import Code, Refusal, TallyError
from tallystick.protocol.lenient_json import load_lenient
from tallystick.protocol.routes import JSON
from tallystick.protocol.types import Amount, format_amount

_PRICES = {"max_input_price": "input_price", "max_output_price": "output_price"}
"""Options that limit a price, and the price of an ask that each limits."""
_UNRESOLVED = (JobState.OPEN, JobState.LOST)


class BatchAnswers:
    """See LineAnswerer."""

    def __init__(self, market: Market, handler: RequestHandler) -> None:
        self._market, self._handler, self._leaving = market, handler, False

    def leave(self) -> None:
        """See LineAnswerer."""
        self._leaving = True

    @property
    def _maintenance(self) -> Maintenance:
        return maintenance_of(self._market)

    async def answer(self, job: LineJob) -> LineAnswer:
        """See LineAnswerer."""
        caller: ApiKey | None = None
        if job.caller:
            caller = next((key for key in self._market.config.api_keys if key.label == job.caller), None)
            if caller is None:
                text = f"the API key {job.caller!r}, which created this batch, is no longer one of [[api_keys]]"
                error = render_error(Refusal(Code.UNAUTHENTICATED, text))
                return LineAnswer(error.status, "", error.body, code=Code.UNAUTHENTICATED.value, message=text)
        exchange = _Exchange(job.body)
        options = await self._priced_options(job, caller)
        scope = {**_scope(job, caller, options), RUNS_ON: lambda: self._leaving}
        await self._handler(scope, exchange.receive, exchange.send)
        return exchange.answer()

    async def _priced_options(self, job: LineJob, caller: ApiKey | None) -> str:
        """The options of a job with the price limits of this step of its window, if its caller sets any."""
        config, (options, _) = self._market.config, read_options(job.options)
        caps = {
            name: smallest_limit(getattr(config, name), getattr(caller, name, None), cast("int | None", options.get(name)))
            for name in _PRICES
        }
        known = {name: cap for name, cap in caps.items() if cap is not None}
        if not known:
            return job.options
        criteria = {name: value for name, value in options.items() if name in ProviderCriteria.__annotations__}
        try:
            asks = await self._market.shortlist(
                job.model, route=job.endpoint, priority=options.get("priority"), **cast("ProviderCriteria", criteria | known)
            )
        except TallyError:  # an alias, or nobody sells it at these prices
            return job.options
        best = asks[0].message
        limits = {name: price_limit(cap, getattr(best, _PRICES[name]), job.step) for name, cap in known.items()}
        return json.dumps(json.loads(job.options) | {name: format_amount(Amount(limit)) for name, limit in limits.items()})

    async def keys(self, batch: str) -> set[str]:
        """See LineAnswerer."""
        return await self._maintenance.ledger.batch_keys(batch)

    async def key_state(self, key: str) -> KeyState:
        """See LineAnswerer."""
        known = await self._job_of(key)
        if known is None:
            return KeyState.UNUSED
        if known.state in _UNRESOLVED or any(order.state in COLLECTABLE for order in known.orders):
            return KeyState.BILLED if known.state is JobState.DISPUTED else KeyState.OPEN
        return KeyState.BILLED if known.cost else KeyState.FREE

    async def key_cost(self, key: str) -> Amount:
        """See LineAnswerer."""
        known = await self._job_of(key)
        return Amount(0) if known is None else known.cost

    async def _job_of(self, key: str) -> KnownJob | None:
        keyed = await self._maintenance.find_key(key)
        return None if keyed is None else await self._market.find(keyed.job)

    async def forget(self, key: str) -> None:
        """See LineAnswerer."""
        await self._maintenance.ledger.forget_key(key)


def _scope(job: LineJob, caller: ApiKey | None, options: str) -> Scope:
    return {
        "type": "http",
        "http_version": "1.1",
        "method": "POST",
        "path": job.endpoint,
        "raw_path": job.endpoint.encode(),
        "query_string": b"",
        "headers": [(b"content-type", JSON.encode()), (HEADER.encode(), options.encode())],
        CALLER_KEY: caller,
        OWN_KEY: job.key,
    }


class _Exchange:
    """One request and its answer, without a connection. Its caller never disconnects."""

    def __init__(self, body: bytes) -> None:
        self._body: bytes | None = body
        self._status, self._headers, self._parts = 500, dict[str, str](), list[bytes]()

    async def receive(self) -> Message:
        if self._body is None:
            await asyncio.get_running_loop().create_future()  # until the request is over
        body, self._body = self._body, None
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._status = message["status"]
            self._headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in message["headers"]}
        elif message["type"] == "http.response.body":
            self._parts.append(message.get("body", b""))

    def answer(self) -> LineAnswer:
        """The answer, once it is whole."""
        body, headers = b"".join(self._parts), self._headers
        cost, answer_id = headers.get("x-tally-cost", ""), headers.get("x-request-id", "")
        if self._status < 400:
            return LineAnswer(self._status, answer_id, body, Amount(int(cost or 0)))
        error = _read_error(body)
        return LineAnswer(
            self._status,
            answer_id,
            body,
            Amount(int(cost or 0)),
            retry=headers.get("x-should-retry") == "true",
            code=str(error.get("code") or ""),
            message=error_words(body),
        )


def _read_error(body: bytes) -> dict[str, Any]:
    try:
        document = load_lenient(body)
    except ValueError:
        return {}
    error = document.get("error") if isinstance(document, dict) else None
    return error if isinstance(error, dict) else {}
