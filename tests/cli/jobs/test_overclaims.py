"""A provider that collects more than its receipts state loses stake, by the payer's commands alone."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tallystick.chain.claims import SettleRow
from tallystick.chain.deployment import Deployment
from tallystick.chain.escrow import TxResult
from tallystick.client.config import load_config
from tallystick.client.ledger.ledger import Ledger
from tallystick.client.ledger.schema import deployment_id
from tallystick.client.receipts.evidence import EvidenceFile
from tallystick.protocol.eip712 import Domain, Signed
from tallystick.protocol.messages import Receipt
from tallystick.protocol.stored import pack_signed
from tallystick.protocol.types import ZERO_ADDRESS, Amount, JobId
from tests.chain.harness import DOLLAR, World, person
from tests.cli.conftest import Tally, on_chain
from tests.coordinator.harness import make_ask, make_terms

KEY, NODE, OTHER = person("wallet default"), person("wallet node"), person("wallet other")


@pytest.fixture
def market(tally: Tally, chain_url: str) -> Tally:
    """A payer with a purse of ten dollars, and a provider with a stake of twenty; evidence costs seven."""
    for name in ("default", "node"):
        tally.wallet(name)
    money = ("--fund", "default", "--fund", "node", "--penalty", "7")
    tally("deploy", "--rpc", chain_url, "--dev-account", "0", "--short-waits", *money)
    tally("deposit", "10")
    tally("stake", "20", "--wallet", "node", "--mint")
    return tally


def _collect(market: Tally, total: int, seq: int) -> str:
    """The provider collects up to a total as of a receipt number. Returns the transaction's hash."""
    done: list[TxResult] = []

    async def act(world: World) -> None:
        row = SettleRow(world.order(KEY, NODE.address, total), seq, Amount(total))
        done.append(await world.settle(await world.sender(NODE), row))

    on_chain(market, act)
    return done[0].hash


def _receipts(market: Tally, *totals: tuple[int, int], payer: str = KEY.address) -> list[Signed[Receipt]]:
    created: list[Signed[Receipt]] = []

    async def act(world: World) -> None:
        created.extend(world.receipt(NODE, payer, seq, total) for seq, total in totals)  # type: ignore[arg-type]

    on_chain(market, act)
    return created


def _evidence(market: Tally, file: Path, receipt: Signed[Receipt], *others: Signed[Receipt], **changes: Any) -> str:
    created: list[EvidenceFile] = []

    async def act(world: World) -> None:
        order, terms = world.order(KEY, NODE.address, DOLLAR), make_terms(make_ask(NODE), JobId(bytes(16)))
        created.append(EvidenceFile(world.domain, "", order, terms, receipt, others, None))

    on_chain(market, act)
    file.write_bytes(replace(created[0], **changes).dumps())
    return str(file)


def _record(market: Tally, *created: Signed[Receipt]) -> None:
    """Puts receipts into the payer's ledger, without orders."""
    domain, path = Deployment.load(market.home / "deployment.json").domain, load_config().ledger_path(KEY.address)

    async def create() -> None:
        await (await Ledger.open(path, KEY.address)).close()

    asyncio.run(create())
    with closing(sqlite3.connect(path)) as database, database:
        for receipt in created:
            message = receipt.message
            tab = (deployment_id(domain), message.payer, message.provider)
            counts = "accepted, total, total_order_seq, ceiling, order_seq, blocked_reason"
            into = f"INSERT OR IGNORE INTO tabs (deployment_id, payer, provider, {counts}) VALUES (?, ?, ?, 0, 0, 0, 0, 0, '')"
            database.execute(into, tab)
            of_tab = "SELECT id, ?, ?, 1, 0 FROM tabs WHERE (deployment_id, payer, provider) = (?, ?, ?)"
            into = f"INSERT INTO receipts (tab, seq, receipt_doc, whole, recorded_at) {of_tab}"
            database.execute(into, (message.seq, pack_signed(receipt), *tab))


def test_report_slashes_an_overclaim(market: Tally, tmp_path: Path) -> None:
    """From the receipt alone, the claim is found on chain and the penalty is taken once; a fifth of it is the reporter's."""
    (receipt,) = _receipts(market, (1, 1))
    tx = _collect(market, 5 * DOLLAR, 1)
    file = _evidence(market, tmp_path / "evidence.json", receipt)
    result = market("receipt", "report", file)
    assert (result["provider"], int(result["slashed"])) == (NODE.address, 7 * DOLLAR)
    (overclaim,) = result["overclaims"]
    assert (overclaim["claimTx"], overclaim["claimed"], overclaim["receipt"]) == (tx, str(5 * DOLLAR), "1")
    places = {place["place"]: int(place["amount"]) for place in market("balance")["places"]}
    assert places["credit as provider or coordinator"] == 7 * DOLLAR // 5
    assert "counts once" in market("receipt", "report", file, fails=True)["message"]


def test_overclaims_are_found_in_the_ledger(market: Tally) -> None:
    """Among all receipts of the wallet, the one that contradicts the claim is used, though the newest does not."""
    _collect(market, 5, 2)
    _collect(market, 9, 3)
    _record(market, *_receipts(market, (1, 2), (2, 4), (3, 9), (4, 12)))
    (overclaim,) = market("receipt", "overclaims", NODE.address)["overclaims"]
    assert (overclaim["seq"], overclaim["claimed"], overclaim["receiptSeq"], overclaim["receipt"]) == (2, "5", 2, "4")
    assert "--report" in market.says("receipt", "overclaims", "node")
    result = market("receipt", "overclaims", "node", "--report")
    assert (int(result["slashed"]), len(result["overclaims"])) == (7 * DOLLAR, 1)


def test_claim_in_a_named_transaction(market: Tally, tmp_path: Path) -> None:
    """A claim is found also if it paid nothing; other, empty and malformed transactions are refused."""
    (receipt,) = _receipts(market, (2, 5))
    honest, overclaiming = _collect(market, 5, 2), _collect(market, 6, 1)
    file = _evidence(market, tmp_path / "evidence.json", receipt)
    assert "nothing to slash" in market("receipt", "report", file, "--claim", honest, fails=True)["message"]
    assert "no claim" in market("receipt", "report", file, "--claim", "0x" + "00" * 32, fails=True)["message"]
    assert market("receipt", "report", file, "--claim", "nonsense", fails=True)["code"]
    assert market("receipt", "report", file, "--claim", overclaiming)["overclaims"][0]["claimTx"] == overclaiming


def test_honest_provider_is_no_error(market: Tally) -> None:
    """If no claim is above the receipts, before and after the first settlement, the comparison says so and succeeds."""
    _record(market, *_receipts(market, (1, 2), (2, 5)))
    assert market("receipt", "overclaims", NODE.address)["overclaims"] == []
    assert "no claim that" in market.says("receipt", "overclaims", NODE.address)
    _collect(market, 5, 2)
    assert market("receipt", "overclaims", NODE.address)["overclaims"] == []
    assert "nothing to slash" in market.says("receipt", "overclaims", NODE.address)
    assert "nothing to slash" in market("receipt", "overclaims", NODE.address, "--report", fails=True)["message"]


def test_report_refuses_what_the_contract_would_not_slash(market: Tally, tmp_path: Path) -> None:
    """No claim, an honest claim, one as of a later receipt, another deployment, a forged receipt: the error names the case."""
    below, above = _receipts(market, (3, 4), (3, 8))
    file = tmp_path / "evidence.json"
    assert "no claim that" in market("receipt", "report", _evidence(market, file, below), fails=True)["message"]
    _collect(market, 8, 4)
    later = market("receipt", "report", _evidence(market, file, below), fails=True)["message"]
    assert "bring one of 4 or more" in later
    (fourth,) = _receipts(market, (4, 8))
    assert "nothing to slash" in market("receipt", "report", _evidence(market, file, fourth), fails=True)["message"]
    forged = Signed(_receipts(market, (4, 7))[0].message, above.signature)
    assert market("receipt", "report", _evidence(market, file, forged), fails=True)["code"] == "bad_signature"
    assert "no receipt of" in market("receipt", "overclaims", OTHER.address, fails=True)["message"]
    other = _evidence(market, file, fourth, domain=Domain(1, ZERO_ADDRESS))
    assert "another deployment" in market("receipt", "report", other, fails=True)["message"]
    assert str(20 * DOLLAR) in str(market("contract", "inspect", "provider", NODE.address))
