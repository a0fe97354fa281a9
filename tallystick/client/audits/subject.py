"""What a referee is asked about a kept job, and what its answer says of it. Pure."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tallystick.audit.scores import scored_answer
from tallystick.audit.thresholds import Thresholds
from tallystick.audit.token_counts import PooledCounts
from tallystick.audit.verdicts import Finding
from tallystick.client.audits.findings import MIN_ENTRIES, AuditedAnswer, RefereeNumbers, find, pooled_evidence
from tallystick.client.audits.kept_job import AUDITABLE_ROUTES, KeptJob, read_answer
from tallystick.client.audits.planning import Random, choose_positions, draw
from tallystick.client.audits.pools import Pool
from tallystick.client.audits.sampling_terms import SamplingTerms, read_sampling
from tallystick.protocol.errors import BadMessage, Fault
from tallystick.protocol.features import EVIDENCE
from tallystick.protocol.messages import UNKNOWN, Outcome
from tallystick.protocol.routes import MESSAGES, RESPONSES
from tallystick.protocol.token_evidence import TOP, EvidenceRow, evidence_root
from tallystick.protocol.token_scores import MAX_TOKENS, ScoreRequest, ScoreResponse

MIN_TOKENS = 8
"""Tokens of an answer from which an audit can say something."""
LIKELY_BYTES_PER_TOKEN = 4
MOST_BYTES_PER_TOKEN = 8
TEXT_SHARE = 0.25
MAX_SHORT_ROWS = 0.25
"""The share of rows with fewer than TOP tokens up to which the rows say what their provider's engine computed."""
MIN_LIMIT = 32
"""A limit of output tokens below which an honest answer may be too short for an audit."""
LIMIT_SLACK = 8
"""Tokens by which an answer may miss the limit that it is said to have reached: engines count ends and templates differently."""
_FILTERED = "content_filter"
"""The finish of an answer whose engine says openly that it left something out."""
_WHOLE = (Outcome.COMPLETED, Outcome.LENGTH)
_OWN_ROWS = ("tools", "functions", "logprobs", "top_logprobs", "post_sampling_probs", "response_format", "best_of")
"""Members of a request to which an honest engine may give no evidence; see docs/explanation/evidence.md."""
WITHHELD = (
    "the provider committed to evidence and did not hand it over, or not enough to compare; "
    "the text alone clears nobody who has more to show"
)
UNCOMMITTED = (
    "the provider's ask promises evidence, and its receipt commits to none; the text alone clears nobody who has more to show"
)
_OTHER_FORMS = ("tools", "functions", "modalities", "audio")
"""Members of a request that may be answered by something else than one text."""


class UnverifiableAnswer(BadMessage):
    """An answer that cannot be audited, though one to its request could be: its form is its provider's doing."""

    def __init__(self, message: str) -> None:
        super().__init__(message, fault=Fault.PROVIDER)


class ShortAnswer(UnverifiableAnswer):
    """An answer that is too short for an audit. It may be right to be so short, unless its request was made up to be audited."""


def is_unverifiable(error: BadMessage) -> bool:
    """Whether the answer to a real request cannot be audited by its provider's doing."""
    return isinstance(error, UnverifiableAnswer) and not isinstance(error, ShortAnswer)


@dataclass(frozen=True, slots=True)
class Subject:
    """An answer that can be audited. `text`: scored if there is no evidence, or if that is not of the whole answer.

    `ended`: whether the model itself ended it, by what its provider says: it names the end, or a limit that was not reached.
    """

    kept: KeptJob
    request: Mapping[str, Any]
    rows: Sequence[EvidenceRow]
    text: str
    sampling: SamplingTerms
    ended: bool

    @classmethod
    def of(cls, kept: KeptJob) -> Subject:
        """Raises BadMessage that says why the answer cannot be audited."""
        path, request = kept.request()
        receipt = kept.proof.receipt.message
        if path not in AUDITABLE_ROUTES:
            text = f"an answer of {path} cannot be audited: expected one of {', '.join(AUDITABLE_ROUTES)}"
            remedy = (
                "; send the request as a chat to have its answer audited. Some made-up chats of its shape are: tally audit list"
            )
            raise BadMessage(text + (remedy if path in (RESPONSES, MESSAGES) else ""))
        if receipt.outcome not in _WHOLE:
            raise BadMessage(f"the job ended as {Outcome(receipt.outcome).name.lower()}: a broken-off answer is not audited")
        rows = kept.rows
        if request.get("n") not in (None, 1) or request.get("echo"):
            raise BadMessage("an answer with several choices, or with its prompt, is not audited")
        if rows and evidence_root(rows) != receipt.evidence_root:  # without rows, the text is judged alone
            raise BadMessage("the evidence is not that of the receipt")
        answer = read_answer(kept.proof.response)
        if not rows and answer is None:
            kind = BadMessage if any(request.get(member) for member in _OTHER_FORMS) else UnverifiableAnswer
            raise kind("the answer has no evidence, and is not one text, so a referee cannot score it")
        text = "" if answer is None else answer.text
        if max(len(rows), len(text) // LIKELY_BYTES_PER_TOKEN) < MIN_TOKENS:
            limits = [request.get(member) for member in ("max_tokens", "max_completion_tokens")]
            kind = BadMessage if any(isinstance(limit, int) and limit < MIN_LIMIT for limit in limits) else ShortAnswer
            raise kind(f"the answer is too short for an audit: expected about {MIN_TOKENS} tokens or more")
        finish = _FILTERED if answer is None or request.get("stop") else answer.finish
        ended = finish == "stop" or (finish != _FILTERED and _is_below_limits(kept, request))
        return cls(kept, request, rows, text, read_sampling(request), ended)

    @property
    def withheld(self) -> str:
        """Why the answer clears nobody: its provider shows too little evidence. Empty if it shows enough, or never had any."""
        if not self.kept.has_root:
            return UNCOMMITTED if self._promised else ""
        return WITHHELD if self._shows_too_little else ""

    @property
    def _promised(self) -> bool:
        """Whether the ask promises evidence, and the request is of a kind for which engines that have any give some."""
        ask = self.kept.ask
        return ask is not None and EVIDENCE in ask.message.spec.features and not any(map(self.request.get, _OWN_ROWS))

    @property
    def _shows_too_little(self) -> bool:
        short = sum(len(row.top) < TOP for row in self.rows)
        return short > MAX_SHORT_ROWS * len(self.rows) or not self.rows or not (self.is_covered or self.text)

    @property
    def is_covered(self) -> bool:
        """Whether the rows are those of the whole answer: as many as its billed tokens, but perhaps for its end token.

        An honest node's rows end before the first token that its engine gave no row for. A text of ASCII has no such token.
        """
        may_lack_end = self.kept.proof.receipt.message.outcome == Outcome.COMPLETED and self.text.isascii()
        return self._missing <= may_lack_end

    @property
    def coverage(self) -> float:
        """The share of the answer, from 0 to 1, that has rows which can be compared."""
        likely = max(len(self.rows), len(self.text.encode(errors="replace")) // MOST_BYTES_PER_TOKEN)
        tokens = likely if self.is_covered else max(likely, self.kept.proof.receipt.message.output_tokens)
        return sum(len(row.top) >= MIN_ENTRIES for row in self.rows) / tokens if tokens else 0.0

    @property
    def _missing(self) -> int:
        """Tokens that are billed and have no row."""
        return self.kept.proof.receipt.message.output_tokens - len(self.rows)

    @property
    def completion(self) -> tuple[int, ...] | str:
        """The answer for a referee: as tokens if there is evidence."""
        return tuple(row.token for row in self.rows) or self.text

    @property
    def likely_tokens(self) -> int:
        """The tokens of the text: those that are billed, as far as a text of its size can have so many or so few."""
        billed, size = self.kept.proof.receipt.message.output_tokens, len(self.text.encode(errors="replace"))
        return min(max(billed, size // MOST_BYTES_PER_TOKEN), size, MAX_TOKENS)

    def question(self, positions: int, random: Random, *, text_only: bool = False) -> ScoreRequest:
        """What to ask a referee, with positions drawn anew. `text_only`: about the text, if there is one. Raises BadMessage.

        The text is sent instead of the tokens where the rows are not those of the whole answer, and else one time in four: so
        text without rows, and rows for tokens that are not in the text, are found.
        """
        as_text = bool(self.text) and (text_only or not self.rows or not self.is_covered or draw(random) < TEXT_SHARE)
        completion = self.text if as_text else self.completion
        tokens = self.likely_tokens if as_text else len(self.rows)
        return ScoreRequest.of(self.request, completion, choose_positions(tokens, positions, random))

    def judge(
        self,
        request: ScoreRequest,
        response: ScoreResponse,
        thresholds: Thresholds,
        earlier: Sequence[Sequence[int]] = (),
    ) -> list[Finding]:
        """The findings by a referee's answer to a `question`."""
        return find(self._audited(request, response, earlier), _numbers(response), thresholds)

    def pool(self, request: ScoreRequest, response: ScoreResponse) -> Pool:
        """What a referee's answer to a `question` adds to the evidence of other answers."""
        return pooled_evidence(self._audited(request, response), _numbers(response))

    def _audited(self, request: ScoreRequest, response: ScoreResponse, earlier: Sequence[Sequence[int]] = ()) -> AuditedAnswer:
        return AuditedAnswer(
            rows=self.rows,
            tokens=response.tokens,
            sampling=self.sampling,
            ended=self.ended and (_is_text(request) or self._missing <= 0),
            earlier=earlier,
            class_known=self.kept.precision not in ("", UNKNOWN),
        )

    def counts(self, request: ScoreRequest, response: ScoreResponse) -> PooledCounts:
        """The tokens that the receipt bills, and those that the referee counted; none if it saw only a part of the answer.

        The end token of an answer may be billed and is not in its text.
        """
        if not _is_text(request) and not self.is_covered:
            return PooledCounts()
        receipt = self.kept.proof.receipt.message
        counted = len(response.tokens)
        if receipt.outcome == Outcome.COMPLETED and receipt.output_tokens > counted:
            counted += 1
        return PooledCounts(receipt.input_tokens + receipt.output_tokens, response.prompt_tokens + counted)


def _is_below_limits(kept: KeptJob, request: Mapping[str, Any]) -> bool:
    """Whether an answer reached neither the request's limit of output, nor the order's, nor the context that the ask promises."""
    receipt, declared = kept.proof.receipt.message, [request.get("max_tokens"), request.get("max_completion_tokens")]
    limits = [limit for limit in declared if isinstance(limit, int) and not isinstance(limit, bool) and limit > 0]
    output = min(kept.proof.terms.max_output_tokens, *limits, math.inf)
    context = kept.ask.message.context_tokens if kept.ask is not None else 0
    used = receipt.input_tokens + receipt.output_tokens
    return receipt.output_tokens + LIMIT_SLACK < output and used + LIMIT_SLACK < context


def _is_text(request: ScoreRequest) -> bool:
    """Whether a referee saw the whole text, and not the tokens that have rows."""
    return isinstance(request.completion, str)


def _numbers(response: ScoreResponse) -> RefereeNumbers:
    return RefereeNumbers(scored_answer(response), response.end_logprob)


def pack_tokens(tokens: Sequence[int]) -> bytes:
    """The first tokens of an answer for a file: as many as a comparison needs."""
    return struct.pack(f">{min(len(tokens), 256)}I", *tokens[:256])


def unpack_tokens(data: bytes) -> tuple[int, ...]:
    """The inverse of `pack_tokens`."""
    return struct.unpack(f">{len(data) // 4}I", data)
