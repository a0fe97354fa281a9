"""A process that signs and stores receipts of three payers as fast as it can, and prints each when it would leave the node."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from node.domain.tabs import CreditLimits, Funds, Tabs
from node.jobs.receipt_signer import ReceiptSigner
from tallystick.protocol.messages import Outcome
from tallystick.protocol.pricing import Usage
from tallystick.protocol.types import Amount, Hash
from tests.node.harness import DOMAIN, NOW, PROVIDER, Client, admitted, make_asks, signer
from tests.node.storage.test_store import open_store

PAYERS = 3
JOBS_AT_ONCE = 24
PLENTY = Amount(10**12)
LIMITS = CreditLimits(total=PLENTY, per_payer=PLENTY, new_payer=PLENTY, new_payers_per_day=PLENTY)


async def main(folder: Path, run: int) -> None:
    """Runs until it is killed. `run`: a number that makes the orders of this process differ from those of others."""
    store = open_store(folder)
    await store.start()
    tabs = Tabs(LIMITS, await store.tabs(NOW))
    signing = ReceiptSigner(
        signer=PROVIDER,
        domain=DOMAIN,
        tabs=tabs,
        store=store,
        unfinished=await store.unfinished_orders(NOW),
        now=lambda: NOW,
    )
    await signing.close_unfinished()
    clients = [Client(signer(f"payer {number}"), ceiling=10**9 * run) for number in range(PAYERS)]
    for client in clients:
        for _ in range(10_000 * run):
            next(client.numbers)
    ask = make_asks().current[0]

    async def jobs(client: Client) -> None:
        while True:
            placed = admitted(client.order(ask, b"{}"))
            tabs.admit(placed.order.message, placed.max_cost, Funds(free=PLENTY, known=True), NOW)
            stored = store.begin(placed, NOW)
            commitment = Hash(bytes([run]) * 32)
            receipt = await signing.sign_for_job(placed, stored, Usage(0, 0, 100), Outcome.COMPLETED, commitment)
            if receipt is None:
                sys.exit("a receipt was not stored")
            print(receipt.to_bytes().hex(), flush=True)  # noqa: T201 - this is how it leaves

    await asyncio.gather(*(jobs(clients[number % PAYERS]) for number in range(JOBS_AT_ONCE)))


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), int(sys.argv[2])))
