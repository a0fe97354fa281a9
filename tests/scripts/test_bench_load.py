from __future__ import annotations

from tests.scripts.measurement import run_measurement

FLOODS = ("connections", "bad_signatures", "unfunded_orders", "slow_readers", "slow_senders")


def test_quick_run_has_every_figure() -> None:
    """A small crowd is connected, served and flooded; every promised figure is there, and no honest job is lost."""
    figures = run_measurement("bench_load", "--quick", "--json")
    assert (figures["nodes"], figures["asks"], figures["streams"], figures["honest_failed"]) == (20, 60, 10, 0)
    assert 0 < figures["rss_mib_start"] <= figures["rss_mib"]
    for flood in FLOODS:
        assert figures[f"honest_p99_ratio_{flood}"] > 0
        assert f"coordinator_core_share_of_{flood}" in figures
        assert figures[f"flood_{flood}"]["connected"] > 0
    assert figures["flood_bad_signatures"]["HTTP/1.1 401"] > 0
    assert figures["flood_unfunded_orders"]["HTTP/1.1 402"] > 0


def test_memory_alone() -> None:
    """Without floods, a run measures the crowd's memory and nothing else."""
    figures = run_measurement("bench_load", "--quick", "--json", "--no-floods")
    assert (figures["nodes"], figures["asks"], figures["streams"], figures["honest_failed"]) == (20, 60, 10, 0)
    assert 0 < figures["rss_mib_start"] <= figures["rss_mib_asks"] <= figures["rss_mib"]
    assert not [name for name in figures if "flood_" in name]
