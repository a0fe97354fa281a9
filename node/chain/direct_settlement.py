"""Direct settlement: settles claims on chain with this node's own wallet when no coordinator does so in time
(ports.Settlement).
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence

from node.ports import SettlementResult
from tallystick.chain.claims import ClaimBatch
from tallystick.chain.escrow import Escrow
from tallystick.chain.events import Settled
from tallystick.chain.sender import Sender
from tallystick.protocol.eip712 import Signed
from tallystick.protocol.errors import Code, Refusal
from tallystick.protocol.messages import Claim, Order
from tallystick.protocol.types import Address, Amount

RecordGas = Callable[[str, int, int, int], Awaitable[None]]
"""Stores what a transaction cost: its hash, the time, the gas used, and the fee in wei."""


class DirectSettlement:
    """ports.Settlement over the escrow contract; the sender's account pays the gas."""

    def __init__(self, escrow: Escrow, sender: Sender, record_gas: RecordGas, now: Callable[[], float] = time.time) -> None:
        self._escrow, self._sender, self._record_gas, self._now = escrow, sender, record_gas, now

    async def settle(self, claim: Signed[Claim], orders: Sequence[Signed[Order]]) -> SettlementResult:
        """See ports.Settlement."""
        account = self._sender.address
        if await self._escrow.rpc.balance(account) == 0:
            raise Refusal(
                Code.INSUFFICIENT_FUNDS,
                f"{account}: no coins to pay for gas; send it coins of the chain, or claims that no coordinator settles in "
                "time are lost",
            )
        batch = ClaimBatch.of(claim, orders, self._escrow.deployment.domain)
        results = await self._escrow.settle_all(self._sender, [batch])
        for result in results:
            await self._record_gas(result.hash, int(self._now()), result.gas_used, result.fee)
        paid: dict[Address, Amount] = {event.payer: event.paid for result in results for event in result.of(Settled)}
        return SettlementResult(tuple(result.hash for result in results), paid)
