"""From observed answers to figures: how soon each cheater is confirmed, and how often an honest provider is suspected. Pure.

Audits are drawn from what was observed: an answer, and positions of it as a client draws them. The tests are the client's.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field

from scripts.trust.observations import Observation
from tallystick.audit.integrity import Integrity, audit_rate
from tallystick.audit.scores import scored_answer
from tallystick.audit.thresholds import Thresholds
from tallystick.audit.token_counts import PooledCounts
from tallystick.audit.verdicts import Audit, Referees, Verdict, judge, needs_opinion
from tallystick.client.audits.findings import AuditedAnswer, RefereeNumbers, find, pooled_evidence
from tallystick.client.audits.planning import choose_positions
from tallystick.client.audits.pools import Pool, bounded
from tallystick.client.audits.provider_verdict import judge_provider_and_counts
from tallystick.client.audits.sampling_terms import read_sampling
from tallystick.protocol.token_scores import ScoreResponse

REFEREES = ("own:engine", "provider1", "provider2")
POSITIONS = 64
"""Positions of an audit, as clients have it by default."""
MAX_JOBS = 400
"""Audited jobs after which a provider counts as not found."""
CHEATED_SHARE = 0.2
HONEST_JOBS = 10
INPUT_PRICE, OUTPUT_PRICE = 1, 4
"""Relative prices, as nodes have them by default."""
SETTLED_JOBS = 2_000
"""Jobs after which the audit rate of an honest provider is taken to be steady."""


@dataclass
class Client:
    """What one client knows of one provider. Its own engine looks first; other referees are honest too.

    Each looks at positions of its own. An observed answer that is drawn again is not compared with itself.
    """

    draws: random.Random
    thresholds: Thresholds = field(default_factory=Thresholds)
    rules: Referees = field(default_factory=lambda: Referees(captured=0.0))
    history: list[Audit] = field(default_factory=list)
    counts: dict[str, PooledCounts] = field(default_factory=dict)
    pools: list[tuple[str, Pool]] = field(default_factory=list)
    earlier: dict[int, Observation] = field(default_factory=dict)
    jobs: int = 0
    tokens: int = 0

    def audit(self, observation: Observation) -> Verdict:
        """Audits one job, by as many referees as it needs. Returns the verdict of the first."""
        job = b"%d" % self.jobs
        votes: list[Audit] = []
        while not votes or (needs_opinion(votes, self.rules) and len(votes) < self.rules.opinions):
            referee = REFEREES[len(votes)]
            numbers = self._numbers(observation)
            audited = self._audited(observation)
            votes.append(Audit(job, referee.encode(), judge(find(audited, numbers, self.thresholds))))
            if len(votes) == 1:
                self.pools.append((referee, bounded(pooled_evidence(audited, numbers))))
            pooled = self.counts.get(referee, PooledCounts())
            counted = observation.response.prompt_tokens + len(observation.response.tokens)
            self.counts[referee] = pooled.add(observation.billed, counted)
        self.history += votes
        self.earlier[id(observation)] = observation
        self.jobs += 1
        self.tokens += len(observation.tokens)
        return votes[0].verdict

    def _numbers(self, observation: Observation) -> RefereeNumbers:
        """What a referee says of positions of its own."""
        positions = set(choose_positions(len(observation.tokens), POSITIONS, self.draws.randbytes))
        response = observation.response
        seen = tuple(row for row in response.rows if row is not None and row.position in positions)
        seen_response = ScoreResponse(response.model, response.prompt_tokens, response.tokens, seen)
        return RefereeNumbers(scored_answer(seen_response), response.end_logprob)

    def _audited(self, observation: Observation) -> AuditedAnswer:
        return AuditedAnswer(
            rows=observation.rows,
            tokens=observation.tokens,
            sampling=read_sampling(observation.request),
            ended=observation.ended,
            earlier=[other.tokens[:256] for other in self.earlier.values() if other is not observation],
        )

    @property
    def verdict(self) -> Verdict:
        """The verdict on the provider."""
        return judge_provider_and_counts(self.history, self.counts, self.rules, self.pools)


@dataclass(frozen=True, slots=True)
class Detection:
    """How a provider was found: audited jobs and tokens until it was confirmed; None if it was not."""

    jobs: int | None
    tokens: int | None


def detect(jobs: Iterator[Observation], draws: random.Random, thresholds: Thresholds, most: int = MAX_JOBS) -> Detection:
    """Audits the jobs of a provider until it is confirmed."""
    client = Client(draws, thresholds)
    for number, observation in zip(range(1, most + 1), jobs, strict=False):
        client.audit(observation)
        if client.verdict is Verdict.CONFIRMED:
            return Detection(number, client.tokens)
    return Detection(None, None)


def drawn(observations: Sequence[Observation], draws: random.Random) -> Iterator[Observation]:
    """An endless sequence of jobs like these."""
    while True:
        yield draws.choice(observations)


def sometimes(honest: Sequence[Observation], cheated: Sequence[Observation], draws: random.Random) -> Iterator[Observation]:
    """Cheats on a share of its jobs."""
    while True:
        yield draws.choice(cheated if draws.random() < CHEATED_SHARE else honest)


def later(honest: Sequence[Observation], cheated: Sequence[Observation], draws: random.Random) -> Iterator[Observation]:
    """Guesses that the first jobs are watched, and cheats from then on."""
    for number in range(MAX_JOBS):
        yield draws.choice(cheated if number >= HONEST_JOBS else honest)


def detection_figures(detections: Sequence[Detection]) -> dict[str, float | None]:
    """The figures of one cheater; None where it was not found so often."""
    jobs = sorted(detection.jobs or MAX_JOBS + 1 for detection in detections)
    tokens = [detection.tokens for detection in detections if detection.tokens is not None]

    def quantile(share: float) -> float | None:
        value = jobs[min(len(jobs) - 1, int(share * len(jobs)))]
        return value if value <= MAX_JOBS else None

    return {
        "jobs_to_confirm_p50": quantile(0.5),
        "jobs_to_confirm_p95": quantile(0.95),
        "tokens_to_confirm_p50": statistics.median(tokens) if 2 * len(tokens) > len(detections) else None,
        "found_share": len(tokens) / len(detections),
    }


def honest_figures(honest: Sequence[Observation], draws: random.Random, thresholds: Thresholds, audits: int) -> dict[str, float]:
    """How often honest providers are suspected by an audit, and confirmed, in so many audits of 500 a provider."""
    suspect = confirmed = done = 0
    while done < audits:
        client = Client(draws, thresholds)
        for observation, _ in zip(drawn(honest, draws), range(min(500, audits - done)), strict=False):
            suspect += client.audit(observation) is Verdict.SUSPECT
            done += 1
        confirmed += client.verdict is Verdict.CONFIRMED
    return {"honest_suspect_per_1000": 1000 * suspect / done, "honest_confirmed_per_1000": 1000 * confirmed / done}


def cost_share(honest: Sequence[Observation]) -> float:
    """What the audits of an honest provider cost at a steady state, as a share of what its jobs cost, at the default prices.

    An audit reads prompt and answer once, at the price of input.
    """
    prompt = statistics.fmean(observation.response.prompt_tokens for observation in honest)
    answer = statistics.fmean(len(observation.tokens) for observation in honest)
    integrity, audits = Integrity(), 0.0
    for job in range(SETTLED_JOBS):
        audits += audit_rate(integrity, job)
        if audits >= 1:
            audits -= 1
            integrity = integrity.after(Verdict.PASS)
    job_price = prompt * INPUT_PRICE + answer * OUTPUT_PRICE
    return audit_rate(integrity, SETTLED_JOBS) * (prompt + answer) * INPUT_PRICE / job_price


def served_share(detection: Mapping[str, float | None], honest_jobs: int = 1_000) -> float:
    """The share of a client's jobs that a cheater still gets until the median client blocks it, of so many jobs."""
    needed = detection["jobs_to_confirm_p50"]
    if needed is None:
        return 1.0
    audited, jobs = 0.0, 0
    while audited < needed and jobs < honest_jobs:
        audited += audit_rate(Integrity(), jobs)
        jobs += 1
    return jobs / honest_jobs


Jobs = Callable[[random.Random], Iterator[Observation]]


def cheaters_of(observed: Mapping[str, Sequence[Observation]]) -> dict[str, Jobs]:
    """The jobs of each cheater, of which some mix honest answers with those of another one."""
    honest = [*observed["honest_a"], *observed["honest_b"]]
    names = [name for name in observed if not name.startswith("honest")]
    jobs: dict[str, Jobs] = {name: lambda draws, name=name: drawn(observed[name], draws) for name in names}  # type: ignore[misc]
    if "q4_0" in observed:
        jobs["one_job_in_five"] = lambda draws: sometimes(honest, observed["q4_0"], draws)
        jobs["honest_at_first"] = lambda draws: later(honest, observed["q4_0"], draws)
    return jobs


def cheater_figures(observed: Mapping[str, Sequence[Observation]], name: str, runs: int, seed: int) -> dict[str, float | None]:
    """The figures of one cheater, by so many clients."""
    draws, thresholds, jobs = random.Random(f"{seed} {name}"), Thresholds(), cheaters_of(observed)[name]
    found = detection_figures([detect(jobs(draws), draws, thresholds) for _ in range(runs)])
    return found | {"served_share": served_share(found)}


def figures(
    observed: Mapping[str, Sequence[Observation]], *, runs: int, audits: int, seed: int = 1, pool: Executor | None = None
) -> dict[str, object]:
    """All figures, the same ones for a seed. `runs`: clients a cheater; `audits`: of honest providers; `pool`: computes them."""
    honest, names = [*observed["honest_a"], *observed["honest_b"]], list(cheaters_of(observed))
    arguments = honest, random.Random(seed), Thresholds(), audits
    each = [observed] * len(names), names, [runs] * len(names), [seed] * len(names)
    if pool is None:
        found, shared = list(map(cheater_figures, *each)), honest_figures(*arguments)
    else:
        future = pool.submit(honest_figures, *arguments)
        found, shared = list(pool.map(cheater_figures, *each)), future.result()
    return {"cheaters": dict(zip(names, found, strict=True)), **shared, "audit_cost_share": cost_share(honest)}
