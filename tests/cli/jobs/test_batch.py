"""`tally batch` against a gateway that runs batches over a fake market."""

from __future__ import annotations

import asyncio
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tallystick.client.config import ClientConfig
from tests.cli.conftest import Tally
from tests.client.fake_coordinator import FakeMarket
from tests.client.gateway.test_batch_routes import gateway, jsonl, request_line
from tests.client.parties import signer


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    """A gateway in a thread of its own, since commands run their own event loop."""
    ready, stop = threading.Event(), asyncio.Event()
    urls: list[str] = []
    loop = asyncio.new_event_loop()

    async def run() -> None:
        config = ClientConfig(ledger_file=tmp_path / "client.db", cancel_seconds=60, request_seconds=60)
        async with FakeMarket().serve() as fake, gateway(fake, signer("payer"), config) as url:
            urls.append(url)
            ready.set()
            await stop.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(run(),))
    thread.start()
    try:
        assert ready.wait(120)
        yield urls[0]
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
        loop.close()


def test_a_batch_from_file_to_answers(tally: Tally, url: str, tmp_path: Path) -> None:
    """Create with --wait, show, list, wait and download, as text and as JSON."""
    file, answers = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    file.write_bytes(jsonl(*map(request_line, range(3))))
    batch = tally("batch", "create", str(file), "--window", "1h", "--wait", "--gateway", url)
    assert (batch["status"], batch["request_counts"]["completed"], batch["completion_window"]) == ("completed", 3, "1h")
    shown = tally.says("batch", "show", batch["id"], "--gateway", f"{url}/v1")
    assert "3: 3 answered, 0 failed" in shown
    assert batch["output_file_id"] in shown
    assert [listed["id"] for listed in tally("batch", "list", "--gateway", url)] == [batch["id"]]
    assert batch["id"] in tally.says("batch", "list", "--gateway", url)
    assert tally("batch", "wait", batch["id"], "--gateway", url) == batch
    tally.says("batch", "download", batch["id"], "--out", str(answers), "--gateway", url)
    assert [json.loads(line)["custom_id"] for line in answers.read_text().splitlines()] == ["id-0", "id-1", "id-2"]
    assert "has no errors" in tally.says("batch", "download", batch["id"], "--errors", "--gateway", url, code=1)
    assert "Cannot cancel" in tally.says("batch", "cancel", batch["id"], "--gateway", url, code=1)


def test_answers_replace_neither_links_nor_devices(tally: Tally, url: str, tmp_path: Path) -> None:
    """A link's target gets the answers; so does a pipe, as /dev/stdout may be."""
    file, target, link, pipe = (tmp_path / name for name in ("in.jsonl", "target", "link", "pipe"))
    file.write_bytes(jsonl(request_line(1)))
    batch = tally("batch", "create", str(file), "--wait", "--gateway", url)
    link.symlink_to(target)
    tally.says("batch", "download", batch["id"], "--out", str(link), "--gateway", url)
    assert link.is_symlink()
    assert json.loads(target.read_text())["custom_id"] == "id-1"
    os.mkfifo(pipe)
    with os.fdopen(os.open(pipe, os.O_RDWR | os.O_NONBLOCK), "rb") as reader:
        tally.says("batch", "download", batch["id"], "--out", str(pipe), "--gateway", url)
        assert pipe.is_fifo()
        assert reader.read1() == target.read_bytes()


def test_whoever_stops_waiting_knows_the_batch(tally: Tally, url: str, tmp_path: Path) -> None:
    """Its id and the command that stops it are shown before the wait."""
    file = tmp_path / "in.jsonl"
    file.write_bytes(jsonl(request_line(1)))
    said = tally.says("batch", "create", str(file), "--wait", "--gateway", url)
    [batch] = tally("batch", "list", "--gateway", url)
    assert f"tally batch cancel {batch['id']}" in " ".join(said.split())


def test_a_refused_batch_leaves_no_file(tally: Tally, url: str, tmp_path: Path) -> None:
    """What was uploaded for it is deleted again."""
    file = tmp_path / "in.jsonl"
    file.write_bytes(jsonl(request_line(1)))
    assert "completion_window" in tally.says("batch", "create", str(file), "--window", "1y", "--gateway", url, code=1)
    assert httpx.get(f"{url}/v1/files").json()["data"] == []


def test_a_wrong_input_is_explained(tally: Tally, url: str, tmp_path: Path) -> None:
    """The faults are shown with their lines, and the exit status is 1."""
    file = tmp_path / "in.jsonl"
    file.write_text("nonsense\n")
    said = tally.says("batch", "create", str(file), "--wait", "--gateway", url, code=1)
    assert "invalid_json_line" in said
    assert "Faults of the input (1)" in said


def test_the_endpoint_is_that_of_the_first_line(tally: Tally, url: str, tmp_path: Path) -> None:
    """It need not be given; options are passed on and checked at once."""
    file = tmp_path / "in.jsonl"
    file.write_bytes(jsonl(request_line(1, url="/v1/embeddings", body={"model": "stand-in/small", "input": "x"})))
    batch = tally("batch", "create", str(file), "--gateway", url)
    assert batch["endpoint"] == "/v1/embeddings"
    refused = tally.says("batch", "create", str(file), "--options", '{"max_cost": 1}', "--gateway", url, code=1)
    assert "max_cost" in refused


def test_errors(tally: Tally, url: str, tmp_path: Path) -> None:
    """A missing file, a wrong id, an unknown batch and a gateway that does not run are named."""
    assert "FILE: expected a file" in tally.says("batch", "create", str(tmp_path / "none"), "--gateway", url, code=1)
    assert "ID: expected a batch id" in tally.says("batch", "show", "../files", "--gateway", url, code=1)
    assert tally("batch", "show", "batch_0", "--gateway", url, fails=True)["code"] == "batch_not_found"
    silent = tally("batch", "list", "--gateway", "http://127.0.0.1:1", fails=True)
    assert (silent["code"], silent["fault"]) == ("not_running", "client")
    assert "tally gateway" in silent["message"]
    assert "--gateway: expected" in tally.says("batch", "list", "--gateway", "localhost", code=1)
