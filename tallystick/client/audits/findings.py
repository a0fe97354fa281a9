"""The tests of one audit: what a referee's numbers say of an answer. Pure.

Each test has a blind spot, so all that apply are run. What cannot be compared is inconclusive and nobody's guilt: rows of other
tokens, answers without evidence, sampling that the request leaves open.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tallystick.audit.divergence import measure_divergence
from tallystick.audit.endings import cut_evidence, replay_evidence
from tallystick.audit.greedy_margin import measure_margin
from tallystick.audit.sampling import Sampling
from tallystick.audit.scores import Answer, Row
from tallystick.audit.surprisal import measure_surprisal
from tallystick.audit.thresholds import Thresholds
from tallystick.audit.verdicts import Finding
from tallystick.client.audits.pools import Pool, pool_of
from tallystick.client.audits.sampling_terms import SamplingTerms
from tallystick.protocol.token_evidence import EvidenceRow

DIVERGENCE, SURPRISAL, MARGIN, CUT, REPLAY = "divergence", "surprisal", "margin", "cut", "replay"
MIN_SURPRISAL_POSITIONS = 8
MIN_ENTRIES = 3
"""Tokens from which a row of evidence is compared: in one with fewer, rounding and noise of a single token would decide."""
ALIGNED = 16
"""Equal tokens in a row after which rows and a text that was split otherwise are at the same place again."""
USUAL_TEMPERATURES = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Temperatures that engines use for requests without one, such as those of a model's generation config; 1 is always tried."""
UNKNOWN_CLASS_DIVERGENCE = 0.3
"""Threshold of the divergence where the sold precision is unknown: any quantization is below it, another model above it."""
MAX_EARLIER = 64
"""Earlier answers of a provider with which an answer is compared."""


@dataclass(frozen=True, slots=True)
class AuditedAnswer:
    """An answer as its provider sold it. `rows`: its evidence, which may be empty. `tokens`: its token ids by that evidence, else
    by the referee. `ended`: whether the model itself ended it, by what its provider says. `earlier`: tokens of other answers.
    `class_known`: whether its ask says in which precision the model is sold.
    """

    rows: Sequence[EvidenceRow]
    tokens: Sequence[int]
    sampling: SamplingTerms
    ended: bool = False
    earlier: Sequence[Sequence[int]] = ()
    class_known: bool = True


@dataclass(frozen=True, slots=True)
class RefereeNumbers:
    """What a referee says. `answer`: rows by position. `end_logprob`: of the end after the last token, in nats, if known."""

    answer: Answer
    end_logprob: float | None = None


def find(audited: AuditedAnswer, numbers: RefereeNumbers, thresholds: Thresholds) -> list[Finding]:
    """The findings of all tests that apply to an answer."""
    referee = _aligned(audited, numbers)
    return [
        *_divergence(audited, referee, thresholds),
        *_sampling(audited, referee, thresholds),
        *_cut(audited, numbers, thresholds),
        *_replay(audited, referee, thresholds),
    ]


def pooled_evidence(audited: AuditedAnswer, numbers: RefereeNumbers) -> Pool:
    """What an answer adds to the evidence of others of its provider."""
    temperature = audited.sampling.temperature
    surprisal = measure_surprisal(_aligned(audited, numbers), Sampling(temperature)) if temperature else None
    return pool_of(surprisal, _cut_evidence(audited, numbers), untruncated=audited.sampling.untruncated)


def _aligned(audited: AuditedAnswer, numbers: RefereeNumbers) -> Answer:
    """The referee's rows of the tokens that were returned."""
    return {
        position: row
        for position, row in numbers.answer.items()
        if 0 <= position < len(audited.tokens) and row.token == audited.tokens[position]
    }


def _divergence(audited: AuditedAnswer, referee: Answer, thresholds: Thresholds) -> Iterator[Finding]:
    if audited.rows:
        same = _same_places(audited, referee)
        provider = {
            position: Row.of(row) for position, row in enumerate(audited.rows) if position in same and len(row.top) >= MIN_ENTRIES
        }
        distance = measure_divergence(provider, referee, _scales(audited.sampling))
        least = thresholds.divergence if audited.class_known else max(thresholds.divergence, UNKNOWN_CLASS_DIVERGENCE)
        yield Finding(DIVERGENCE, distance.mean, least, distance.conclusive)


def _same_places(audited: AuditedAnswer, referee: Answer) -> set[int]:
    """Positions at which the rows and the referee speak of the same place of the answer.

    A referee that reads the text may split it otherwise than the model wrote it, which shifts all later tokens. Then equal tokens
    are chance: they count only after ALIGNED equal ones.
    """
    places, equal = set[int](), ALIGNED
    for position, (row, token) in enumerate(zip(audited.rows, audited.tokens, strict=False)):
        equal = equal + 1 if row.token == token else 0
        if equal > ALIGNED and position in referee:
            places.add(position)
    return places


def _scales(sampling: SamplingTerms) -> tuple[float, ...]:
    """Temperatures at which an engine may have reported its numbers: that of the request, or its own where that has none."""
    return USUAL_TEMPERATURES if sampling.temperature is None else (sampling.temperature,)


def _sampling(audited: AuditedAnswer, referee: Answer, thresholds: Thresholds) -> Iterator[Finding]:
    """The greedy margin of an answer at temperature 0, the surprisal of any other one whose temperature is declared."""
    temperature = audited.sampling.temperature
    if temperature is None:
        return
    if audited.sampling.greedy:
        margin = measure_margin(referee)
        yield Finding(MARGIN, margin.mean, thresholds.margin, margin.conclusive)
        return
    surprisal = measure_surprisal(referee, Sampling(temperature))
    # An engine that truncates draws likely tokens more often than the model says, which must not count against it. A bet on
    # unlikely ones gains nothing by that: it moves probability to tokens that are not drawn.
    evidence = pool_of(surprisal, None, untruncated=audited.sampling.untruncated).surprisal.log_evidence
    yield Finding(SURPRISAL, evidence, thresholds.surprisal, surprisal.positions >= MIN_SURPRISAL_POSITIONS)


def _cut(audited: AuditedAnswer, numbers: RefereeNumbers, thresholds: Thresholds) -> Iterator[Finding]:
    evidence = _cut_evidence(audited, numbers)
    if evidence is not None:
        yield Finding(CUT, evidence, thresholds.cut)


def _cut_evidence(audited: AuditedAnswer, numbers: RefereeNumbers) -> float | None:
    """The evidence that an answer was cut, in nats; None if it does not claim to have ended by itself."""
    if not audited.ended or numbers.end_logprob is None or audited.sampling.temperature is None:
        return None
    return cut_evidence(numbers.end_logprob, len(audited.tokens))


def _replay(audited: AuditedAnswer, referee: Answer, thresholds: Thresholds) -> Iterator[Finding]:
    """Whether an answer that was drawn repeats an earlier one, as far as the referee scored its beginning without a gap."""
    temperature = audited.sampling.temperature
    if not temperature or not audited.earlier or not audited.sampling.independent:
        return
    surprisals: list[float] = []
    for position, token in enumerate(audited.tokens):
        row = referee.get(position)
        if row is None or not row.logprobs:
            break
        surprisals.append(_surprisal(row, token, temperature))
    tokens = list(audited.tokens[: len(surprisals)])
    earlier = audited.earlier[-MAX_EARLIER:]
    evidence = max(replay_evidence(tokens, surprisals, other) for other in earlier) - math.log(len(earlier))
    yield Finding(REPLAY, evidence, thresholds.replay)


def _surprisal(row: Row, token: int, temperature: float) -> float:
    """The surprisal of a token under the temperature, at most: the tokens that the row lacks are left out."""
    weights = {other: value / temperature for other, value in row.logprobs.items()}
    best = max(weights.values())
    total = best + math.log(math.fsum(math.exp(value - best) for value in weights.values()))
    return max(0.0, total - weights.get(token, min(weights.values())))
