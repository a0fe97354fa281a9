from __future__ import annotations

from tests.scripts.measurement import run_measurement

ROOMS = ("coordinator", "node", "gateway")
BY_ROOM = (
    "written_bytes_per_job",
    "disk_bytes_per_job",
    "write_calls_per_job",
    "rss_mib",
    "rss_mib_start",
    "path_stream_cpu_us_per_chunk_flat_out",
)
OF_PEERS = {
    *(
        "litellm_cpu_us_per_request",
        "cpu_ratio",
        "path_cpu_ratio",
        "path_rate_ratio",
        "ttft_ratio",
        "added_ms_whole",
        "evidence_ms_whole",
    ),
    *("sglang_cpu_us_per_request", "sglang_cpu_ratio"),
}
PROMISED = {
    *("coordinator_cpu_us_per_job", "path_cpu_us_per_job", "added_ttft_ms_p50", "added_ttft_ms_p99", "chunks_per_s"),
    *("rss_mib",),
    *(f"{name}_{room}" for name in BY_ROOM for room in ROOMS),
    *OF_PEERS,
}


def test_quick_run_has_every_figure() -> None:
    """The benchmark runs completely on real processes; a figure that it does not measure is null."""
    figures = run_measurement("bench_relay", "--quick", "--json")
    assert figures.keys() >= PROMISED
    assert {name for name in PROMISED if figures[name] is None} == OF_PEERS
    assert figures["coordinator_cpu_us_per_job"] > 0
