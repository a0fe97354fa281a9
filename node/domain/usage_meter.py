"""Counting: what was delivered, what it is billed as, and the receipt that says so. Pure.

Usage is the engine's own where it gives one. Where it does not (an engine without usage, an answer that was cut off), the rule
is: one token for every four bytes, rounded up, of the request body and of the text delivered. Either way a count is clamped to
what the other side can check: input to the body's bytes plus the template allowance, output to the bytes delivered and to what
was ordered. An answer of which nothing was delivered counts nothing, except that a client which cancels pays for the input once
the engine has the request: its own count of it if it gave one, else the same rule, and none of it as cached.
"""

from __future__ import annotations

from tallystick.protocol.eip712 import Verified
from tallystick.protocol.messages import Order, Outcome, Receipt, Terms
from tallystick.protocol.openai_wire import ReportedUsage
from tallystick.protocol.pricing import TEMPLATE_ALLOWANCE, Usage, charge
from tallystick.protocol.sealing import ContentKey, Transcript
from tallystick.protocol.tab import ProviderTab
from tallystick.protocol.types import ZERO_HASH, Amount, Hash

BYTES_PER_TOKEN = 4
NOTHING = Usage(0, 0, 0)


def estimate(size: int) -> int:
    """Tokens of so many bytes of text, by the fallback rule."""
    return -(-size // BYTES_PER_TOKEN)


class UsageMeter:
    """The count of one response. Feed it every chunk that is delivered; ask it for usage at the end."""

    def __init__(self, key: ContentKey, order_hash: Hash, terms: Terms, body_bytes: int) -> None:
        self._transcript = Transcript(key.commitment_key, order_hash)
        self._terms, self._body_bytes = terms, body_bytes
        self._delivered_bytes = self._text_bytes = 0
        self._reported: ReportedUsage | None = None
        self._request_sent = False

    @property
    def commitment(self) -> Hash:
        """The commitment to all chunks so far."""
        return self._transcript.commitment

    def add_chunk(self, plain: bytes) -> None:
        """One more chunk of the transcript."""
        self._transcript.add(plain)

    def add_output(self, size: int, text: int) -> None:
        """`size` bytes of the engine's body were delivered, with `text` bytes of generated text in them."""
        self._delivered_bytes += size
        self._text_bytes += text

    def set_reported(self, counted: ReportedUsage | None) -> None:
        """What the engine says; the last word counts."""
        self._reported = counted or self._reported

    def mark_request_sent(self) -> None:
        """The engine has the whole request."""
        self._request_sent = True

    def usage(self, *, cancelled: bool = False) -> Usage:
        """What this response is billed as, for a client that `cancelled` or one that did not; see the module's docstring."""
        if not self._delivered_bytes:
            return Usage(self._input_tokens(), 0, 0) if cancelled and self._request_sent else NOTHING
        return self._usage(self._delivered_bytes, self._text_bytes)

    def work_done(self, undelivered: int, text: int) -> Usage:
        """The work that was done for this response, with so many bytes, and text in them, that were made and held back."""
        made = self._delivered_bytes + undelivered
        return self._usage(made, self._text_bytes + text) if made else self.usage(cancelled=True)

    def _usage(self, size: int, text: int) -> Usage:
        taken = self._input_tokens()
        said = self._reported or ReportedUsage(0, 0, estimate(text))
        written = min(max(said.output, 0), self._terms.max_output_tokens, size)
        return Usage(taken, min(max(said.cached, 0), taken), written)

    def _input_tokens(self) -> int:
        said = self._reported.input if self._reported is not None else estimate(self._body_bytes)
        return min(max(said, 0), self._body_bytes + TEMPLATE_ALLOWANCE)

    @property
    def was_clamped(self) -> bool:
        """Whether the engine reported more than can be true."""
        said, usage = self._reported, self.usage()
        return said is not None and usage != NOTHING and (said.input, said.output) != (usage.input, usage.output)


def make_receipt(
    order: Verified[Order],
    terms: Terms,
    tab: ProviderTab,
    *,
    usage: Usage,
    outcome: Outcome,
    commitment: Hash,
    finished_at: int,
) -> Receipt:
    """The receipt that follows the last one of `tab`, still unsigned."""
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
        evidence_root=ZERO_HASH,
    )


class Throughput:
    """How fast the engine was lately: exponentially weighted means over its last jobs."""

    WEIGHT = 0.2

    def __init__(self) -> None:
        self._rate = self._first = 0.0

    def add(self, *, first: float, total: float, tokens: int) -> None:
        """One finished job: seconds to its first output and in all, and the tokens it wrote."""
        self._first = self._mix(self._first, first)
        if tokens > 1 and total > first:
            self._rate = self._mix(self._rate, (tokens - 1) / (total - first))

    @property
    def tokens_per_second(self) -> int:
        """Output tokens a second of one stream; 0 if not known yet."""
        return min(int(self._rate), (1 << 32) - 1)

    @property
    def first_token_ms(self) -> int:
        """Milliseconds to the first output; 0 if not known yet."""
        return min(int(self._first * 1_000), (1 << 32) - 1)

    def _mix(self, mean: float, value: float) -> float:
        return value if mean == 0.0 else mean + self.WEIGHT * (value - mean)
