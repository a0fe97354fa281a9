"""Records of a run and the figures that it is judged by."""

from __future__ import annotations

from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from scripts.simulation.parties import Payer, SimulatedNode
from scripts.simulation.scenario import Scenario
from tallystick.protocol.errors import Code

SLICES = 24
"""Parts of the day for which the figures over time are kept."""
_MIN_JOBS, _MIN_GROUP = 20, 3
PERCENTILES = (*range(101), 99.5, 99.9)


@dataclass(slots=True, eq=False)
class JobResult:
    """One request, from its arrival. Prices in base units; `full_price`: without a cache; `best_price`: of the cheapest
    connected provider.
    """

    at: float
    payer: Payer
    model: str
    input: int
    earlier: int
    """Input tokens that an earlier turn of the conversation had already, so that they may be cached."""
    wait: float | None = None
    """Seconds until its first attempt."""
    waited: bool = False
    beside_free: bool = False
    """Whether a slot that fits was free, and not another job's, when it began to wait."""
    attempts: int = 0
    first_token: float = 0.0
    service: float = 0.0
    """Seconds of the attempt that answered."""
    cached: int = 0
    paid: int = 0
    full_price: int = 0
    best_price: int = 0
    best_free_price: int = 0
    """Of the cheapest provider that had a free slot when the job came."""
    error: Code | None = None
    answered: bool = False
    ended: bool = False


@dataclass(slots=True)
class _PayerSums:
    jobs: int = 0
    service_share: float = 0.0
    """Sum over its jobs of the share of the time until the answer in which an engine worked; 0 for a job without an answer."""


@dataclass(slots=True)
class Recorder:
    """Adds up what happened."""

    scenario: Scenario
    flooded: str | None = None
    began_jobs: int = 0
    ended_jobs: int = 0
    honest_jobs: int = 0
    """Those that ended, without those of the payer who floods."""
    honest_answered: int = 0
    unfinished: int = 0
    """Jobs that had not ended when the day was over."""
    answered: int = 0
    attempts: int = 0
    refused: int = 0
    """Jobs that a node had no slot for, because another replica's job had just taken it."""
    waiting_jobs: int = 0
    beside_free: int = 0
    """Those of them that began to wait although a slot was free."""
    errors: Counter[Code] = field(default_factory=Counter)
    _at: array[float] = field(default_factory=lambda: array("d"))
    _waits: array[float] = field(default_factory=lambda: array("d"))
    _first_tokens: array[float] = field(default_factory=lambda: array("d"))
    _flood_waits: dict[bool, list[float]] = field(default_factory=lambda: {False: [], True: []})
    _payers: dict[int, _PayerSums] = field(default_factory=lambda: defaultdict(_PayerSums))
    _sums: Counter[str] = field(default_factory=Counter)
    _busy: list[float] = field(default_factory=lambda: [0.0] * SLICES)
    _online: list[float] = field(default_factory=lambda: [0.0] * SLICES)
    _since: dict[int, float] = field(default_factory=dict)
    _node_busy: dict[int, float] = field(default_factory=lambda: defaultdict(float))
    _node_earned: dict[int, float] = field(default_factory=lambda: defaultdict(float))
    _nodes: Sequence[SimulatedNode] = ()

    def began(self, result: JobResult) -> JobResult:
        """Counts a request that begins."""
        self.began_jobs += 1
        return result

    def ended(self, result: JobResult) -> None:
        """Counts a request that ended."""
        if result.ended:
            raise RuntimeError("a job ended twice")
        result.ended = True
        if not result.answered and result.error is None:
            self.unfinished += 1  # the day is over
            return
        self.ended_jobs += 1
        self.attempts += result.attempts
        self.waiting_jobs += result.waited
        self.beside_free += result.beside_free
        wait = result.wait or 0.0
        if result.error is not None:
            self.errors[result.error] += 1
        if result.error is not Code.RATE_LIMITED:
            self._record_wait(result, wait)
        if not result.payer.flooding:
            self.honest_jobs += 1
            self.honest_answered += result.answered
            sums = self._payers[result.payer.number]
            sums.jobs += 1
            if result.answered:
                sums.service_share += result.service / max(wait + result.service, 1e-9)
        if result.answered:
            self._record_answer(result)

    def _record_wait(self, result: JobResult, wait: float) -> None:
        begin, end = self.scenario.flood_window
        if result.model == self.flooded and begin <= result.at < end:
            self._flood_waits[result.payer.flooding].append(wait)
        if not result.payer.flooding:
            self._at.append(result.at)
            self._waits.append(wait)

    def _record_answer(self, result: JobResult) -> None:
        self.answered += 1
        if not result.payer.flooding:
            self._first_tokens.append(result.first_token)
        sums = self._sums
        sums["paid"] += int(result.paid)
        sums["full_price"] += int(result.full_price)
        sums["best_price"] += int(result.best_price)
        if result.best_free_price:
            sums["price_if_free"] += int(result.full_price)
            sums["best_free_price"] += int(result.best_free_price)
        sums["cached"] += result.cached
        sums["earlier"] += result.earlier

    # Nodes

    def node_online(self, node: SimulatedNode, now: float) -> None:
        """Notes a connection."""
        self._since[node.number] = now

    def node_offline(self, node: SimulatedNode, now: float) -> None:
        """Notes the end of a connection."""
        since = self._since.pop(node.number)
        node.slot_seconds += node.capacity.slots * (now - since)
        self._spread(self._online, since, now, node.capacity.slots)

    def busy(self, node: SimulatedNode, begin: float, end: float) -> None:
        """Notes that one of a node's slots was used."""
        self._node_busy[node.number] += end - begin
        self._spread(self._busy, begin, end, 1)

    def earned(self, node: SimulatedNode, seconds: float) -> None:
        """Notes income of a node, as the seconds in which one slot of an ordinary node earns as much at the list price."""
        self._node_earned[node.number] += seconds

    def _spread(self, slices: list[float], begin: float, end: float, weight: float) -> None:
        """Adds a span of time to the slices of the day that it touches."""
        width = self.scenario.seconds / SLICES
        for number in range(int(begin / width), min(int(end / width), SLICES - 1) + 1):
            overlap = min(end, (number + 1) * width) - max(begin, number * width)
            slices[number] += weight * max(overlap, 0.0)

    def close(self, nodes: Sequence[SimulatedNode], now: float) -> None:
        """Ends the run."""
        self._nodes = nodes
        for node in nodes:
            if node.number in self._since:
                self.node_offline(node, now)

    # Figures

    @property
    def paid(self) -> int:
        """Base units that were paid for all answers."""
        return self._sums["paid"]

    def report(self) -> dict[str, Any]:
        """Returns the figures, and the distributions that plots show."""
        incomes = self._incomes()
        return {
            "figures": self.figures(incomes),
            "errors": {code.value: number for code, number in sorted(self.errors.items())},
            "utilisation_by_slice": [_round(busy / online) for busy, online in zip(self._busy, self._online, strict=True)],
            "wait_p95_by_slice": [_round(percentile(waits, 95)) for waits in self._by_slice()],
            "wait_percentiles": [[percent, _round(percentile(self._waits, percent))] for percent in PERCENTILES],
            "income_percentiles": [[percent, _round(percentile(incomes, percent))] for percent in range(101)],
        }

    def figures(self, incomes: Sequence[float]) -> dict[str, float]:
        """Returns the figures by name."""
        sums, ended = self._sums, max(self.ended_jobs, 1)
        by_payer = [payer.service_share / payer.jobs for payer in self._payers.values() if payer.jobs >= _MIN_JOBS]
        newcomers = [node for node in self._nodes if node.history is None and node.slot_seconds]
        figures: dict[str, float] = {
            "jobs": self.ended_jobs,
            "answered_share": self.honest_answered / max(self.honest_jobs, 1),
            "failed_attempt_share": 1 - self.answered / max(self.attempts, 1),
            "refused_share": self.refused / ended,
            "waited_share": self.waiting_jobs / ended,
            "waited_beside_free_share": self.beside_free / max(self.waiting_jobs, 1),
            "utilisation": sum(self._busy) / max(sum(self._online), 1e-9),
            **{f"wait_s_p{percent}": percentile(self._waits, percent) for percent in (50, 90, 95, 99)},
            **{f"first_token_s_p{percent}": percentile(self._first_tokens, percent) for percent in (50, 95)},
            "price_over_best": sums["full_price"] / max(sums["best_price"], 1),
            "price_over_best_free": sums["price_if_free"] / max(sums["best_free_price"], 1),
            "paid_over_best": sums["paid"] / max(sums["best_price"], 1),
            "cache_hit_share": sums["cached"] / max(sums["earlier"], 1),
            "jain_payers": jain(by_payer),
            "jain_equal_providers": self._jain_of_equals(),
            "income_gini": gini(incomes),
            "income_p10": percentile(incomes, 10),
            "income_p50": percentile(incomes, 50),
            "income_p90": percentile(incomes, 90),
            "idle_providers_share": sum(income < 0.01 for income in incomes) / max(len(incomes), 1),
            "newcomers_judged_share": sum(node.attempts >= 10 for node in newcomers) / max(len(newcomers), 1),
            **{f"flood_others_wait_s_p{percent}": percentile(self._flood_waits[False], percent) for percent in (50, 95)},
            **{f"flood_flooder_wait_s_p{percent}": percentile(self._flood_waits[True], percent) for percent in (50, 95)},
        }
        return {name: _round(value) for name, value in figures.items()}

    def _incomes(self) -> list[float]:
        """Returns the income of each node that was connected for a twentieth of the day, per slot and second, sorted.

        1: as an ordinary node that always works at the list price.
        """
        least = self.scenario.seconds / 20
        connected = [node for node in self._nodes if node.slot_seconds >= least * node.capacity.slots]
        return sorted(self._node_earned[node.number] / node.slot_seconds for node in connected)

    def _jain_of_equals(self) -> float:
        """Returns the mean of Jain's index over groups of reliable nodes with one ask each, of equal model, price and slots.

        What is compared is the share of time in which their slots worked.
        """
        groups: dict[tuple[Any, ...], list[float]] = defaultdict(list)
        least = self.scenario.seconds / 20
        for node in self._nodes:
            alike = len(node.asks) == 1 and node.list_price and node.failures < 0.01 and node.history is not None
            if alike and node.slot_seconds >= least * node.capacity.slots:
                group = node.asks[0].message.model, node.capacity.slots
                groups[group].append(self._node_busy[node.number] / node.slot_seconds)
        sized = [shares for shares in groups.values() if len(shares) >= _MIN_GROUP]
        return sum(len(shares) * jain(shares) for shares in sized) / max(sum(map(len, sized)), 1)

    def _by_slice(self) -> list[list[float]]:
        width, slices = self.scenario.seconds / SLICES, [list[float]() for _ in range(SLICES)]
        for at, wait in zip(self._at, self._waits, strict=True):
            slices[min(int(at / width), SLICES - 1)].append(wait)
        return slices


def _round(value: float) -> float:
    return round(value, 4)


def percentile(values: Iterable[float], percent: float) -> float:
    """Returns the value that `percent` of all do not exceed; 0 without any."""
    ordered = sorted(values)
    return ordered[min(int(len(ordered) * percent / 100), len(ordered) - 1)] if ordered else 0.0


def jain(values: Sequence[float]) -> float:
    """Returns Jain's fairness index: 1 if all are equal, 1/n if one has everything (Jain, Chiu and Hawe, DEC TR-301, 1984)."""
    squares = sum(value * value for value in values)
    return sum(values) ** 2 / (len(values) * squares) if squares else 1.0


def gini(values: Sequence[float]) -> float:
    """Returns the Gini coefficient: 0 if all are equal, near 1 if one has everything."""
    ordered, total = sorted(values), sum(values)
    if not total:
        return 0.0
    weighted = sum(rank * value for rank, value in enumerate(ordered, 1))
    return 2 * weighted / (len(ordered) * total) - (len(ordered) + 1) / len(ordered)
