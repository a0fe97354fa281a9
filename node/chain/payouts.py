"""Automatic payout: pays the node's credit to its payout address when it reaches the amount that the provider set."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any, Protocol

import structlog

from node.domain.payout_policy import PayoutPolicy
from node.ports import PayoutRecord
from tallystick.chain.escrow import Escrow, ProviderAccount, TxResult
from tallystick.chain.events import CashedOut
from tallystick.chain.sender import Sender
from tallystick.protocol.errors import BadMessage, TallyError
from tallystick.protocol.types import Address, Amount, format_amount

log = structlog.get_logger()
TEST_CHAIN_ID = 31_337
"""The chain id of local test chains, whose coins cost nothing."""


class PayoutStore(Protocol):
    """The store that the payouts need."""

    async def record_payout(self, payout: PayoutRecord) -> None:
        """Stores a payout. Raises Unavailable."""
        ...

    async def record_gas(self, tx: str, at: int, gas_used: int, fee: int) -> None:
        """Stores the gas that a transaction cost; `fee` is in wei. Raises Unavailable."""
        ...


def check_policy(policy: PayoutPolicy, chain_id: int) -> None:
    """Raises BadMessage if payouts are wanted on a chain whose coins have an unknown price."""
    if policy.min_amount is not None and policy.coin_price is None and chain_id != TEST_CHAIN_ID:
        raise BadMessage(
            f"config: payout.coin_price: expected the price of one coin of chain {chain_id} in dollars, got none; without it the "
            "node cannot tell whether a payout is worth its gas"
        )


class Payouts:
    """See the module's docstring. `policy` may be replaced while it runs; `now` returns Unix seconds."""

    def __init__(
        self,
        escrow: Escrow,
        sender: Sender,
        store: PayoutStore,
        policy: PayoutPolicy,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._escrow, self._sender, self._store, self._now = escrow, sender, store, now
        self.policy = policy
        self.waiting_for = "not checked yet"
        """Why nothing is paid out now; empty just after a payout."""
        self.last: PayoutRecord | None = None

    @property
    def chain_id(self) -> int:
        """The chain of the escrow."""
        return self._escrow.deployment.chain_id

    async def run(self) -> None:
        """Checks the credit every `check_interval` seconds until cancelled."""
        while True:
            await self.check()
            await asyncio.sleep(self.policy.check_interval)

    async def check(self) -> None:
        """Pays the credit out if it is enough and worth its gas. Trouble with the chain delays a payout and is logged."""
        if self.policy.min_amount is None:
            self.waiting_for = "not automatic"
            return
        try:
            self.waiting_for = await self._pay_out(self.policy)
        except TallyError as error:
            if self.waiting_for != str(error):
                log.warning("payout delayed", reason=str(error))
            self.waiting_for = str(error)

    def status(self) -> dict[str, Any]:
        """Returns the members of the status report; amounts in base units."""
        minimum, last = self.policy.min_amount, self.last
        return {
            "minAmount": None if minimum is None else str(int(minimum)),
            "address": self.policy.address,
            "waitingFor": self.waiting_for,
            "last": None
            if last is None
            else {"tx": last.tx, "at": last.at, "amount": str(int(last.amount)), "address": last.address},
        }

    async def _pay_out(self, policy: PayoutPolicy) -> str:
        """Returns why nothing was paid; an empty text after a payout. Raises TallyError."""
        provider = self._sender.address
        account = await self._escrow.provider(provider)
        if reason := policy.objection(account.credit, 0):
            return reason
        payout = policy.address or account.payout
        wei = await self._gas(account, payout)
        coins = await self._escrow.rpc.balance(provider)
        if coins < wei:
            return f"{provider} has too few coins to pay for gas; send it {format_amount(Amount(wei - coins), 18)} more"
        if reason := policy.objection(account.credit, wei):
            return reason
        if payout != account.payout:
            await self._record_gas(await self._escrow.set_payout(self._sender, payout))
            log.info("payout address registered", address=payout)
        result = await self._escrow.cash_out(self._sender, provider)
        await self._record_gas(result)
        for event in result.of(CashedOut):
            self.last = PayoutRecord(result.hash, int(self._now()), event.amount, event.payout)
            await self._store.record_payout(self.last)
            log.info("paid out", amount=format_amount(event.amount), address=event.payout, tx=result.hash)
        return ""

    async def _gas(self, account: ProviderAccount, payout: Address) -> int:
        """The most that a payout costs in wei at the present price of gas."""
        to, provider = self._escrow.deployment.escrow, self._sender.address
        wei = await self._sender.max_cost(to, self._escrow.calldata("cashOut", provider))
        if payout != account.payout:
            wei += await self._sender.max_cost(to, self._escrow.calldata("setPayout", payout))
        return wei

    async def _record_gas(self, result: TxResult) -> None:
        await self._store.record_gas(result.hash, int(self._now()), result.gas_used, result.fee)
