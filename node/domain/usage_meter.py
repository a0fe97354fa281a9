"""Usage metering: counts what was delivered, derives the billed usage, and builds the receipt.

Usage is the engine's own report if there is one. Otherwise (an engine without usage, a response that was cut off) the fallback
rule applies: one token for every four bytes, rounded up, of the request body and of the delivered text. Both kinds of counts are
limited to what the client can check: input to the bytes of the body plus the template allowance, output to the delivered bytes
and the ordered maximum.

A response of which nothing was delivered counts nothing, with one exception: a client that cancels pays for the input once the
engine has the request. The count is then the engine's report, or the fallback rule, and no input counts as cached.
"""

from __future__ import annotations

from tallystick.protocol.eip712 import Verified
from tallystick.protocol.messages import Order, Outcome, Receipt, Terms
from tallystick.protocol.pricing import TEMPLATE_ALLOWANCE, Usage, charge
from tallystick.protocol.sealing import ContentKey, Transcript
from tallystick.protocol.tab import ProviderTab
from tallystick.protocol.types import ZERO_HASH, Amount, Hash
from tallystick.protocol.usage_reports import ReportedUsage

BYTES_PER_TOKEN = 4
NOTHING = Usage(0, 0, 0)
_UNREPORTED = ReportedUsage(None, 0, None)


def estimate(size: int) -> int:
    """Returns the number of tokens in `size` bytes of text, by the fallback rule."""
    return -(-size // BYTES_PER_TOKEN)


class UsageMeter:
    """The usage of one response. Call it for every delivered chunk, and ask for the usage at the end.

    `context_tokens`: the ask's context, which bounds the input of a request whose bytes do not (an image by its URL); zero for
    text.
    """

    def __init__(self, key: ContentKey, order_hash: Hash, terms: Terms, body_bytes: int, *, context_tokens: int = 0) -> None:
        self._transcript = Transcript(key.commitment_key, order_hash)
        self._terms, self._body_bytes = terms, body_bytes
        self._max_input = max(body_bytes + TEMPLATE_ALLOWANCE, context_tokens)
        self._delivered_bytes = self._text_bytes = 0
        self._reported: ReportedUsage | None = None
        self._request_sent = False

    @property
    def commitment(self) -> Hash:
        """The commitment to all chunks so far."""
        return self._transcript.commitment

    def add_chunk(self, plain: bytes) -> None:
        """Adds a chunk to the transcript."""
        self._transcript.add(plain)

    def add_output(self, size: int, text: int) -> None:
        """Counts `size` delivered bytes of the engine's response body, with `text` bytes of generated text in them."""
        self._delivered_bytes += size
        self._text_bytes += text

    def set_reported(self, counted: ReportedUsage | None) -> None:
        """Sets the usage that the engine reported; the last report counts, but no zero or missing count replaces another."""
        self._reported = self._reported.updated(counted) if self._reported is not None else counted

    def mark_request_sent(self) -> None:
        """Records that the engine has the whole request."""
        self._request_sent = True

    def usage(self, *, cancelled: bool = False) -> Usage:
        """Returns the billed usage; `cancelled`: the client cancelled the response. See the module's docstring."""
        if not self._delivered_bytes:
            return Usage(self._input_tokens(), 0, 0) if cancelled and self._request_sent else NOTHING
        return self._usage(self._delivered_bytes, self._text_bytes)

    def work_done(self, undelivered: int, text: int) -> Usage:
        """Returns the usage if `undelivered` further bytes, with `text` bytes of text in them, had been delivered too."""
        produced = self._delivered_bytes + undelivered
        return self._usage(produced, self._text_bytes + text) if produced else self.usage(cancelled=True)

    def _usage(self, size: int, text: int) -> Usage:
        reported = self._reported if self._reported is not None else _UNREPORTED
        if reported.is_empty and text:  # an engine that sends zeros instead of counting
            reported = _UNREPORTED
        input_tokens = self._bound_input(reported.input)
        output = estimate(text) if reported.output is None else reported.output
        output_tokens = min(max(output, 0), self._terms.max_output_tokens, size)
        return Usage(input_tokens, min(max(reported.cached, 0), input_tokens), output_tokens)

    def _input_tokens(self) -> int:
        return self._bound_input(self._reported.input if self._reported is not None else None)

    def _bound_input(self, reported: int | None) -> int:
        tokens = estimate(self._body_bytes) if reported is None else reported
        return min(max(tokens, 0), self._max_input)

    @property
    def reported_output(self) -> int | None:
        """Output tokens by the engine's own count; None if it reported none."""
        return None if self._reported is None else self._reported.output

    @property
    def was_clamped(self) -> bool:
        """Whether the engine reported more than can be true."""
        reported, usage = self._reported, self.usage()
        if reported is None or usage == NOTHING:
            return False
        return (reported.input or 0) > usage.input or (reported.output or 0) > usage.output


def make_receipt(
    order: Verified[Order],
    terms: Terms,
    tab: ProviderTab,
    *,
    usage: Usage,
    outcome: Outcome,
    commitment: Hash,
    finished_at: int,
    evidence_root: Hash = ZERO_HASH,
) -> Receipt:
    """Returns the unsigned receipt that follows the last one of `tab`."""
    cost = charge(terms, usage, outcome)
    return Receipt(
        payer=order.message.payer,
        provider=order.message.provider,
        seq=tab.seq + 1,
        cumulative_cost=tab.cumulative + cost,
        order_hash=order.digest,
        result_commitment=commitment,
        input_tokens=usage.input,
        cached_input_tokens=usage.cached,
        output_tokens=usage.output,
        cost=Amount(cost),
        outcome=outcome,
        finished_at=finished_at,
        evidence_root=evidence_root,
    )


class Throughput:
    """Recent speed of the engine: exponentially weighted means over its last jobs."""

    WEIGHT = 0.2

    def __init__(self) -> None:
        self._rate = self._first = 0.0

    def add(self, *, first: float, total: float, tokens: int) -> None:
        """Adds a finished job: seconds to its first output, seconds in all, and output tokens."""
        self._first = self._mix(self._first, first)
        if tokens > 1 and total > first:
            self._rate = self._mix(self._rate, (tokens - 1) / (total - first))

    def add_whole(self, *, seconds: float, tokens: int) -> None:
        """Adds a response that came in one piece after `seconds`, which includes the time to read the prompt."""
        if tokens > 1 and seconds > 0:
            self._rate = self._mix(self._rate, tokens / seconds)

    @property
    def tokens_per_second(self) -> int:
        """Output tokens per second of one stream; 0 if not known yet."""
        return min(int(self._rate), (1 << 32) - 1)

    @property
    def first_token_ms(self) -> int:
        """Milliseconds to the first output; 0 if not known yet."""
        return min(int(self._first * 1_000), (1 << 32) - 1)

    def _mix(self, mean: float, value: float) -> float:
        return value if mean == 0.0 else mean + self.WEIGHT * (value - mean)
