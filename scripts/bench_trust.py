"""Measures how soon cheating providers are found, in a market of real nodes and real engines (llama.cpp, SmolLM2-135M-Instruct).

Two honest providers serve the model in 16 bits. Others sell the same and serve a coarser quantization (q8_0, q4_0), a smaller
model (other_model), a hidden system prompt, a temperature that is lower by 0.3, the text of the smaller model with the numbers of
the right one (prefill), one answer for all requests (replay), half an answer (cut), counts that are 5 % too high (padded). Two
more mix honest answers with those of q4_0: on one job in five, and on all but the first ten. Audits are drawn from the answers,
with the client's tests and verdicts. The client has an engine of its own, and shows suspect answers to two more referees.

Keys of each of the `cheaters`: `jobs_to_confirm_p50`, `jobs_to_confirm_p95`, `tokens_to_confirm_p50`: audited jobs, and tokens of
their answers, until it is confirmed; null if that takes more than 400. `found_share`: runs in which it is confirmed within these.
`served_share`: the share of 1,000 jobs of a client that it is paid for until the median client blocks it. Other keys:
`honest_suspect_per_1000`, `honest_confirmed_per_1000`: audits of honest providers. `audit_cost_share`: audits of an honest
provider at a steady state, as a share of what its jobs cost.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import uvloop

from scripts.relay import llama_cpp
from scripts.trust.figures import figures
from scripts.trust.live import FULL, SMALL, Plan, by_provider, make_variants, observe
from scripts.trust.observations import read_observations, write_observations
from tallystick.cli.progress import activity
from tallystick.runtime.logs import configure_quiet


def main() -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(prog="scripts/bench trust", description=__doc__)
    parser.add_argument("--small", action="store_true", help="five providers with few jobs")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--jobs", type=int, metavar="N", help="jobs of each provider")
    parser.add_argument("--runs", type=int, default=200, metavar="N", help="clients of each cheater, drawn from its jobs")
    parser.add_argument("--audits", type=int, default=10_000, metavar="N", help="audits of honest providers, drawn from theirs")
    parser.add_argument("--save", type=Path, metavar="FILE", help="keep what was observed")
    parser.add_argument("--load", type=Path, metavar="FILE", help="use what was observed before, without a market")
    options = parser.parse_args()
    configure_quiet()
    if options.load:
        observed = by_provider(read_observations(options.load))
    else:
        engine = llama_cpp.install_engine()
        models = None if engine is None else make_variants(engine)
        if engine is None or models is None:
            return 1
        plan = SMALL if options.small else FULL
        plan = Plan(plan.providers, options.jobs or plan.jobs)
        with tempfile.TemporaryDirectory(prefix="tallystick-bench-") as folder:
            observed = uvloop.run(observe(engine, models, Path(folder), plan))
    if options.save:
        write_observations(options.save, (observation for jobs in observed.values() for observation in jobs))
    runs, audits = (20, 200) if options.small else (options.runs, options.audits)
    with activity("drawing clients from what was observed"), ProcessPoolExecutor() as pool:
        result = figures(observed, runs=runs, audits=audits, pool=pool)
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        _print_table(result)
    return 0


def _print_table(result: dict[str, Any]) -> None:
    print(f"{'cheater':<18}{'jobs p50':>9}{'jobs p95':>9}{'tokens p50':>11}{'found':>7}{'served':>8}")
    for name, found in result["cheaters"].items():
        jobs, late, tokens = (found[key] for key in ("jobs_to_confirm_p50", "jobs_to_confirm_p95", "tokens_to_confirm_p50"))
        print(
            f"{name:<18}{_number(jobs):>9}{_number(late):>9}{_number(tokens):>11}{found['found_share']:>7.0%}"
            f"{found['served_share']:>8.1%}"
        )
    for name in ("honest_suspect_per_1000", "honest_confirmed_per_1000", "audit_cost_share"):
        print(f"{name:<30}{result[name]:>9.4f}")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"


if __name__ == "__main__":
    sys.exit(main())
