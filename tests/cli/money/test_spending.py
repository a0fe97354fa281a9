"""`tally spending` shows what hosted upstreams answered apart from the market."""

from __future__ import annotations

import asyncio
import time

import sqlalchemy as sa

from tallystick.client.ledger import spending
from tallystick.client.ledger.ledger import Ledger
from tallystick.client.ledger.schema import spent
from tallystick.client.ledger.upstream_spending import UpstreamBooking
from tallystick.client.upstream_settings import UpstreamTarget
from tallystick.protocol.pricing import Usage
from tallystick.protocol.types import Amount
from tests.chain.harness import person
from tests.cli.conftest import Tally

WALLET = person("wallet default")


def test_hedged_requests_are_counted(payer: Tally) -> None:
    """JSON, CSV and text say how many requests ran at two providers, and what they cost more or less."""

    async def book(extra: int) -> None:
        ledger = await Ledger.open(payer.home / "client" / f"{WALLET.address}.db", WALLET.address)
        row = {"payer": WALLET.address, "day": int(time.time()) // 86_400, "label": "", "model": f"m{extra}", "provider": "0x1"}
        sums = dict.fromkeys(spending._SUMS, 0) | {"requests": 3, "cost": 90, "hedged": 2, "hedge_cost": extra}
        await ledger._database.write(lambda c: c.execute(sa.insert(spent).values(row | sums)))
        await ledger.close()

    asyncio.run(book(-30))
    assert "2 requests ran at two providers, as the first was late: 0.00003 dollars less than at the first" in " ".join(
        payer.says("spending").split()
    )
    asyncio.run(book(50))
    lines = payer("spending", "--by", "model")["spent"]
    assert [(line["model"], line["hedged"], line["hedgeCost"]) for line in lines] == [("m-30", 2, "-30"), ("m50", 2, "50")]
    assert "4 requests ran at two providers, as the first was late: 0.00002 dollars more" in " ".join(
        payer.says("spending").split()
    )
    assert "hedged,hedgeCost" in payer.says("spending", "--csv")


def test_upstreams_are_shown_apart(payer: Tally) -> None:
    """JSON and text say that their answers are unsealed and unsigned; the sums include them."""

    async def book() -> None:
        ledger = await Ledger.open(payer.home / "client" / f"{WALLET.address}.db", WALLET.address)
        booking = UpstreamBooking(UpstreamTarget("cloud", "big"), "", int(time.time()), Amount(500))
        await ledger.reserve_upstream(booking, [])
        await ledger.settle_upstream(booking, Amount(200), Usage(100, 0, 50), failed=False)
        await ledger.close()

    asyncio.run(book())
    shown = payer("spending", "--by", "provider,model")
    (hosted,) = shown["upstreams"]
    assert (hosted["upstream"], hosted["sealed"], hosted["signed"], hosted["cost"]) == ("cloud", False, False, "200")
    (line,) = shown["spent"]
    assert (line["provider"], line["model"], line["cost"]) == ("upstream:cloud", "upstream://cloud/big", "200")
    text = payer.says("spending")
    for part in ("unsealed, unsigned", "cloud", "100 + 50", "0.0002"):
        assert part in text
    assert "upstream:cloud" in payer.says("spending", "--by", "provider")
