"""`tally spending` shows what hosted upstreams answered apart from the market."""

from __future__ import annotations

import asyncio
import time

from tallystick.client.config import UpstreamTarget
from tallystick.client.ledger.ledger import Ledger
from tallystick.client.ledger.upstream_spending import UpstreamBooking
from tallystick.protocol.pricing import Usage
from tallystick.protocol.types import Amount
from tests.chain.harness import person
from tests.cli.conftest import Tally

WALLET = person("wallet default")


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
