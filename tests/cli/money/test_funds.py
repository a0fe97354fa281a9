"""Every move of money on chain, and `tally contract inspect` after it: the next steps that it lists are possible."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from tallystick.chain.claims import SettleRow
from tallystick.chain.deployment import Deployment
from tallystick.chain.rpc import Sender
from tallystick.client.receipts.evidence import EvidenceFile
from tallystick.protocol.types import Address, JobId
from tests.chain.harness import DOLLAR, World, person
from tests.cli.conftest import Tally, on_chain
from tests.coordinator.harness import make_ask, make_terms

KEY, NODE = person("wallet default"), person("wallet node")


@pytest.fixture
def market(tally: Tally, chain_url: str) -> Tally:
    """A market with a funded payer `default`, a funded provider `node`, and a purse of ten dollars."""
    for name in ("default", "node"):
        tally.wallet(name)
    tally("deploy", "--rpc", chain_url, "--dev-account", "0", "--short-waits", "--fund", "default", "--fund", "node")
    tally("deposit", "10")
    return tally


def _inspect(market: Tally, *arguments: str) -> tuple[str, list[str]]:
    """Returns the state of `tally contract inspect`, and the calls that it lists as possible now."""
    inspected = market("contract", "inspect", *arguments)
    assert inspected["says"]
    return inspected["state"], [step["call"] for step in inspected["next"] if step["at"] is None]


def _settle(market: Tally, amount: int) -> None:
    """The node collects an amount with an order of the payer, as its daemon does."""

    async def act(world: World) -> None:
        row: SettleRow = world.row(KEY, NODE.address, amount)
        await world.settle(Sender(world.rpc, NODE, poll=0.001), row)

    on_chain(market, act)


def _advance(market: Tally, length: str) -> None:
    rpc = Deployment.load(market.home / "deployment.json").rpc
    market("chain", "advance", length, "--rpc", rpc)


def test_deposit_after_advance(market: Tally, chain_url: str) -> None:
    """Signatures for the chain use the chain's clock, which may be far ahead of this machine's."""
    market("chain", "advance", "2d", "--rpc", chain_url)
    assert market("deposit", "1")["deposited"] == "1000000"


def test_thaw_and_withdraw(market: Tally) -> None:
    """Announced, cancelled, announced again, too early, then paid; `inspect` names each state and the next steps."""
    assert _inspect(market, "purse") == ("open", ["deposit", "reserve", "thaw"])
    thawed = market("thaw", "4")
    assert (thawed["thawing"], _inspect(market, "purse")[0]) == ("4000000", "thawing")
    assert "withdraw" not in _inspect(market, "purse")[1]
    early = market("withdraw", fails=True)
    assert "the thaw ends in" in early["message"]
    assert "tally chain advance" in early["message"]
    market("thaw", "--cancel")
    assert _inspect(market, "purse")[0] == "open"
    market("thaw", "all")
    _advance(market, "1m")
    assert _inspect(market, "purse") == ("thawed", ["withdraw", "cancelThaw", "deposit"])
    assert market("withdraw")["withdrawn"] == "10000000"
    assert _inspect(market, "purse") == ("empty", ["deposit"])
    for command in (("thaw", "--cancel"), ("withdraw",)):
        assert market(*command, fails=True)["code"] == "chain_refused"


def test_reserve_and_release(market: Tally) -> None:
    """A reservation is released by running the command twice; reserving more cancels the release."""
    assert _inspect(market, "tab", "default", "node") == ("unused", ["settle", "reserve"])
    assert market("reserve", "node", "3")["reserved"] == "3000000"
    first = market("release", "node")
    assert (first["released"], _inspect(market, "tab", "default", "node")[0]) == (False, "releasing")
    assert "the release ends in" in market("release", NODE.address, fails=True)["message"]
    assert market("reserve", "node", "0.5")["reserved"] == "3500000"
    assert _inspect(market, "tab", "default", "node") == ("reserved", ["settle", "reserve", "release", "giveBack"])
    assert "tally release node" in market.says("release", "node")
    _advance(market, "1m")
    assert _inspect(market, "tab", "default", "node")[0] == "released"
    assert "3.5 dollars are free again" in market.says("release", "node")
    assert _inspect(market, "tab", "default", "node")[0] == "unused"


def test_the_provider_gives_back(market: Tally, tmp_path: Path) -> None:
    """A provider frees a reservation at once, or signs a consent that the payer sends; a part may stay reserved."""
    market("reserve", "node", "3")
    assert "tally give-back" in str(market("balance", "--provider", "node"))
    back = market("give-back", "default", "--keep", "2", "--wallet", "node")
    assert (back["givenBack"], back["reserved"]) == ("1000000", "2000000")
    consent = tmp_path / "consent.json"
    signed = market("give-back", "default", "--wallet", "node", "--consent", str(consent), "--keep", "0.5")
    assert (signed["givenBack"], signed["consent"]) == ("1500000", str(consent))
    assert "exists" in market("give-back", "default", "--wallet", "node", "--consent", str(consent), fails=True)["message"]
    other = market.wallet("other")
    assert f"got that of {NODE.address}" in market("release", other, "--consent", str(consent), fails=True)["message"]
    released = market("release", "node", "--consent", str(consent))
    assert (released["reserved"], released["released"]) == ("500000", False)
    error = market("give-back", "default", "--wallet", "node", "--keep", "0.5", fails=True)
    assert "nothing was sent" in error["message"]
    assert "0.5 dollars are free again" in market.says("give-back", "default", "--wallet", "node")
    assert "none.json" in market("release", "node", "--consent", str(tmp_path / "none.json"), fails=True)["message"]


def test_an_owner_without_coins_deposits(market: Tally) -> None:
    """If only the purse's key has coins, the owner signs for the deposit and the key pays the gas, also to open the purse."""
    owner, key = market.wallet("poor owner"), market.wallet("rich key")
    error = market("deposit", "1", "--wallet", "rich key", "--owner", "poor owner", fails=True)
    assert f"{owner} has no coins" in error["message"]

    async def fund(world: World) -> None:
        await world.deployer.send(Address(key.lower()), b"", value=10**18)
        await world.give(Address(owner.lower()), 2 * DOLLAR)

    on_chain(market, fund)
    made = market("deposit", "1", "--wallet", "rich key", "--owner", "poor owner")
    assert (made["free"], made["owner"]) == ("1000000", owner)
    assert market("deposit", "3", "--wallet", "rich key", "--owner", "poor owner", "--mint")["free"] == "4000000"
    places = {place["place"]: place["amount"] for place in market("balance", "--address", owner)["places"]}
    assert places["wallet"] == "1000000"


def test_settlement_during_a_release(market: Tally) -> None:
    """A provider may collect during a release; the release can still be completed, and `inspect` says so."""
    market("reserve", "node", "3")
    market("release", "node")
    _settle(market, 3 * DOLLAR)
    assert _inspect(market, "tab", "default", "node")[0] == "releasing"
    _advance(market, "1m")
    assert _inspect(market, "tab", "default", "node") == ("released", ["settle", "finishRelease", "reserve"])
    market("release", "node")
    assert _inspect(market, "tab", "default", "node")[0] == "open"


def test_cash_out(market: Tally) -> None:
    """Settled money is credit; anyone may pay it to its payout address, which only the account itself can set."""
    assert "no credit" in market("cash-out", "--wallet", "node", fails=True)["message"]
    _settle(market, 2 * DOLLAR)
    assert _inspect(market, "provider", "node") == ("unstaked", ["cashOut", "stake"])
    assert market("cash-out", "--account", "node") | {"tx": "", "block": 0} == {
        "account": NODE.address,
        "payout": NODE.address,
        "amount": "2000000",
        "tx": "",
        "block": 0,
    }
    _settle(market, 3 * DOLLAR)
    elsewhere = person("cold storage").address
    assert market("cash-out", "--wallet", "node", "--set-payout", elsewhere)["payout"] == elsewhere
    assert "bad_message" in market("cash-out", "--account", "node", "--set-payout", elsewhere, fails=True)["code"]
    places = {place["place"]: place for place in market("balance", "--address", elsewhere)["places"]}
    assert places["wallet"]["amount"] == "1000000"  # costs are cumulative: 3 in all, of which 2 were collected before


def test_stake_and_unstake(market: Tally) -> None:
    """Staked, announced, cancelled, announced again, too early, then paid; the balance shows what is leaving."""
    assert market("stake", "5", "--wallet", "node")["stake"] == "5000000"
    assert market("unstake", "3", "--wallet", "node")["unstaking"] == "3000000"
    assert _inspect(market, "provider", "node") == ("unstaking", ["unstake", "unstake"])
    places = {place["place"]: place["amount"] for place in market("balance", "--wallet", "node")["places"]}
    assert (places["stake"], places["stake, leaving"]) == ("2000000", "3000000")
    assert "the stake's waiting time ends in" in market("unstake", "--wallet", "node", fails=True)["message"]
    market("unstake", "--cancel", "--wallet", "node")
    assert _inspect(market, "provider", "node")[0] == "staked"
    market("unstake", "all", "--wallet", "node")
    _advance(market, "1m")
    assert _inspect(market, "provider", "node")[0] == "withdrawable"
    assert market("unstake", "--wallet", "node")["withdrawn"] == "5000000"
    assert "5 dollars are staked for" in market.says("stake", "5", "--mint", "--wallet", "node")


def test_purse_with_another_owner(market: Tally) -> None:
    """Only the owner's wallet moves the money of a purse, and the error says how to name it."""
    hot = market.wallet("hot")
    market("deposit", "2", "--wallet", "hot", "--owner", "default")
    error = market("thaw", "1", "--wallet", "hot", fails=True)
    assert error["code"] == "insufficient_funds"  # the hot key has not even coins for gas
    assert "tally chain fund" in error["message"]
    error = market("thaw", "1", "--wallet", "hot", "--owner", "node", fails=True)
    assert "--owner" in error["message"]
    assert market("thaw", "1", "--wallet", "hot", "--owner", "default")["key"] == hot
    assert market("reserve", "node", "1", "--wallet", "hot", "--owner", "default")["reserved"] == "1000000"
    steps = market("contract", "inspect", "purse", "hot")["next"]
    assert {step["account"] for step in steps} == {KEY.address}


def test_balance_of_all_tabs(market: Tally) -> None:
    """With --all-tabs, every provider that ever had a reservation is listed without being named."""
    market("reserve", "node", "3")
    other = market.wallet("other")
    market("reserve", "other", "1")
    named = {place["place"]: place["amount"] for place in market("balance", "--provider", "node")["places"]}
    every = {place["place"]: place["amount"] for place in market("balance", "--all-tabs")["places"]}
    assert named[f"reserved for {NODE.address}"] == every[f"reserved for {NODE.address}"] == "3000000"
    assert f"reserved for {other}" not in named
    assert every[f"reserved for {other}"] == "1000000"


@pytest.mark.parametrize(
    ("arguments", "code", "hint"),
    [
        (("thaw",), "bad_message", "--cancel"),
        (("thaw", "1", "--cancel"), "bad_message", "--cancel"),
        (("thaw", "11"), "insufficient_funds", "at most 10 dollars"),
        (("thaw", "0"), "insufficient_funds", "free"),
        (("thaw", "1", "--wallet", "node"), "chain_refused", "no purse yet"),
        (("reserve", "node", "11"), "insufficient_funds", "tally deposit"),
        (("reserve", "nobody", "1"), "bad_message", "PROVIDER"),
        (("reserve", "default", "1"), "chain_refused", "SelfDealing"),
        (("release", "node"), "chain_refused", "nothing is reserved"),
        (("stake", "0"), "bad_message", "more than 0"),
        (("stake", "5000"), "insufficient_funds", "holds"),
        (("unstake",), "chain_refused", "tally unstake AMOUNT"),
        (("unstake", "--cancel"), "chain_refused", "no withdrawal of the 0 dollars"),
        (("unstake", "1"), "insufficient_funds", "at most 0 dollars"),
        (("unstake", "1", "--cancel"), "bad_message", "--cancel"),
        (("cash-out", "--account", "nobody"), "bad_message", "--account"),
        (("cash-out", "--set-payout", "0x12"), "bad_message", "--set-payout"),
        (("contract", "inspect", "purse", "0x12"), "bad_message", "KEY"),
        (("contract", "inspect", "tab", "default", "nobody"), "bad_message", "PROVIDER"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_wrong_use_is_refused(market: Tally, arguments: tuple[str, ...], code: str, hint: str) -> None:
    """Each wrong use ends with exit code 1 and one error that names it and what to do; nothing changes."""
    before = market("balance", "--all-tabs")
    error = market(*arguments, fails=True)
    assert error["code"] == code, error
    assert hint in error["message"], error
    assert market("balance", "--all-tabs") == before


def test_inspect_as_text(market: Tally) -> None:
    """Without --json, `inspect` prints sentences with dollars and waits, and the possible next steps by party."""
    market("reserve", "node", "3")
    market("thaw", "2.5")
    purse = market.says("contract", "inspect", "purse")
    for expected in ("purse: thawing", "4.5 dollars is free", "2.5 dollars is under thaw", "tally withdraw", "the owner"):
        assert expected in purse
    tab = market.says("contract", "inspect", "tab", "default", "node")
    for expected in ("tab: reserved", "3 dollars is reserved: only this provider", "tally give-back", "the provider, or"):
        assert expected in tab
    assert "evidence against this account would cost it nothing" in market.says("contract", "inspect", "provider", "node")
    rules = market.says("contract", "inspect", "rules")
    for expected in ("5 seconds after it announced that (thaw)", "no owner, no upgrade and no pause", "token decimals"):
        assert expected in rules
    assert "error: nothing is reserved for" in market.says("release", person("stranger").address, code=1)


def test_inspect_as_json(market: Tally) -> None:
    """JSON has amounts as strings of base units, times as numbers, addresses in lower case, and the block that was read."""
    inspected: dict[str, Any] = market("contract", "inspect", "tab", "default", "node")
    assert inspected["tab"] == {
        "payer": KEY.address,
        "provider": NODE.address,
        "settled": "0",
        "reserved": "0",
        "releaseAt": 0,
        "purseOwner": KEY.address,
        "purseFree": "10000000",
    }
    assert inspected["chain"].keys() == {"id", "block", "now"}
    assert inspected["next"][1] == {
        "who": "the purse's owner",
        "account": Address(KEY.address),
        "what": "reserve more",
        "call": "reserve",
        "command": "tally reserve PROVIDER AMOUNT",
        "at": None,
    }
    rules = market("contract", "inspect", "rules")["rules"]
    assert (rules["thaw"], rules["penalty"], rules["tokenDecimals"]) == (5, "100000000", 6)


def test_report_of_an_equivocation(market: Tally, tmp_path: Path) -> None:
    """Two receipts of one number in an evidence file: the provider loses stake, and the reporter gets its part."""
    market("stake", "20", "--wallet", "node", "--mint")
    file = tmp_path / "evidence.json"

    async def write(world: World) -> None:
        order = world.order(KEY, NODE.address, DOLLAR)
        first, second = (world.receipt(NODE, KEY.address, 7, total) for total in (5, 6))
        terms = make_terms(make_ask(NODE), JobId(bytes(16)))
        file.write_bytes(EvidenceFile(world.domain, "two of seq 7", order, terms, first, (second,), None).dumps())

    on_chain(market, write)
    result = market("receipt", "report", str(file))
    assert (result["provider"], int(result["slashed"])) == (NODE.address, 20 * DOLLAR), "all, where the penalty is more"
    places = {place["place"]: int(place["amount"]) for place in market("balance")["places"]}
    assert places["credit as provider or coordinator"] > 0
    other = json.loads(file.read_bytes()) | {"others": []}
    file.write_text(json.dumps(other))
    assert "no two receipts" in market("receipt", "report", str(file), fails=True)["message"]
    assert market("receipt", "evidence") == []
    assert "no dishonest receipt" in market.says("receipt", "evidence")


def test_another_announcement_begins_the_wait_anew(market: Tally) -> None:
    """A second thaw, or a second withdrawal of stake, says that it replaces the first and that the wait begins anew."""
    market("thaw", "1")
    again = market("thaw", "2")
    assert (again["replaced"], again["thawing"]) == ("1000000", "2000000")
    text = market.says("thaw", "3")
    assert "2 dollars announced before can be paid out" in text
    assert "the wait begins anew" in text
    market("chain", "advance", "1m")
    assert "announced before can be paid out now (tally withdraw)" in market.says("thaw", "1")
    market("thaw", "--cancel")
    assert "anew" not in market.says("thaw", "1")
    market("stake", "4", "--mint", "--wallet", "node")
    assert "anew" not in market.says("unstake", "1", "--wallet", "node")
    assert "1 dollars announced before" in market.says("unstake", "2", "--wallet", "node")


def test_a_person_is_asked_before_the_wait_begins_anew(market: Tally, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a terminal, a person may decline; then the first announcement stays."""
    market("thaw", "1")
    for answer, code, thawing in (("n\n", 1, "1000000"), ("y\n", 0, "2000000")):
        terminal = io.StringIO(answer)
        monkeypatch.setattr(terminal, "isatty", lambda: True)
        with monkeypatch.context() as patch:
            patch.setattr("sys.stdin", terminal)
            market.says("thaw", "2", code=code)
        assert market("contract", "inspect", "purse")["purse"]["thawing"] == thawing
