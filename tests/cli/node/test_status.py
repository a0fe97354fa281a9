"""`tally node status` as text: what a person must know is in words."""

from __future__ import annotations

from typing import Any

import pytest
from rich.console import Console

from tallystick.cli.node.status import _draw
from tallystick.protocol.messages import Outcome

REPORT: dict[str, Any] = {
    "ok": True,
    "trouble": "",
    "upSeconds": 5,
    "coordinators": {"ws://127.0.0.1:8420/v1/node": "0x" + "ab" * 20},
    "chain_reachable": True,
    "running": 0,
    "free_slots": 4,
    "tokens_per_second": 0,
    "first_token_ms": 0,
    "revenue": "1500000",
    "revenueLastHour": "0",
    "unsecured": "0",
    "unearned_credit_today": "0",
    "written_off": "0",
    "coordinator_credit": {},
    "fees_bps": {},
    "max_fee_bps": 1000,
    "payout": {"minAmount": None},
    "jobs": {"completed": 3, "client_cancelled": 1, "no_receipt": 2},
    "engines": {},
    "asks": [],
    "last": [],
    "alarms": [],
    "config_problem": "",
    "settings_for_restart": [],
}


def _shown(width: int = 140, **changes: Any) -> str:
    console = Console(width=width, force_terminal=True, color_system=None)
    with console.capture() as capture:
        console.print(_draw(REPORT | changes))
    return " ".join(capture.get().replace("│", " ").split())


@pytest.mark.parametrize("width", [80, 140])
def test_a_refused_config_is_shown_with_its_reason(width: int) -> None:
    """A config that was not applied is shown with the reason, and settings that need a restart by name; else nothing is."""
    shown = _shown(width, config_problem="config: slots: expected a number")
    assert "the changed config is NOT applied, the former one is in effect: config: slots: expected a number" in shown
    assert "changed settings that need a restart: port, db" in _shown(width, settings_for_restart=["port", "db"])
    assert "config" not in _shown(width)


def test_replicas_are_shown_by_url() -> None:
    """Each replica of a coordinator is connected or disconnected; a coordinator without replicas has no such line."""
    seed, accounts = "ws://c.example/v1/node", {"ws://a.example/v1/node": "0x" + "ab" * 20, "ws://b.example/v1/node": None}
    shown = _shown(200, replicas={seed: accounts})
    assert "replicas ws://a.example/v1/node connected, ws://b.example/v1/node disconnected" in shown
    assert "replicas" not in _shown(replicas={})
    assert "replicas" not in _shown()


def test_outcomes_and_amounts_are_in_words() -> None:
    """Outcomes are words and amounts are dollars."""
    shown = _shown()
    assert "1 cancelled by the client, 3 completed, 2 ended without a receipt" in shown
    assert "1.5 dollars since the start" in shown
    job = {"job": "ab" * 16, "model": "m", "tokens": [1, 2], "firstMs": None, "seconds": 0.5, "cost": "10"}
    for outcome in Outcome:
        last = _shown(last=[job | {"outcome": outcome.name.lower()}])
        assert "_" not in last.split("Latest jobs")[1]


def test_asks_say_whether_their_answers_have_evidence() -> None:
    """By yes and no; a node of an earlier release does not say."""
    ask = {"model": "m", "engine": "e", "inputPrice": "1", "outputPrice": "2", "contextTokens": 4_096}
    for members, word in (({"evidence": True}, "yes"), ({"evidence": False}, "no"), ({}, "")):
        shown = _shown(asks=[ask | members]).split("Asks;")[1]
        assert f"4096 {word}".strip() in shown
        assert ("yes" in shown, "no " in shown) == (word == "yes", word == "no")
