"""`tally demo`, as a new user runs it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
from eth_account import Account
from eth_account.messages import encode_typed_data
from web3 import Web3

from tests.e2e.conftest import DEMO, clean_environment, read_trace

KEYS = {
    *("model", "text", "usage", "cost", "order", "orderSignature", "receipt", "receiptSignature", "payer", "provider"),
    *("chainId", "contract", "purseBefore", "purseAfter", "providerCreditBefore", "providerCreditAfter", "settleTx"),
}


def test_trace_is_complete(market: dict[str, Any]) -> None:
    """The demo's JSON has every promised key, and an answer of an engine that says that it is a stand-in."""
    assert market.keys() >= KEYS
    assert "stand-in" in market["model"]
    assert "stand-in" in market["text"]


@pytest.mark.parametrize(("document", "signer"), [("order", "payer"), ("receipt", "provider")])
def test_any_wallet_library_can_check_the_signatures(market: dict[str, Any], document: str, signer: str) -> None:
    """Order and receipt are typed-data documents whose signatures eth_account recovers to payer and provider."""
    signable = encode_typed_data(full_message=market[document])
    recovered = Account.recover_message(signable, signature=market[f"{document}Signature"])
    assert recovered.lower() == market[signer]
    assert market[document]["domain"]["chainId"] == market["chainId"]
    assert market[document]["domain"]["verifyingContract"] == market["contract"]


def test_moved_money_equals_the_signed_cost(market: dict[str, Any]) -> None:
    """What left the purse, what the provider was credited, and what the receipt states are equal: prices times tokens."""
    cost = int(market["cost"])
    assert cost > 0
    assert int(market["purseBefore"]) - int(market["purseAfter"]) == cost
    assert int(market["providerCreditAfter"]) - int(market["providerCreditBefore"]) == cost
    assert int(market["receipt"]["message"]["cumulativeCost"]) <= int(market["order"]["message"]["ceiling"])


def test_settlement_is_on_chain(market: dict[str, Any]) -> None:
    """The settlement's transaction succeeded, at the contract that both signatures name."""
    web3 = Web3(Web3.HTTPProvider(market["rpc"]))
    receipt = web3.eth.get_transaction_receipt(market["settleTx"])
    assert receipt["status"] == 1
    assert receipt["to"].lower() == market["contract"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_everything(number: signal.Signals) -> None:
    """SIGINT or SIGTERM ends the demo with exit code 0 and leaves no process."""
    process = subprocess.Popen(DEMO, stdout=subprocess.PIPE, text=True, env=clean_environment())
    read_trace(process)
    children = _children(process.pid)
    assert len(children) >= 5
    process.send_signal(number)
    assert process.wait(300) == 0
    assert not [pid for pid in children if Path(f"/proc/{pid}").exists()]


def test_once_exits_by_itself() -> None:
    """`--once --json` exits by itself and prints exactly one JSON object on stdout."""
    done = subprocess.run([*DEMO, "--once"], stdout=subprocess.PIPE, text=True, env=clean_environment(), timeout=600, check=True)
    assert json.loads(done.stdout).keys() >= KEYS


def _children(parent: int) -> list[int]:
    text = Path(f"/proc/{parent}/task/{parent}/children")
    if text.exists():
        return [int(pid) for pid in text.read_text().split()]
    listed = subprocess.run(["pgrep", "-P", str(parent)], capture_output=True, text=True, env=os.environ, check=False)
    return [int(pid) for pid in listed.stdout.split()]
