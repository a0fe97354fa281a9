"""What a request to an upstream costs: at most, before it is sent, and as its answer reports. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field

from tallystick.client.openai.requests import RequestSummary
from tallystick.client.upstream_settings import UpstreamModel
from tallystick.protocol.openai_wire import EngineError, read_completion, read_other_answer
from tallystick.protocol.pricing import TEMPLATE_ALLOWANCE, Prices, Usage, cost
from tallystick.protocol.routes import CHAT, COMPLETIONS, EMBEDDINGS
from tallystick.protocol.sse import DONE, MalformedAnswer
from tallystick.protocol.types import Amount
from tallystick.protocol.usage_reports import ReportedUsage

UNKNOWN_CONTEXT = 128_000
"""Input tokens that a request with images or other media may have if the config does not say how long the context is."""
_BYTES_PER_TOKEN = 4
MAX_COUNT = 1 << 40
"""The largest token count that an answer is believed."""


def prices_of_model(model: UpstreamModel) -> Prices | None:
    """The prices of a model; None if the config has none."""
    known = [price for price in (model.input_price, model.output_price) if price is not None]
    if len(known) < 2:
        return None
    prompt, output = known
    cached = prompt if model.cached_input_price is None else model.cached_input_price
    return Prices(int(prompt), int(cached), int(output))


def most_cost(model: UpstreamModel, summary: RequestSummary, body_bytes: int) -> Amount | None:
    """The most that a request may cost, in base units; None if the model has no prices. A token has at least one byte of text."""
    prices = prices_of_model(model)
    if prices is None:
        return None
    longest = body_bytes + TEMPLATE_ALLOWANCE if summary.bounded else model.context_tokens or UNKNOWN_CONTEXT
    tokens = min(longest, model.context_tokens or longest)
    limit = model.max_output_tokens * summary.choices
    output = limit if summary.output_tokens is None else min(summary.output_tokens, limit)
    highest = Prices(max(prices.input, prices.cached_input), prices.cached_input, prices.output)
    return cost(Usage(tokens, 0, output), highest)


@dataclass(slots=True)
class AnswerMeter:
    """Counts the tokens of one answer, whole or as its events come. Without a report, it estimates them by bytes of text.

    `error`: what the answer reports instead of output. `body_bytes`: of the request. `finished`: whether a finish reason came.
    """

    path: str
    body_bytes: int
    error: EngineError | None = field(default=None, repr=False)
    finished: bool = False
    text_bytes: int = 0
    _reported: ReportedUsage | None = field(default=None, repr=False)

    def add(self, payload: bytes) -> bool:
        """Counts a JSON document: the answer, or the data of an event. Returns whether the document holds nothing but usage."""
        if payload == DONE:
            self.finished = True
            return False
        try:
            is_completion = self.path in (CHAT, COMPLETIONS, EMBEDDINGS)
            document = read_completion(payload) if is_completion else read_other_answer(payload)
        except EngineError as error:
            self.error = error
            return False
        except MalformedAnswer:
            return False
        self.finished = self.finished or bool(document.finish_reason) or document.is_last
        self.text_bytes += document.text_bytes
        if document.usage is not None:
            self._reported = document.usage if self._reported is None else self._reported.updated(document.usage)
        return document.usage_only

    @property
    def failed(self) -> bool:
        """Whether the answer reports an error."""
        return self.error is not None

    @property
    def usage(self) -> Usage:
        """The tokens so far: as reported, else estimated."""
        if self.error is not None and self._reported is None and not self.text_bytes:
            return Usage(0, 0, 0)
        reported = self._reported or ReportedUsage(None, 0, None)
        if reported.is_empty:
            reported = ReportedUsage(None, 0, None)
        tokens_in = -(-self.body_bytes // _BYTES_PER_TOKEN) if reported.input is None else _believed(reported.input)
        tokens_out = -(-self.text_bytes // _BYTES_PER_TOKEN) if reported.output is None else _believed(reported.output)
        return Usage(tokens_in, min(_believed(reported.cached), tokens_in), tokens_out)

    def cost(self, model: UpstreamModel) -> Amount:
        """What these tokens cost, in base units; 0 if the model has no prices."""
        prices = prices_of_model(model)
        return Amount(0) if prices is None else cost(self.usage, prices)


def _believed(count: int) -> int:
    return min(max(count, 0), MAX_COUNT)
