"""Routes requests of aliases to the upstreams that these name, unless a request requires the market."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import structlog

from tallystick.client.config import ClientConfig
from tallystick.client.gateway.aliases import RoutingPlan
from tallystick.client.gateway.attempts import Attempts
from tallystick.client.gateway.forms import Form
from tallystick.client.gateway.response_sender import ResponseSender
from tallystick.client.sdk.market import Market, maintenance_of
from tallystick.client.selection.options import RequestOptions, market_criteria, smallest_limit
from tallystick.client.upstream_settings import UpstreamTarget
from tallystick.client.upstreams.caller import UpstreamCaller
from tallystick.client.upstreams.metering import prices_of_model
from tallystick.client.upstreams.requests import UpstreamRequest
from tallystick.protocol.errors import BadMessage, Code, Refusal
from tallystick.protocol.types import Amount, format_amount
from tallystick.protocol.wire import loads
from tallystick.runtime.plaintext import warn_if_plaintext

log = structlog.get_logger()


class UpstreamRouter:
    """See the module's docstring. `market` must be open when a request comes.

    Raises BadMessage for an upstream whose API key cannot be read.
    """

    def __init__(self, market: Market) -> None:
        self._market = market
        for upstream in market.config.upstreams:
            upstream.read_key()
            warn_if_plaintext(upstream.url, "requests, answers and the API key of an upstream")

    @property
    def _config(self) -> ClientConfig:
        return self._market.config

    def restrict(self, plan: RoutingPlan, options: RequestOptions, *, market: bool) -> RoutingPlan:
        """The plan without upstreams if the request requires the market. `market`: whether it does whatever its options say.

        Raises Refusal (no_provider) if nothing is left.
        """
        if not plan.upstreams:
            return plan
        criteria = market_criteria(self._config, options)
        if not (market or criteria):
            return plan
        restricted = plan.without_upstreams()
        if not restricted.bodies:
            reason = ", ".join(criteria) or "market, or an idempotency key"
            text = f"model: this alias names upstreams alone, and the request requires a provider of the market ({reason})"
            raise Refusal(Code.NO_PROVIDER, text)
        return restricted

    async def answer(
        self,
        target: UpstreamTarget,
        form: Form,
        options: RequestOptions,
        sender: ResponseSender,
        *,
        accepts: Callable[[Any], bool] | None,
    ) -> bool:
        """Asks an upstream and sends its answer. Returns False if `accepts` refuses the answer, which is kept then.

        Raises TallyError if nothing was sent.
        """
        caller = UpstreamCaller(self._config, maintenance_of(self._market).ledger, lambda: int(time.time()))
        attempts = sender.attempts
        limit = self._limit(options, attempts)
        request = caller.prepare(target, form.path, form.body, limit)
        self._check_prices(request)
        async with caller.call(request, options.get("label", self._config.label)) as answer:
            if answer.is_stream:
                sender.cache_name = None  # streams of upstreams are not cached
                await sender.send_upstream_stream(answer, form.translation)
                body = b""
            else:
                body = await answer.body()
        # What it cost is booked now, before the caller knows that the answer is complete.
        if answer.is_stream:
            await sender.end_stream()
        elif accepts is not None and answer.status == 200 and not _accepts(accepts, body):
            log.info("answer of an upstream not accepted, trying the next model", upstream=str(target))
            attempts.upstream_cost = Amount(attempts.upstream_cost + answer.cost)
            sender.keep_rejected(answer, body, form.translation)
            return False
        else:
            await sender.send_upstream(answer, body, form.translation)
        return True

    def _limit(self, options: RequestOptions, attempts: Attempts) -> Amount | None:
        """What the request may cost there, in base units; None without a limit."""
        limit = smallest_limit(self._config.max_cost, options.get("max_cost"))
        if limit is None:
            return None
        return Amount(max(limit - attempts.spent, 0))

    def _check_prices(self, request: UpstreamRequest) -> None:
        """Raises Refusal (price_above_cap) for a model above the config's maximum prices, and for one without prices then."""
        prices, config = prices_of_model(request.model), self._config
        for name, price, maximum in (
            ("max_input_price", None if prices is None else max(prices.input, prices.cached_input), config.max_input_price),
            ("max_output_price", None if prices is None else prices.output, config.max_output_price),
        ):
            if maximum is not None and (price is None or price > maximum):
                got = "a model without prices" if price is None else format_amount(Amount(price))
                text = (
                    f"{request.target}: expected at most {format_amount(maximum)} dollars per million tokens ({name}), got {got}"
                )
                raise Refusal(Code.PRICE_ABOVE_CAP, text)


def _accepts(accepts: Callable[[Any], bool], body: bytes) -> bool:
    try:
        return accepts(loads(body, "answer"))
    except BadMessage:
        return True
