"""Times shortlists among many asks, in cases that are hard for an index, and prints goals beside them. --json: one object.

Keys: `match_us_p50_N_CASE` and `match_us_p99_N_CASE` are microseconds of CPU time of one shortlist among N asks. `update_us_N`
is the mean of a capacity report that fills or frees a node. `bytes_per_ask` is the memory of one listed ask, with its index.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from random import Random
from time import thread_time

from coordinator.domain.ask_book import AskBook
from coordinator.domain.integrity_records import UNAUDITED
from coordinator.domain.matching import shortlist
from coordinator.domain.ranking import quality_bound, reliability
from coordinator.domain.reputation import UNKNOWN_PROVIDER, Reputation
from tallystick.cli.progress import activity
from tallystick.protocol.criteria import Demand
from tallystick.protocol.eip712 import Verified
from tallystick.protocol.link import Capacity
from tallystick.protocol.messages import Ask, Spec
from tallystick.protocol.requirements import Requirements
from tallystick.protocol.types import Address, Hash

NOW = 1_800_000_000
SIZES = (1_000, 10_000, 100_000)
MODELS = 1_000
MODEL = "model-0"
GOALS = {"match_us_p50": 50.0, "match_us_p99": 250.0, "update_us": 20.0, "bytes_per_ask": 1_024.0}
_FREE = Capacity(2, 2, 40, 250)
_FULL = Capacity(0, 2, 40, 250)


@dataclass(frozen=True, slots=True)
class Case:
    """A state of the market and a demand. `full` and `elsewhere`: whether ask number n is busy, or in another region."""

    name: str
    demand: Demand
    full: Callable[[int], bool] = lambda _: False
    elsewhere: Callable[[int], bool] = lambda _: False
    models: int = 1
    equal_prices: bool = False
    excluded: int = 0


CASES = (
    Case("all_fit", Demand(MODEL)),
    Case("equal_prices", Demand(MODEL), equal_prices=True),
    Case("99_percent_busy", Demand(MODEL), full=lambda n: n % 100 != 0),
    Case("99_percent_elsewhere", Demand(MODEL, require=Requirements(region=("eu",))), elsewhere=lambda n: n % 100 != 0),
    Case("sort_by_latency", Demand(MODEL, sort="latency")),
    Case("1000_excluded", Demand(MODEL), excluded=1_000),
    Case("1000_models", Demand(MODEL), models=MODELS),
)


def _asks(case: Case, number: int, random: Random) -> Iterator[tuple[Address, Verified[Ask], Capacity]]:
    """Yields one ask each of `number` providers, the cheapest first. Nobody checks their signatures here."""
    for n in range(number):
        provider = Address(f"0x{random.getrandbits(160):040x}")
        price = 1_000_000 if case.equal_prices else 1_000_000 + 40 * n
        ask = Ask(
            provider=provider,
            model=f"model-{n % case.models}",
            input_price=price,
            cached_input_price=price // 2,
            output_price=2 * price,
            context_tokens=32_768,
            max_output_tokens=4_096,
            sealing_suite="x25519-sha256-aes128gcm",
            sealing_key=random.randbytes(32),
            valid_from=NOW - 60,
            valid_until=NOW + 3_600,
            seq=1,
            spec=Spec(region="us" if case.elsewhere(n) else "eu", engine="vllm", precision="fp8", features=("tools",)),
        )
        speeds = replace(_FULL if case.full(n) else _FREE, first_token_ms=random.randrange(50, 5_000))
        yield provider, Verified(ask, random.randbytes(65), Hash(random.randbytes(32))), speeds


def _book(case: Case, number: int) -> tuple[AskBook, list[Address]]:
    book, providers, unknown = AskBook(), list[Address](), UNKNOWN_PROVIDER.score
    book.standing = lambda _ask: UNAUDITED
    for provider, ask, capacity in _asks(case, number, Random(number)):
        book.replace(provider, [ask], capacity, reliability(unknown), quality_bound(unknown, UNAUDITED.integrity))
        providers.append(provider)
    return book, providers


def _match_us(case: Case, book: AskBook, providers: list[Address], rounds: int) -> tuple[float, float]:
    """Returns the 50th and 99th percentile of one shortlist, in microseconds. A node fills or empties before each of them."""
    random, reputation, times = Random(1), Reputation(), list[float]()
    demand = replace(case.demand, exclude=frozenset(providers[: case.excluded]))
    for number in range(rounds):
        book.set_capacity(random.choice(providers), _FULL if number % 2 and case.name == "all_fit" else _FREE)
        chance = random.random()
        begin = thread_time()
        shortlist(book, demand, NOW, None, reputation.score, newcomer=reputation.newcomer, chance=chance)
        times.append((thread_time() - begin) * 1e6)
    times.sort()
    return times[len(times) // 2], times[len(times) * 99 // 100]


def _update_us(book: AskBook, providers: list[Address], rounds: int) -> float:
    random = Random(2)
    chosen = [random.choice(providers) for _ in range(rounds)]
    begin = thread_time()
    for provider in chosen:
        book.set_capacity(provider, _FULL)
        book.set_capacity(provider, _FREE)
    return (thread_time() - begin) * 1e6 / (2 * rounds)


def _bytes_per_ask(number: int) -> float:
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    book, _ = _book(CASES[0], number)
    used = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    return used / book.size


def measure(sizes: tuple[int, ...], rounds: int) -> dict[str, float]:
    """Returns all figures by key."""
    figures: dict[str, float] = {}
    cases = [(number, case) for number in sizes for case in CASES if case.models <= number and case.excluded < number]
    with activity("matching", len(cases)) as shown:
        for number, case in cases:
            shown.update(f"matching among {number:,} asks: {case.name}")
            book, providers = _book(case, number)
            gc.collect()
            key = f"{number}_{case.name}"
            figures[f"match_us_p50_{key}"], figures[f"match_us_p99_{key}"] = _match_us(case, book, providers, rounds)
            if case is CASES[0]:
                figures[f"update_us_{number}"] = _update_us(book, providers, rounds)
            shown.advance()
    figures["bytes_per_ask"] = _bytes_per_ask(min(sizes[-1], 20_000))
    return {name: round(value, 1) for name, value in figures.items()}


def main() -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(prog="scripts/bench match", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, metavar="N", help="numbers of asks")
    parser.add_argument("--rounds", type=int, default=2_000, metavar="N", help="shortlists per case")
    options = parser.parse_args()
    figures = measure(tuple(options.sizes), options.rounds)
    if options.json:
        print(json.dumps(figures, indent=2))
        return 0
    for name, value in figures.items():
        goal = next(goal for prefix, goal in GOALS.items() if name.startswith(prefix))
        print(f"{name:<46}{value:>10,.1f}  goal {goal:,.0f}, {'met' if value <= goal else 'missed'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
