"""`tally models`: what the coordinator lists, with what the wallet's own audits say."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from tallystick.cli.jobs.models import models
from tallystick.client.coordinator.model_offers import ModelOffer
from tallystick.protocol.features import EVIDENCE
from tests.cli.jobs.test_audits import Files, withhold
from tests.client.parties import ALICE, PAYER


@contextmanager
def listing(*offers: ModelOffer) -> Iterator[str]:
    """The URL of a coordinator that lists these models."""
    body = json.dumps({"data": [offer.to_json() for offer in offers]}).encode()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


OFFERS = (
    ModelOffer("m", 2, 1, 100, 10, 200, 4_096, 1_024, features=("chat", EVIDENCE), integrity=42.5, audits=7),
    ModelOffer("other", 1, 1, 100, 10, 200, 4_096, 1_024),
)


@pytest.fixture
def files(tmp_path: Path) -> Files:
    """A wallet's files with four audits of Alice that could not be checked."""
    files = Files(tmp_path)
    withhold(files, 1, 2, 3, 4)
    return files


def run(files: Files, *arguments: str) -> str:
    """What the command prints."""
    app = typer.Typer()
    app.command()(models)
    with listing(*OFFERS) as url:
        result = CliRunner().invoke(
            app, ["--config", str(files.config), "--coordinator", url, *arguments], env={"COLUMNS": "300"}
        )
    assert result.exit_code == 0, result.output
    return result.output


def test_own_audits_and_evidence_are_shown(files: Files) -> None:
    """Whether a model has evidence, its own audits, and who makes answers that cannot be checked."""
    text = run(files, "--wallet", PAYER.address)
    assert "4 unverifiable" in text
    assert f"{ALICE.address}: 4 of its latest 4 audited answers of m cannot be checked" in " ".join(text.split())
    first, second = json.loads(run(files, "--wallet", PAYER.address, "--json"))
    assert [provider["unverifiable"] for provider in first["ownAudits"]] == [4]
    assert (first["integrity"], first["audits"], second["ownAudits"]) == (42.5, 7, [])


def test_no_wallet_is_needed(files: Files, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Then the coordinator's list is all."""
    monkeypatch.setenv("TALLYSTICK_HOME", str(tmp_path / "empty"))
    text = run(files)
    assert "evidence" in text
    assert "own audits" not in text
    assert [offer["ownAudits"] for offer in json.loads(run(files, "--json"))] == [None, None]
