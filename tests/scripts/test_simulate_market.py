"""The simulation of the market: its invariants, its figures, and what a policy does to them where the effect is robust."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from coordinator.domain import ask_group, job_queue, ranking, scoring
from coordinator.domain.limits import JobLimits
from scripts.simulation.clock import VirtualClock, sleep
from scripts.simulation.parties import demand_shares, models_of, payers_of, supply_shares
from scripts.simulation.plots import write_plots
from scripts.simulation.policies import BY_NAME
from scripts.simulation.records import gini, jain, percentile
from scripts.simulation.scenario import Scenario, capped_shares
from scripts.simulation.simulation import Simulation
from scripts.simulation.tables import write_tables
from scripts.simulation.variants import SWEEPS, Variant, check_constants, overridden, run_variant, sweep_variants
from tallystick.client.selection import affinity

SMALL = Scenario(nodes=60, models=3, payers=20, load=0.5)


@cache
def finished(policy: str = "as_shipped", seed: int = 1) -> Simulation:
    """Returns a small run, which tests share."""
    simulation = Simulation(replace(SMALL, seed=seed), BY_NAME[policy])
    simulation.run()
    return simulation


@pytest.mark.parametrize("policy", BY_NAME)
def test_no_money_appears_or_vanishes(policy: str) -> None:
    """What payers spend is what providers earn and what the records of the answers add up to."""
    simulation = finished(policy)
    spent, earned = sum(payer.spent for payer in simulation.payers), sum(node.income for node in simulation.nodes)
    assert spent == earned == simulation.records.paid > 0


@pytest.mark.parametrize("policy", BY_NAME)
def test_every_job_ends_once_and_nothing_stays_taken(policy: str) -> None:
    """Each request ends once or is open when the day is over, and then no slot, place in the queue or exposure is left.

    That no slot is used twice, the run itself checks.
    """
    simulation = finished(policy)
    records = simulation.records
    assert records.began_jobs == records.ended_jobs + records.unfinished
    assert records.ended_jobs == records.answered + sum(records.errors.values()) > 500
    for replica in simulation.replicas:
        queue = replica.matchmaker.queue
        assert (len(queue), len(queue.granted_jobs), replica.matchmaker.exposure.in_flight) == (0, 0, 0)
    assert all(node.session is None or node.session.running == 0 for node in simulation.nodes)
    assert all(payer.live == 0 for payer in simulation.payers)


def test_replicas_share_the_nodes() -> None:
    """Several replicas never use a slot twice, leave nothing taken, and lose little of what one coordinator serves.

    A job that meets a slot which another replica's job has just taken goes on to another one.
    """
    one, three = finished(), Simulation(replace(SMALL, replicas=3), BY_NAME["as_shipped"])
    three.run()
    used = {id(three.replica_of(payer)) for payer in three.payers}
    assert used == {id(replica) for replica in three.replicas}
    spent, earned = sum(payer.spent for payer in three.payers), sum(node.income for node in three.nodes)
    assert spent == earned == three.records.paid > 0
    for replica in three.replicas:
        queue = replica.matchmaker.queue
        assert (len(queue), len(queue.granted_jobs), replica.matchmaker.exposure.in_flight) == (0, 0, 0)
    assert all(node.session is None or node.session.running == 0 for node in three.nodes)
    figures, alone = (simulation.records.report()["figures"] for simulation in (three, one))
    assert alone["refused_share"] == 0 < figures["refused_share"] < 0.2
    assert figures["answered_share"] > alone["answered_share"] - 0.02


def test_a_seed_decides_everything() -> None:
    """The same seed gives the same report, another seed another one."""
    first, again = finished().records.report(), run_variant(SMALL, Variant("as_shipped"))
    again.pop("cpu_seconds")
    assert first == again
    assert finished(seed=2).records.report() != first


def test_a_run_depends_on_no_order_of_hashes() -> None:
    """Two processes whose strings hash differently print the same report."""
    command = [sys.executable, "-m", "scripts.simulate_market", "--nodes", "40", "--models", "4", "--payers", "10", "--json", "-"]
    command += ["--speedup", "720", "--policy", "as_shipped", "--processes", "1"]
    reports = []
    for seed in ("1", "2"):
        printed = subprocess.run(command, check=True, capture_output=True, timeout=600, env={"PYTHONHASHSEED": seed}).stdout
        report = json.loads(printed)
        report["runs"]["as_shipped"].pop("cpu_seconds")
        reports.append(report)
    assert reports[0] == reports[1]


def test_all_policies_see_the_same_demand() -> None:
    """The first requests of every payer do not depend on the policy, so the figures of policies can be compared."""
    begun = {policy: finished(policy).records.began_jobs for policy in ("as_shipped", "cheapest", "least_loaded")}
    assert max(begun.values()) < 1.2 * min(begun.values())


@pytest.mark.parametrize("seed", [1, 5])
def test_the_fair_queue_spares_others_a_flood(seed: int) -> None:
    """While one payer floods a model, the others wait a fifth of what they wait in a queue in order of arrival, in the median.

    With these seeds, the flood is long enough that half of the others meet it.
    """
    fair, arrival = (finished(policy, seed).records.report()["figures"] for policy in ("as_shipped", "arrival_order"))
    assert fair["flood_others_wait_s_p50"] < 0.2 * arrival["flood_others_wait_s_p50"]
    assert fair["flood_others_wait_s_p95"] < 0.5 * arrival["flood_others_wait_s_p95"]


@pytest.mark.parametrize("models", [10, 100, 1_000])
def test_popular_models_are_as_scarce_in_a_market_of_any_size(models: int) -> None:
    """The demand of all payers follows the stated distribution, and the most popular model lacks as many slots at each size.

    Each payer uses some of the models. If it used the popular ones of these more for that, they would be demanded twice as much.
    """
    scenario = Scenario(nodes=10 * models, models=models, payers=4 * models)
    demanded, shares = dict.fromkeys(range(models), 0.0), demand_shares(models)
    for payer in payers_of(scenario, models_of(scenario)):
        for model, weight in zip(payer.models, payer.weights, strict=True):
            demanded[model.rank] += weight / sum(payer.weights)
    head = range(max(1, models // 20))
    part = sum(demanded[rank] for rank in head) / scenario.payers
    assert part == pytest.approx(sum(shares[rank] for rank in head), rel=0.2)
    assert 1.05 < shares[0] / supply_shares(models)[0] < 1.12


@pytest.mark.parametrize("policy", BY_NAME)
def test_no_request_waits_while_a_slot_is_free(policy: str) -> None:
    """A request begins to wait only if no slot is free that meets its demand, or all of them have just been granted to others."""
    figures = finished(policy).records.report()["figures"]
    assert figures["waited_share"] > 0.01
    assert figures["waited_beside_free_share"] == 0


@pytest.mark.parametrize("seed", [1, 4])
def test_nobody_waits_long_for_the_sake_of_price_or_cache(seed: int) -> None:
    """Without a flood, one request in a hundred waits as long as under a policy that takes the cheapest free provider; twice at
    most. (In a flood that policy lets others wait less by an accident: its flooder waits for three providers alone.)
    """
    calm = replace(SMALL, seed=seed, load=0.75, flood=False)
    waits = {}
    for policy in ("as_shipped", "cheapest"):
        simulation = Simulation(calm, BY_NAME[policy])
        simulation.run()
        waits[policy] = simulation.records.report()["figures"]["wait_s_p99"]
    assert 0 < waits["as_shipped"] <= 2 * waits["cheapest"]


@pytest.mark.parametrize("most", [0.2, 0.5, 1.0, 0.001])
def test_no_payer_has_more_than_its_share(most: float) -> None:
    """Shares add up to one, none exceeds the bound if that is possible, and smaller payers keep their proportions."""
    shares = capped_shares([8.0, 4.0, 2.0, 1.0, 1.0], most)
    assert sum(shares) == pytest.approx(1)
    assert max(shares) <= max(most, 0.2) + 1e-6
    assert shares[3] == shares[4] <= shares[2]


@pytest.mark.parametrize("seed", [1, 4])
def test_what_a_policy_is_good_at(seed: int) -> None:
    """Cheapest only pays the least; least loaded shares the income best; affinity saves work."""
    figures = {
        policy: finished(policy, seed).records.report()["figures"]
        for policy in ("as_shipped", "cheapest", "least_loaded", "no_affinity")
    }
    over = {policy: values["price_over_best_free"] for policy, values in figures.items()}
    assert over["cheapest"] <= over["as_shipped"] < over["least_loaded"]
    assert figures["cheapest"]["income_gini"] > 1.2 * figures["least_loaded"]["income_gini"]
    assert figures["as_shipped"]["cache_hit_share"] > figures["no_affinity"]["cache_hit_share"]


def test_the_report_has_every_figure_in_its_range(tmp_path: Path) -> None:
    """The command writes a report with every figure, prints no progress where nobody watches, and draws the plots."""
    report = tmp_path / "report.json"
    command = [sys.executable, "-m", "scripts.simulate_market", "--nodes", "40", "--models", "4", "--payers", "10"]
    command += ["--speedup", "720", "--processes", "1", "--json", str(report), "--plots", str(tmp_path / "plots")]
    result = subprocess.run(command, check=True, capture_output=True, timeout=600, text=True)
    assert result.stderr == ""
    runs = json.loads(report.read_text())["runs"]
    assert list(runs) == ["as_shipped", "cheapest", "least_loaded"]
    for run in runs.values():
        shares = [value for name, value in run["figures"].items() if name.endswith(("share", "utilisation")) or "jain" in name]
        assert all(0 <= share <= 1 for share in shares)
        assert len(run["utilisation_by_slice"]) == len(run["wait_p95_by_slice"]) == 24
        assert run["figures"]["jobs"] > 0
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == [
        "policies-providers.svg",
        "policies-waits.svg",
        "policies.md",
    ]


def test_a_report_gives_the_same_plots(tmp_path: Path) -> None:
    """Plots have no date and no random names, so they change only if the report does."""
    runs = {name: finished(name).records.report() for name in ("as_shipped", "cheapest")}
    first, second = (write_plots({"runs": runs}, tmp_path / name) for name in ("a", "b"))
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_sweeps_draw_their_plots_and_tables(tmp_path: Path) -> None:
    """Each sweep has a table, with a row for each value that was tried."""
    figures = finished().records.report()["figures"]
    runs = {variant.name: {"figures": figures} for variant in sweep_variants()}
    report = {"runs": runs, "sweep": True}
    assert all(path.stat().st_size > 1_000 for path in write_plots(report, tmp_path))
    tables = {path.stem.removeprefix("sweep-").replace("-", "_"): path.read_text() for path in write_tables(report, tmp_path)}
    assert {name: table.count("\n") - 2 for name, table in tables.items()} == {
        name: len(values) for name, values in SWEEPS.items()
    }


def test_a_sweep_changes_the_constants_that_the_coordinator_uses() -> None:
    """A variant's constants hold for its run alone, in every module that has them."""

    def constants() -> list[float]:
        names = ((ask_group, "NEAR_TIE"), (ranking, "NEAR_TIE"), (ranking, "EXPLORED"), (ranking, "KEPT"), (affinity, "KEPT"))
        return [vars(module)[name] for module, name in names]

    former = constants()
    with overridden({"near_tie": 20.0, "explored": 0.2, "kept": 4.0}):
        assert constants() == [20, 20, 0.2, 4, 4]
    assert constants() == former


def test_each_sweep_tries_the_default() -> None:
    """A sweep compares other values with the one that is shipped, and names constants that exist."""
    check_constants(dict.fromkeys(SWEEPS, 1.0))
    scenario = Scenario()
    shipped = {
        "near_tie": ask_group.NEAR_TIE,
        "explored": ranking.EXPLORED,
        "kept": ranking.KEPT,
        "load_part": scoring.LOAD_PART,
        "failed_jobs": scoring.FAILED_JOBS,
        "min_weight": job_queue.MIN_WEIGHT,
        "grant_seconds": job_queue.GRANT_SECONDS,
        "wait": JobLimits().wait,
        "shortlist_size": scenario.shortlist_size,
        "shortlist_seconds": scenario.shortlist_seconds,
    }
    assert all(value in SWEEPS[name] for name, value in shipped.items())


def test_an_unknown_constant_is_named() -> None:
    """A misspelt constant is refused with those that exist."""
    with pytest.raises(ValueError, match="--set nears: expected one of explored"):
        check_constants({"nears": 1.0})


@pytest.mark.parametrize(
    ("measure", "values", "expected"),
    [
        (jain, [1.0, 1.0, 1.0], 1.0),
        (jain, [1.0, 0.0, 0.0, 0.0], 0.25),
        (jain, [], 1.0),
        (gini, [2.0, 2.0, 2.0], 0.0),
        (gini, [0.0, 0.0, 0.0, 1.0], 0.75),
        (gini, [], 0.0),
        (lambda values: percentile(values, 50), [3.0, 1.0, 2.0], 2.0),
        (lambda values: percentile(values, 100), [3.0, 1.0, 2.0], 3.0),
        (lambda values: percentile(values, 95), [], 0.0),
    ],
)
def test_measures(measure: Callable[[list[float]], float], values: list[float], expected: float) -> None:
    """Fairness, inequality and percentiles of lists whose values are known."""
    assert measure(values) == pytest.approx(expected)


def test_the_clock_runs_events_in_order_and_ends_waits_once() -> None:
    """Time moves from event to event; a signal ends a wait early, and its seconds do not end the next one."""
    clock, seen = VirtualClock(), list[tuple[str, float]]()
    signal = clock.signal()

    async def wait_for_signal() -> None:
        seen.append((f"set={await signal.wait_for(10)}", clock.now))
        await sleep(20)
        seen.append(("slept", clock.now))

    async def wait_in_vain() -> None:
        seen.append((f"set={await clock.signal().wait_for(3)}", clock.now))
        await clock.signal().wait()
        seen.append(("never", clock.now))

    clock.start(wait_for_signal())
    clock.start(wait_in_vain())
    clock.call_at(5, signal.set)
    clock.run(100)
    assert seen == [("set=False", 3), ("set=True", 5), ("slept", 25)]
    assert clock.now == 100
    clock.close()
