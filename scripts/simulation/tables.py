"""Tables of reports in Markdown, which the documentation includes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from scripts.simulation.policies import BY_NAME
from scripts.simulation.variants import CONSTANTS, SWEEPS

Report = Mapping[str, Any]
_POLICY_ROWS = {
    "answered_share": "answered, first try of the client",
    "failed_attempt_share": "attempts that failed",
    "waited_share": "requests that waited for a slot",
    "wait_s_p50": "wait, median (s)",
    "wait_s_p95": "wait, 95th percentile (s)",
    "wait_s_p99": "wait, 99th percentile (s)",
    "first_token_s_p50": "first token, median (s)",
    "first_token_s_p95": "first token, 95th percentile (s)",
    "utilisation": "share of slot time in use",
    "price_over_best_free": "price over the cheapest free provider",
    "price_over_best": "price over the cheapest connected provider",
    "paid_over_best": "paid, caches counted, over the cheapest connected provider without a cache",
    "cache_hit_share": "cache hits: tokens of earlier turns",
    "jain_payers": "Jain's index, payers",
    "jain_equal_providers": "Jain's index, equal providers",
    "income_gini": "Gini coefficient of providers' income",
    "income_p10": "income of a slot, 10th percentile",
    "income_p50": "income of a slot, median",
    "income_p90": "income of a slot, 90th percentile",
    "idle_providers_share": "providers with almost no income",
    "newcomers_judged_share": "newcomers with ten attempts by the end of the day",
    "flood_others_wait_s_p50": "flooded model: wait of the others, median (s)",
    "flood_others_wait_s_p95": "flooded model: wait of the others, 95th percentile (s)",
    "flood_flooder_wait_s_p50": "flooded model: wait of the flooder, median (s)",
}
_SWEEP_COLUMNS: dict[str, Sequence[str]] = {
    "near_tie": ("price_over_best_free", "jain_equal_providers", "income_gini", "wait_s_p95"),
    "explored": ("newcomers_judged_share", "failed_attempt_share", "price_over_best_free", "answered_share"),
    "kept": ("cache_hit_share", "paid_over_best", "price_over_best_free"),
    "load_part": ("price_over_best_free", "wait_s_p95", "income_gini"),
    "failed_jobs": ("failed_attempt_share", "price_over_best_free", "answered_share"),
    "min_weight": ("flood_others_wait_s_p50", "flood_others_wait_s_p95", "jain_payers"),
    "grant_seconds": ("wait_s_p95", "answered_share", "utilisation"),
    "wait": ("answered_share", "wait_s_p95", "wait_s_p99", "utilisation"),
    "shortlist_size": ("answered_share", "wait_s_p95", "wait_s_p99", "price_over_best_free", "failed_attempt_share"),
    "shortlist_seconds": ("waited_share", "wait_s_p95", "price_over_best_free"),
    "seed": ("price_over_best_free", "wait_s_p95", "wait_s_p99", "jain_equal_providers", "failed_attempt_share"),
}


def write_tables(report: Report, folder: Path) -> list[Path]:
    """Writes the tables that a report has data for. Returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    if "sweep" in report:
        tables = {f"sweep-{name.replace('_', '-')}": _sweep_table(report, name) for name in SWEEPS if any(swept(report, name))}
    else:
        tables = {report_name(report): _policy_table(report)}
    paths = []
    for name, lines in tables.items():
        path = folder / f"{name}.md"
        path.write_text("\n".join(lines) + "\n")
        paths.append(path)
    return paths


def report_name(report: Report) -> str:
    """Returns the name of a report of policies, by what it compares and its seed."""
    seed = report.get("scenario", {}).get("seed", 1)
    return ("queues" if "arrival_order" in report["runs"] else "policies") + ("" if seed == 1 else f"-seed-{seed}")


def _policy_table(report: Report) -> Iterator[str]:
    runs = report["runs"]
    yield f"| | {' | '.join(BY_NAME[name].title for name in runs)} |"
    yield f"|---|{'---:|' * len(runs)}"
    jobs = (f"{run['figures']['jobs']:,.0f}" for run in runs.values())
    yield f"| requests | {' | '.join(jobs)} |"
    for key, label in _POLICY_ROWS.items():
        yield f"| {label} | {' | '.join(_shown(key, run['figures'][key]) for run in runs.values())} |"


def _sweep_table(report: Report, constant: str) -> Iterator[str]:
    keys = _SWEEP_COLUMNS[constant]
    name = constant.upper() if constant in CONSTANTS else constant
    yield f"| `{name}` | {' | '.join(_POLICY_ROWS[key] for key in keys)} |"
    yield f"|---:|{'---:|' * len(keys)}"
    for value, figures in swept(report, constant):
        yield f"| {value:g} | {' | '.join(_shown(key, figures[key]) for key in keys)} |"


def swept(report: Report, constant: str) -> Iterator[tuple[float, Mapping[str, float]]]:
    """Yields the values of a constant that a report has, each with its figures."""
    for value in SWEEPS[constant]:
        run = report["runs"].get(f"as_shipped {constant}={value:g}")
        if run is not None:
            yield value, run["figures"]


def _shown(key: str, value: float) -> str:
    if key.endswith(("share", "utilisation")):
        return f"{100 * value:.1f} %"
    return f"{value:.1f}" if "_s_p" in key else f"{value:.3f}"
