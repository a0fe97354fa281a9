"""`tally balance` and `tally deposit` at JSON-RPC providers as they are: the money is shown and moved, and no key is printed."""

from __future__ import annotations

from typing import Any

import pytest

from tests.chain.odd_provider import (
    KEY,
    each_with,
    error,
    every_other,
    more_than,
    odd,
    page,
    whole,
    wide_logs,
    without_pending,
)
from tests.cli.conftest import Tally

MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "429 html": {"refuse": every_other(page(429, retry_after="1"))},
    "429 json": {"refuse": every_other(each_with(-32005, "daily request count exceeded", status=429))},
    "200 -32016": {"refuse": every_other(each_with(-32016, "over rate limit"))},
    "200 -32029": {"refuse": every_other(each_with(-32029, "Too many requests, please slow down"))},
    "200 -32000": {"refuse": every_other(each_with(-32000, "429 Too Many Requests: {}"))},
    "200 -32005": {"refuse": every_other(each_with(-32005, "limit exceeded"))},
    "batch1": {"refuse": more_than(1, whole(31, "Batch of more than 1 requests are not allowed", 400))},
    "batch3": {"refuse": more_than(3, whole(31, "Batch of more than 3 requests are not allowed", 500))},
    "logs500": {"refuse_member": wide_logs(500, "You can make eth_getLogs requests with up to a 500 block range")},
    "logs10": {"refuse_member": wide_logs(10, "You can make eth_getLogs requests with up to a 10 block range")},
    "nopending": {"refuse_member": without_pending(-32601, "pending block is not available")},
    "strid": {"alter": lambda answer: answer | {"id": str(answer["id"])} if isinstance(answer, dict) else answer},
    "gzip": {"compress": True},
}


@pytest.fixture
def market(tally: Tally, chain_url: str) -> Tally:
    """A market with a funded payer `default` and a purse of ten dollars, three of them reserved for the provider `node`."""
    for name in ("default", "node"):
        tally.wallet(name)
    tally("deploy", "--rpc", chain_url, "--dev-account", "0", "--short-waits", "--fund", "default")
    tally("deposit", "10")
    tally("reserve", "node", "3")
    return tally


@pytest.mark.parametrize("behaviour", MODES.values(), ids=MODES)
def test_the_balance_at_any_provider(market: Tally, chain_url: str, behaviour: dict[str, Any]) -> None:
    """Through each kind of provider the whole balance with all tabs is the one that the chain shows, and a deposit arrives."""
    expected = market("balance", "--all-tabs")
    with odd(chain_url, **behaviour) as (_, url):
        assert market("balance", "--all", "--rpc", url) == expected
        market("deposit", "1", "--rpc", url)
    amounts = {place["place"]: place["amount"] for place in market("balance")["places"]}
    assert amounts["purse, free"] == "8000000"


@pytest.mark.parametrize(
    "behaviour",
    [
        {"refuse": lambda _, requests: page(200)(requests)},
        {"refuse": lambda _, requests: page(401, f"bad key {KEY}")(requests)},
        {"refuse_member": lambda *_: error(-32000, f"project {KEY} is disabled")},
        {"alter": lambda answer: answer | {"result": "0x1"} if isinstance(answer, dict) else answer},
    ],
    ids=["login page", "401", "error", "another chain"],
)
def test_no_command_prints_the_key(market: Tally, chain_url: str, behaviour: dict[str, Any]) -> None:
    """Errors of an endpoint name its host and not the key in its URL."""
    with odd(chain_url, **behaviour) as (_, url):
        for command in ("balance", "deploy"):
            arguments = ("--dev-account", "0", "--out", str(market.home / "other.json")) if command == "deploy" else ()
            printed = market.says(command, "--rpc", url, *arguments, code=1)
            assert KEY not in printed
            assert "Traceback" not in printed


def test_a_deployment_file_with_a_key_is_announced(market: Tally, chain_url: str) -> None:
    """`tally deploy` prints no key, and says that the file that it wrote contains one."""
    with odd(chain_url) as (_, url):
        path = market.home / "other.json"
        printed = market.says("deploy", "--rpc", url, "--dev-account", "0", "--short-waits", "--out", str(path))
    assert KEY not in printed
    assert "remove the key" in printed
    assert KEY in path.read_text()
