from __future__ import annotations

import json
import subprocess
import sys

PROMISED = (
    *("coordinator_cpu_us_per_job", "litellm_cpu_us_per_request", "cpu_ratio", "added_ttft_ms_p50", "added_ttft_ms_p99"),
    *("chunks_per_s", "rss_mib"),
)


def test_quick_run_has_every_figure() -> None:
    """The benchmark runs completely on real processes; a figure that it does not measure is null."""
    command = [sys.executable, "-m", "scripts.bench_relay", "--quick", "--json"]
    figures = json.loads(subprocess.run(command, check=True, capture_output=True, timeout=1_000).stdout)
    assert figures.keys() >= set(PROMISED)
    assert {name for name in PROMISED if figures[name] is None} == {"litellm_cpu_us_per_request", "cpu_ratio"}
    assert figures["coordinator_cpu_us_per_job"] > 0
