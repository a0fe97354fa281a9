"""What the escrow's calls cost: whole-transaction gas on the embedded chain, beside what others pay.

Steady state: tabs, purses and credits exist already, every row pays, and its reservation is refilled. `--write` renews the
committed snapshot (contracts/gas.json), `--check` fails where a figure is more than 1 % above it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tallystick.chain.claims import ClaimBatch, SettleRow
from tallystick.chain.devnet import build_app
from tallystick.chain.escrow import TxResult
from tallystick.chain.events import Settled
from tallystick.chain.rpc import MAX_TRANSACTION_GAS, Rpc
from tallystick.protocol.eip712 import Signer
from tallystick.protocol.types import Amount, Seconds
from tests.chain.world import DOLLAR, FAR, World, person, serving

SNAPSHOT = Path(__file__).parent.parent / "contracts" / "gas.json"
TOLERANCE_PERCENT = 1
TARGETS = {"settle_row_1": 52_000, "settle_row_100": 22_000, "settle_row_100_relayed": 22_000, "settle_row_dense": 13_000}
X402 = {"settle_row_1": 48_333, "settle_row_10": 23_824, "settle_row_100": 21_413}
"""x402 batch channels, a claim's gas per row, as quoted in the project's performance notes."""
DENSE = 20


class Meter:
    """One market, and the figures measured on it."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.figures: dict[str, int] = {}
        self._paid: dict[tuple[str, str], int] = {}

    def note(self, name: str, result: TxResult) -> TxResult:
        """Keeps a call's gas under a name."""
        self.figures[name] = result.gas_used
        return result

    def row(self, payer: Signer, provider: Signer) -> SettleRow:
        """One more dollar owed on a tab, on an order that keeps a dollar reserved."""
        pair = (payer.address, provider.address)
        self._paid[pair] = self._paid.get(pair, 0) + DOLLAR
        order = {"reserve_target": Amount(DOLLAR), "claim_by": FAR}
        return self.world.row(payer, provider.address, self._paid[pair], **order)

    async def settle(self, payers: list[Signer], providers: list[Signer], *, relayed: bool) -> int:
        """Gas a row of one settlement of every payer with every provider, once all tabs are in steady state."""
        relay = await self.world.sender(providers[0])
        outsider = await self.world.sender(person("relay"))
        for _ in range(2):
            rows = {provider: tuple(self.row(payer, provider) for payer in payers) for provider in providers}
            claims = [self._claim(provider, rows[provider], relayed=relayed) for provider in providers]
            result = await self.world.escrow.settle(outsider if relayed else relay, claims)
            if len(result.of(Settled)) != len(payers) * len(providers):
                raise SystemExit("a row was not paid; the figures would be worth nothing")
        return result.gas_used // (len(payers) * len(providers))

    def _claim(self, provider: Signer, rows: tuple[SettleRow, ...], *, relayed: bool) -> ClaimBatch:
        return self.world.claim(provider, *rows) if relayed else ClaimBatch(provider.address, rows)


async def measure() -> dict[str, int]:
    """All figures, in gas."""
    with serving(build_app()) as url:
        rpc = Rpc(url)
        meter = Meter(await World.make(rpc))
        await measure_calls(meter)
        await measure_settlement(meter)
        await rpc.close()
    return meter.figures


async def measure_settlement(meter: Meter) -> None:
    """Rows: one provider with 1, 10 and 100 payers, sent by itself and by a relay; 20 payers with 20 providers."""
    world, provider = meter.world, person("provider")
    payers = [person(f"payer {number}") for number in range(100)]
    owner = person("owner of all")
    for payer in payers:
        await world.purse(payer, owner, 1_000 * DOLLAR)
    for count in (1, 10, 100):
        for relayed in (False, True):
            name = f"settle_row_{count}{'_relayed' if relayed else ''}"
            meter.figures[name] = await meter.settle(payers[:count], [provider], relayed=relayed)
    many = [person(f"provider {number}") for number in range(DENSE)]
    meter.figures["settle_row_dense"] = await meter.settle(payers[:DENSE], many, relayed=True)
    # A batch costs a + b * rows; the two largest give both.
    ten, hundred = 10 * meter.figures["settle_row_10"], 100 * meter.figures["settle_row_100"]
    each = (hundred - ten) / 90
    meter.figures["max_rows"] = int((MAX_TRANSACTION_GAS - (ten - 10 * each)) // each)


async def measure_calls(meter: Meter) -> None:
    """Every other call, once."""
    world, escrow = meter.world, meter.world.escrow
    key, owner, provider = person("key"), person("rich owner"), person("some provider")
    sender, node = await world.sender(owner), await world.sender(provider)
    await world.give(owner.address, 1_000 * DOLLAR)
    await world.give(provider.address, 10 * DOLLAR)
    transfer = await escrow.token.transfer(sender, provider.address, Amount(DOLLAR))
    meter.figures["erc20_transfer"] = transfer.gas_used
    await world.purse(key, owner, 0)
    meter.note("open", await escrow.open_purse(await world.sender(person("own key")), person("own key").address, owner.address))
    await escrow.token.approve(sender, world.deployment.escrow, Amount(10**15))
    meter.note("deposit_first", await escrow.deposit(sender, key.address, Amount(10 * DOLLAR)))
    meter.note("deposit", await escrow.deposit(sender, key.address, Amount(10 * DOLLAR)))
    until = Seconds(FAR)
    permit = await escrow.token.permit(owner, world.deployment.escrow, Amount(DOLLAR), until)
    meter.note("deposit_with_permit", await escrow.deposit_with_permit(sender, key.address, permit))
    meter.note("reserve", await escrow.reserve(sender, key.address, provider.address, Amount(DOLLAR)))
    order = world.order(key, provider.address, DOLLAR, reserve_target=Amount(2 * DOLLAR))
    meter.note("secure", await escrow.secure(node, order))
    meter.note("release", await escrow.release(sender, key.address, provider.address))
    await world.advance(1_000)
    meter.note("finish_release", await escrow.finish_release(sender, key.address, provider.address))
    row = world.row(key, provider.address, DOLLAR)
    await world.settle(node, row)
    meter.note("cash_out", await escrow.cash_out(node, provider.address))
    meter.note("thaw", await escrow.thaw(sender, key.address, Amount(DOLLAR)))
    await world.advance(1_000)
    meter.note("withdraw", await escrow.withdraw(sender, key.address))
    await escrow.token.approve(node, world.deployment.escrow, Amount(10 * DOLLAR))
    meter.note("stake", await escrow.stake(node, Amount(5 * DOLLAR)))
    receipts = [world.receipt(provider, key.address, 1, total) for total in (1, 2)]
    meter.note("slash_equivocation", await escrow.slash_equivocation(sender, *receipts))


def show(figures: dict[str, int]) -> None:
    """The figures beside their targets and what others pay."""
    table = Table("call", "gas", "target", "x402", "of an ERC-20 transfer per job", title="Gas of whole transactions")
    for name, gas in figures.items():
        target, other = TARGETS.get(name), X402.get(name)
        share = f"{100 * gas / figures['erc20_transfer']:.0f} %" if "row_" in name else ""
        met = "" if target is None else f"{target:,} {'met' if gas <= target else 'missed'}"
        table.add_row(name, f"{gas:,}", met, f"{other:,}" if other else "", share)
    Console().print(table)


def grown(figures: dict[str, int], known: dict[str, int]) -> list[str]:
    """What costs more than 1 % above the snapshot, or is missing from it. `max_rows` is better when it is larger."""
    found = [f"{name}: not in {SNAPSHOT.name}" for name in figures.keys() ^ known.keys()]
    for name in figures.keys() & known.keys():
        now, then = (known[name], figures[name]) if name == "max_rows" else (figures[name], known[name])
        if now * 100 > then * (100 + TOLERANCE_PERCENT):
            found.append(f"{name}: {figures[name]:,}, the snapshot says {known[name]:,}")
    return sorted(found)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="scripts/bench gas", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--check", action="store_true", help="fail where a figure grew by more than 1 %%")
    parser.add_argument("--write", action="store_true", help="renew the snapshot")
    options = parser.parse_args()
    figures = asyncio.run(measure())
    if options.json:
        print(json.dumps(figures, indent=2))
    else:
        show(figures)
    if options.write:
        SNAPSHOT.write_text(json.dumps(figures, indent=2) + "\n")
    problems = grown(figures, json.loads(SNAPSHOT.read_text())) if options.check else []
    for problem in problems:
        print(f"gas grew: {problem}; if that is meant, run scripts/bench gas --write", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
