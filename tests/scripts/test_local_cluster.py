"""The Prometheus configuration of a local cluster, and the folders that it takes."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from scripts.local_cluster import NODES, Service, main, write_scrapes


async def _ready() -> bool:
    return True


def _service(folder: Path, name: str, port: int) -> Service:
    return Service(name, (), folder, f"http://127.0.0.1:{port}", _ready)


@pytest.mark.parametrize(
    ("workers", "own"), [(1, ["127.0.0.1:8000", "127.0.0.1:9000"]), (2, ["127.0.0.1:8001", "127.0.0.1:8002"])]
)
def test_prometheus_scrapes_each_process(tmp_path: Path, workers: int, own: Sequence[str]) -> None:
    """With --workers the shared port answers for any process, so each one's own port is scraped."""
    replicas = [_service(tmp_path, "replica-1", 8000), _service(tmp_path, "replica-2", 9000)][: 2 if workers == 1 else 1]
    parts = {name: _service(tmp_path, name, port) for name, port in zip((*NODES, "gateway"), (1001, 1002, 1003), strict=True)}
    write_scrapes(tmp_path / "prometheus.yml", parts, replicas, workers)
    config = json.loads((tmp_path / "prometheus.yml").read_text())
    targets = {scrape["job_name"]: scrape["static_configs"][0]["targets"] for scrape in config["scrape_configs"]}
    assert targets == {
        "tallystick-coordinator": own,
        "tallystick-node": ["127.0.0.1:1001", "127.0.0.1:1002"],
        "tallystick-gateway": ["127.0.0.1:1003"],
    }
    assert [Path(rules).is_file() for rules in config["rule_files"]] == [True]


def test_a_folder_in_use_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """What lies there may be another cluster's money and keys."""
    (tmp_path / "keys").mkdir()
    monkeypatch.setattr(sys, "argv", ["cluster", "--folder", str(tmp_path)])
    assert main() == 1
    assert f"{tmp_path} is not empty" in capsys.readouterr().err
