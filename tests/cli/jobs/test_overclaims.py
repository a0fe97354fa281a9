"""A provider that collected more than its receipts say loses stake, by the payer's commands alone."""

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
    """The provider collects so much as of that receipt, in a transaction of its own."""
    done: list[TxResult] = []

    async def act(world: World) -> None:
        row = SettleRow(world.order(KEY, NODE.address, total), seq, Amount(total))
        done.append(await world.settle(await world.sender(NODE), row))

    on_chain(market, act)
    return done[0].hash


def _receipts(market: Tally, *totals: tuple[int, int], payer: str = KEY.address) -> list[Signed[Receipt]]:
    made: list[Signed[Receipt]] = []

    async def act(world: World) -> None:
        made.extend(world.receipt(NODE, payer, seq, total) for seq, total in totals)  # type: ignore[arg-type]

    on_chain(market, act)
    return made


def _evidence(market: Tally, file: Path, receipt: Signed[Receipt], *others: Signed[Receipt], **changes: Any) -> str:
    made: list[EvidenceFile] = []

    async def act(world: World) -> None:
        order, terms = world.order(KEY, NODE.address, DOLLAR), make_terms(make_ask(NODE), JobId(bytes(16)))
        made.append(EvidenceFile(world.domain, "", order, terms, receipt, others, None))

    on_chain(market, act)
    file.write_bytes(replace(made[0], **changes).dumps())
    return str(file)


def _book(market: Tally, *made: Signed[Receipt]) -> None:
    """The payer's books have these receipts, and no orders."""
    domain, path = Deployment.load(market.home / "deployment.json").domain, load_config().ledger_path(KEY.address)

    async def create() -> None:
        await (await Ledger.open(path, KEY.address)).close()

    asyncio.run(create())
    with closing(sqlite3.connect(path)) as books, books:
        for one in made:
            digest, tab = one.message.digest(domain).hex(), (one.message.payer, one.message.provider)
            row: dict[str, object] = {
                "digest": digest,
                "order_digest": digest,
                "deployment_id": deployment_id(domain),
                "seq": one.message.seq,
            }
            row |= dict(zip(("payer", "provider"), tab, strict=True)) | {
                "receipt_doc": one.dumps(),
                "whole": True,
                "recorded_at": 0,
            }
            books.execute(f"INSERT INTO receipts ({', '.join(row)}) VALUES ({', '.join('?' * len(row))})", tuple(row.values()))


def test_a_provider_that_collects_above_its_receipt_does_not_keep_its_stake(market: Tally, tmp_path: Path) -> None:
    """From the receipt alone: the claim is found on chain, the penalty is taken, a fifth of it is the reporter's, once."""
    (receipt,) = _receipts(market, (1, 1))
    tx = _collect(market, 5 * DOLLAR, 1)
    file = _evidence(market, tmp_path / "evidence.json", receipt)
    told = market("receipt", "report", file)
    assert (told["provider"], int(told["slashed"])) == (NODE.address, 7 * DOLLAR)
    (one,) = told["overclaims"]
    assert (one["claimTx"], one["claimed"], one["receipt"]) == (tx, str(5 * DOLLAR), "1")
    places = {place["place"]: int(place["amount"]) for place in market("balance")["places"]}
    assert places["credit as provider or coordinator"] == 7 * DOLLAR // 5
    assert "counts once" in market("receipt", "report", file, fails=True)["message"]


def test_a_claim_above_one_of_many_receipts_is_found_in_the_books(market: Tally) -> None:
    """Of all receipts that the wallet has, the one that contradicts the claim is taken, though the newest does not."""
    _collect(market, 5, 2)
    _collect(market, 9, 3)
    _book(market, *_receipts(market, (1, 2), (2, 4), (3, 9), (4, 12)))
    (found,) = market("receipt", "overclaims", NODE.address)["overclaims"]
    assert (found["seq"], found["claimed"], found["receiptSeq"], found["receipt"]) == (2, "5", 2, "4")
    assert "--report" in market.says("receipt", "overclaims", "node")
    told = market("receipt", "overclaims", "node", "--report")
    assert (int(told["slashed"]), len(told["overclaims"])) == (7 * DOLLAR, 1)


def test_a_claim_is_found_in_the_transaction_that_is_named(market: Tally, tmp_path: Path) -> None:
    """Also where the claim paid nothing; another transaction, one without claims and one that is none have nothing to show."""
    (receipt,) = _receipts(market, (2, 5))
    honest, late = _collect(market, 5, 2), _collect(market, 6, 1)
    file = _evidence(market, tmp_path / "evidence.json", receipt)
    assert "nothing to punish" in market("receipt", "report", file, "--claim", honest, fails=True)["message"]
    assert "no claim" in market("receipt", "report", file, "--claim", "0x" + "00" * 32, fails=True)["message"]
    assert market("receipt", "report", file, "--claim", "nonsense", fails=True)["code"]
    assert market("receipt", "report", file, "--claim", late)["overclaims"][0]["claimTx"] == late


def test_an_honest_provider_is_no_error(market: Tally) -> None:
    """Where no claim is above the receipts, before the first settlement and after it, the comparison says so and succeeds."""
    _book(market, *_receipts(market, (1, 2), (2, 5)))
    assert market("receipt", "overclaims", NODE.address)["overclaims"] == []
    assert "no claim that" in market.says("receipt", "overclaims", NODE.address)
    _collect(market, 5, 2)
    assert market("receipt", "overclaims", NODE.address)["overclaims"] == []
    assert "nothing to punish" in market.says("receipt", "overclaims", NODE.address)
    assert "nothing to punish" in market("receipt", "overclaims", NODE.address, "--report", fails=True)["message"]


def test_what_the_contract_does_not_punish_is_not_sent(market: Tally, tmp_path: Path) -> None:
    """No claim, an honest one, one as of a later receipt, a foreign deployment, a forged receipt: the error says which."""
    below, above = _receipts(market, (3, 4), (3, 8))
    file = tmp_path / "evidence.json"
    assert "no claim that" in market("receipt", "report", _evidence(market, file, below), fails=True)["message"]
    _collect(market, 8, 4)
    later = market("receipt", "report", _evidence(market, file, below), fails=True)["message"]
    assert "bring one of 4 or more" in later
    (fourth,) = _receipts(market, (4, 8))
    assert "nothing to punish" in market("receipt", "report", _evidence(market, file, fourth), fails=True)["message"]
    forged = Signed(_receipts(market, (4, 7))[0].message, above.signature)
    assert market("receipt", "report", _evidence(market, file, forged), fails=True)["code"] == "bad_signature"
    assert "no receipt of" in market("receipt", "overclaims", OTHER.address, fails=True)["message"]
    other = _evidence(market, file, fourth, domain=Domain(1, ZERO_ADDRESS))
    assert "another deployment" in market("receipt", "report", other, fails=True)["message"]
    assert str(20 * DOLLAR) in str(market("contract", "inspect", "provider", NODE.address))
