"""Reads from the chain where earned money is: the tabs' settled amounts and funds, and what coordinators took as fees.

All is read as of one block, so that no unit is counted twice while the node settles.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace

from node.chain.escrow_view import read_funds
from node.domain.earned_money import TabMoney
from node.ports import FeeTotal
from tallystick.chain.escrow import Escrow, ProviderAccount
from tallystick.chain.event_reader import DeepReorg, EventPage, read_events
from tallystick.chain.events import Settled
from tallystick.protocol.types import Address, Amount

CONCURRENT_READS = 16
FINAL_BLOCKS = 64
"""Fees are stored up to a block with so many blocks on top."""
FIRST_SPAN, MAX_SPAN = 2_000, 1 << 20


@dataclass(frozen=True, slots=True)
class SettledMoney:
    """A provider's money on chain as of one block: its tabs, its account, and the coordinators' fees in base units.

    `final` are the fees up to a block that will not be reorganised.
    """

    block: int
    tabs: Sequence[TabMoney]
    account: ProviderAccount
    fees: int
    final: FeeTotal


async def read_settled_money(
    escrow: Escrow, provider: Address, tabs: Sequence[TabMoney], known: FeeTotal | None = None
) -> SettledMoney:
    """Reads a provider's money as of the latest block. `known` are the fees that an earlier call returned as `final`.

    A tab whose receipts are all settled is not read again. Raises Unavailable.
    """
    block = await escrow.rpc.block_number()
    account = await escrow.provider(provider, block=hex(block))
    current: list[TabMoney] = [tab for tab in tabs if tab.funds.settled >= tab.cumulative]
    unsettled = [tab for tab in tabs if tab.funds.settled < tab.cumulative]
    for start in range(0, len(unsettled), CONCURRENT_READS):
        part = unsettled[start : start + CONCURRENT_READS]
        funds = await asyncio.gather(*(read_funds(escrow, tab.payer, provider, block=hex(block)) for tab in part))
        current += [replace(tab, funds=its_funds) for tab, its_funds in zip(part, funds, strict=True)]
    final, fees = await _read_fees(escrow, provider, known, block)
    return SettledMoney(block, current, account, fees, final)


async def _read_fees(escrow: Escrow, provider: Address, known: FeeTotal | None, block: int) -> tuple[FeeTotal, int]:
    """Returns the fees up to a final block, and those up to `block`."""
    try:
        final = known or FeeTotal(escrow.deployment.block, "", Amount(0))
        pages, final = await _read_pages(escrow, provider, final, confirmations=FINAL_BLOCKS)
    except DeepReorg:  # the stored total rests on blocks that are gone
        pages, final = await _read_pages(
            escrow, provider, FeeTotal(escrow.deployment.block, "", Amount(0)), confirmations=FINAL_BLOCKS
        )
    pages, _ = await _read_pages(escrow, provider, final, confirmations=0)
    return final, final.fees + _fees(pages, block)


async def _read_pages(
    escrow: Escrow, provider: Address, start: FeeTotal, *, confirmations: int
) -> tuple[list[EventPage], FeeTotal]:
    """Reads all pages after `start`. The span doubles while the endpoint returns that much."""
    pages, total, span = list[EventPage](), start, FIRST_SPAN
    while True:
        page = await read_events(
            escrow.rpc,
            escrow.deployment,
            total.block,
            after=total.tip,
            confirmations=confirmations,
            span=span,
            settled_by=provider,
        )
        if page.cursor == total.block:
            return pages, total
        span = min(MAX_SPAN, 2 * (page.cursor - total.block))
        total = FeeTotal(page.cursor, page.tip, Amount(total.fees + _fees([page])))
        pages.append(page)


def _fees(pages: Sequence[EventPage], block: int | None = None) -> int:
    events = (event for page in pages for event in page.events if isinstance(event, Settled))
    return sum(event.fee for event in events if block is None or event.at.block <= block)
