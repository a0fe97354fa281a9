"""The scenario of a simulation: how many parties there are, and the distributions that they are drawn from.

A day's pattern runs `speedup` times as fast as a clock, and so do the comings and goings of nodes; requests, answers and waits
take their real time. So a day of 24 hours at a speedup of 144 is ten minutes of traffic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, log, pi, sin
from random import Random

from tallystick.client.config import ClientConfig

HOUR = 3_600.0
_CLIENT = ClientConfig()
REGIONS = ("eu", "us", "ap")


@dataclass(frozen=True, slots=True)
class Scenario:
    """See the module's docstring. `load`: the mean share of all slots that the traffic would fill if nothing were lost."""

    nodes: int = 10_000
    models: int = 1_000
    payers: int = 4_000
    hours: float = 24.0
    speedup: float = 144.0
    load: float = 0.6
    seed: int = 1
    replicas: int = 1
    """Processes of the coordinator. Each node is connected to all, each payer uses the one that rendezvous hashing gives it."""
    flood: bool = True
    """Whether a payer floods one model for a twelfth of the day, from the middle of it."""
    stalled_share: float = 0.01
    """Payers whose clients stop reading for STALL_SECONDS while they wait."""
    wait: int | None = None
    """Seconds that a job waits for a slot. None: the coordinator's default."""
    shortlist_size: int = _CLIENT.shortlist_size
    shortlist_seconds: float = _CLIENT.shortlist_seconds

    @property
    def seconds(self) -> float:
        """The length of the run, in seconds of traffic."""
        return self.hours * HOUR / self.speedup

    @property
    def flood_window(self) -> tuple[float, float]:
        """When the flood begins and ends."""
        return self.seconds / 2, self.seconds * 7 / 12

    def random(self, *names: object) -> Random:
        """Returns the random numbers of one purpose. They do not depend on what other purposes drew."""
        return Random("/".join(map(str, (self.seed, *names))))

    def rate_at(self, second: float) -> float:
        """The traffic at a time over the mean traffic: half as much more at noon, half as much less at midnight."""
        return 1 - 0.5 * sin(2 * pi * (second * self.speedup / (24 * HOUR) + 0.25))


@dataclass(frozen=True, slots=True)
class Tokens:
    """Distributions of sizes: log-normal with this median and sigma, at most `most` tokens."""

    median: float
    sigma: float
    most: int

    def draw(self, random: Random) -> int:
        """Returns a number of tokens, at least 1."""
        return max(1, min(int(random.lognormvariate(log(self.median), self.sigma)), self.most))

    @property
    def mean(self) -> float:
        """The mean before the cut at `most`."""
        return self.median * exp(self.sigma**2 / 2)


FIRST_MESSAGE, LATER_MESSAGE, ANSWER = Tokens(900, 1.2, 24_000), Tokens(120, 1.0, 4_000), Tokens(900, 1.0, 8_192)
MEAN_TURNS = 4.0
THINKING = 10.0
"""Median seconds between an answer and the next message of its conversation."""


def capped_shares(weights: Sequence[float], most: float) -> list[float]:
    """Returns shares in proportion to weights, of which none exceeds `most`, unless all are equal."""
    shares, most = [weight / sum(weights) for weight in weights], max(most, 1 / len(weights))
    for _ in range(100):
        shares = [min(share, most) for share in shares]
        rest, room = 1 - sum(shares), sum(share for share in shares if share < most)
        if rest < 1e-9 or not room:
            break
        shares = [share * (1 + rest / room) if share < most else share for share in shares]
    return shares


def pareto(random: Random, mean: float, shape: float = 1.5) -> float:
    """Returns a length of heavy tail with this mean, at most 20 times as long."""
    return min(mean * (shape - 1) / shape * random.paretovariate(shape), 20 * mean)


def choose(random: Random, weights: Sequence[float], number: int) -> list[int]:
    """Returns up to `number` different indexes, drawn by cumulative weights."""
    return list(dict.fromkeys(random.choices(range(len(weights)), cum_weights=weights, k=number)))
