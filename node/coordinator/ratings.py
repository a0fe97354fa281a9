"""Watches how coordinators rate this node: an integrity that falls, or that is less than requests ask for, costs it jobs.

What a coordinator says is read within bounds and changes nothing here: it is shown, counted and warned about.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field

from node.coordinator.coordinator_http import base_url
from tallystick.protocol.criteria import Reason
from tallystick.protocol.errors import BadMessage, Code, Fault, TallyError, Unavailable
from tallystick.protocol.health import CheckResult, Health
from tallystick.protocol.json_members import read_items, read_members
from tallystick.protocol.types import Address

READ_SECONDS = 300.0
"""The time between two questions to the coordinators."""
ANSWER_SECONDS = 5.0
DAY = 86_400.0
FALL_PERCENT = 5.0
"""A fall within a day of at least so much is a warning. Without audits, integrity falls by less."""
DECISIONS = 50
MISSED_SHARE, MIN_MISSED = 0.2, 3
"""A warning: that many of the latest decisions, and this share of them, asked for more integrity."""
MAX_RATINGS = 256
Fetch = Callable[[str], Awaitable[object]]
Product = tuple[str, str]
"""A model and its precision class."""


@dataclass(slots=True)
class _Rated:
    """The integrity of one product at one coordinator, in percent, newest last, with the time of each reading."""

    audits: int = 0
    readings: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=round(DAY / READ_SECONDS)))

    @property
    def integrity(self) -> float:
        return self.readings[-1][1]

    def fall(self, now: float) -> float:
        """How much it fell within a day."""
        return max((value for at, value in self.readings if now - at <= DAY), default=self.integrity) - self.integrity


class Ratings:
    """How each coordinator rates what this provider sells. `urls` returns the node links' URLs that are connected.

    `products` returns what this node offers: others in an answer are ignored. `now` is Unix seconds.
    """

    def __init__(
        self,
        provider: Address,
        urls: Callable[[], Iterable[str]],
        products: Callable[[], Iterable[Product]],
        *,
        fetch: Fetch,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._provider, self._urls, self._products = provider, urls, products
        self._fetch, self._now = fetch, now
        self._rated: dict[tuple[str, Product], _Rated] = {}
        self._missed: dict[str, tuple[int, int]] = {}
        self._read_at: float | None = None

    def integrity(self) -> Mapping[Product, float]:
        """The lowest integrity of each product with an audit, in percent, of all coordinators that are connected."""
        lowest: dict[Product, float] = {}
        for (_, product), rated in self._rated.items():
            if rated.audits:
                lowest[product] = min(rated.integrity, lowest.get(product, 100.0))
        return lowest

    async def ask_decisions(self, query: str) -> object:
        """What a coordinator that is connected says of its decisions about this node. Raises Unavailable, and its own error."""
        url = next(iter(self._urls()), None)
        if url is None:
            raise Unavailable(Code.COORDINATOR_UNAVAILABLE, "no coordinator is connected")
        return await self._fetch(f"{base_url(url)}/v1/providers/{self._provider}/why?{query}")

    async def check(self) -> dict[str, CheckResult]:
        """The state of `integrity`; nothing before a coordinator that audits anything has answered."""
        now = self._now()
        if self._read_at is None or now - self._read_at >= READ_SECONDS:
            self._read_at = now
            await self._read(now)
        lowest = min(self.integrity().values(), default=None)
        problem = self._problem(now)
        if problem:
            remedy = "tally node why; then compare the engine's model file and precision with what the config says of them"
            return {"integrity": CheckResult(Health.WARN, problem, remedy, lowest, "" if lowest is None else "%")}
        return {} if lowest is None else {"integrity": CheckResult(Health.PASS, value=lowest, unit="%")}

    def _problem(self, now: float) -> str:
        problems = []
        for (_, (model, precision)), rated in self._rated.items():
            fall = rated.fall(now)
            if rated.audits and fall >= FALL_PERCENT:
                name = f"{model} ({precision})" if precision else model
                problems.append(f"the integrity of {name} fell by {fall:.1f} to {rated.integrity:g} % within a day")
        for missed, decisions in self._missed.values():
            if missed >= max(MIN_MISSED, MISSED_SHARE * decisions):
                problems.append(f"{missed} of the latest {decisions} requests asked for more integrity than this node has")
        return "; ".join(dict.fromkeys(problems))

    async def _read(self, now: float) -> None:
        """Asks each coordinator. What one that does not answer said before is forgotten: its link says what is wrong."""
        urls = list(dict.fromkeys(base_url(url) for url in self._urls()))
        former, self._rated, self._missed = self._rated, {}, {}
        answers = await asyncio.gather(*(self._ask(url) for url in urls))
        wanted = frozenset(self._products())
        for url, answer in zip(urls, answers, strict=True):
            if answer is None:
                continue
            ratings, self._missed[url] = answer
            for product, integrity, audits in ratings:
                if product in wanted:
                    rated = self._rated[url, product] = former.get((url, product), _Rated())
                    rated.audits = audits
                    rated.readings.append((now, integrity))

    async def _ask(self, url: str) -> tuple[list[tuple[Product, float, int]], tuple[int, int]] | None:
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                raw = await self._fetch(f"{url}/v1/providers/{self._provider}/why?limit={DECISIONS}")
            return _ratings(raw), _missed(raw)
        except (TallyError, TimeoutError):
            return None


def _ratings(raw: object) -> list[tuple[Product, float, int]]:
    (listed,) = read_members(raw, "why", "ratings")
    ratings = []
    for entry in read_items(listed, "why.ratings", MAX_RATINGS):
        model, precision, integrity, audits = read_members(entry, "why.ratings", "model", "precision", "integrity", "audits")
        if not (isinstance(model, str) and isinstance(precision, str) and isinstance(audits, int)):
            raise BadMessage("why.ratings: expected a model, a precision and a number of audits", fault=Fault.COORDINATOR)
        if not isinstance(integrity, int | float) or not 0 <= integrity <= 100:
            raise BadMessage("why.ratings.integrity: expected 0 to 100", fault=Fault.COORDINATOR)
        ratings.append(((model, precision), float(integrity), audits))
    return ratings


def _missed(raw: object) -> tuple[int, int]:
    """How many of the latest shortlists left this provider out for its integrity, and how many there were."""
    (listed,) = read_members(raw, "why", "decisions")
    reasons = []
    for entry in read_items(listed, "why.decisions", DECISIONS):
        stage, reason = read_members(entry, "why.decisions", "stage", "why")
        if stage == "shortlist":
            reasons.append(reason)
    return reasons.count(Reason.INTEGRITY.value), len(reasons)
