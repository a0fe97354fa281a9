"""What a client asks of the chain, and does there by itself, where its config names the deployment: read stakes, add to a
reservation that a provider finds too small, and notice reservations that nobody uses.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import structlog

from tallystick.client.config import ClientConfig
from tallystick.client.coordinator.pinning import load_deployment
from tallystick.client.ledger.accounts import Account
from tallystick.client.ledger.repair import Paid
from tallystick.client.receipts.checks import RESERVE_TIMES, Placed, Tab, reserve_for
from tallystick.protocol.eip712 import Signer
from tallystick.protocol.errors import Code, Fault, TallyError, Unavailable
from tallystick.protocol.types import ZERO_HASH, Address, Amount, Seconds, format_amount

if TYPE_CHECKING:
    from tallystick.chain.escrow import Escrow

log = structlog.get_logger()
STAKE_SECONDS = 60
KEPT = 10_000
JUST_NOW_SECONDS = 5.0
LOCK_TRIES, LOCK_PAUSE = 100, 0.2
MAX_SETTLED = 1 << 62
"""No honest chain has paid more on a tab."""


class Onchain:
    """See the module's docstring. Nothing here is needed to run jobs: what fails is logged, and says what to do by hand."""

    def __init__(self, escrow: Escrow, wallet: Signer, config: ClientConfig, tick: Callable[[], float] = time.monotonic) -> None:
        self._escrow, self._wallet, self._config, self._tick = escrow, wallet, config, tick
        self._stakes: dict[Address, tuple[float, Amount]] = {}
        self._topped_up: dict[Address, tuple[float, int]] = {}
        self._one_at_a_time = asyncio.Lock()

    @classmethod
    def of(cls, config: ClientConfig, wallet: Signer) -> Onchain | None:
        """Where the config names a deployment file, and an RPC address that is the user's own (see `rpc_of`). Raises BadMessage
        if the file cannot be read.
        """
        deployment = load_deployment(config)
        rpc = None if deployment is None else rpc_of(config, deployment.rpc)
        if deployment is None:
            return None
        if rpc is None:
            log.warning(
                "the chain is not asked: the RPC address in the deployment file may be anybody's",
                file=str(config.deployment),
                rpc=deployment.rpc,
                do="set rpc to an endpoint that you trust, or use_deployment_rpc = true",
            )
            return None
        from tallystick.chain.endpoint import Rpc  # noqa: PLC0415 - slow to import, and many clients name no deployment
        from tallystick.chain.escrow import Escrow  # noqa: PLC0415

        return cls(Escrow(Rpc(rpc), deployment), wallet, config)

    async def close(self) -> None:
        """Lets go of the endpoint."""
        await self._escrow.rpc.close()

    async def stake(self, provider: Address) -> Amount:
        """What a provider has staked, at most a minute old. Raises Unavailable."""
        known = self._stakes.get(provider)
        if known is not None and self._tick() - known[0] < STAKE_SECONDS:
            return known[1]
        stake = (await self._escrow.provider(provider)).stake
        if len(self._stakes) >= KEPT:
            self._stakes.clear()
        self._stakes[provider] = (self._tick(), stake)
        return stake

    async def settled(self, provider: Address) -> Amount:
        """What was paid to a provider in all; nothing where the chain does not say, or says what no honest one would."""
        try:
            settled = (await self._escrow.tab(self._wallet.address, provider)).settled
        except TallyError as error:
            log.info("the chain does not tell what it settled", reason=str(error))
            return Amount(0)
        return settled if settled <= MAX_SETTLED else Amount(0)

    async def paid(self, provider: Address, enough: Amount) -> list[Paid] | None:
        """The orders of this key on which the chain paid a provider, until one allows `enough` (base units); None where the chain
        cannot be searched now.
        """
        from tallystick.chain.settlements import settling_orders  # noqa: PLC0415 - see `of`

        try:
            found = await settling_orders(self._escrow, self._wallet.address, provider, enough=enough)
        except TallyError as error:
            log.info("the chain does not tell what it paid on", reason=str(error))
            return None
        return [Paid(one.order, one.transaction) for one in found]

    async def top_up(self, refused: Placed, tab: Tab, accounts: Sequence[Account], now_ns: int) -> bool:
        """Reserves enough for an order that its provider found too little reserved for, and for some more like it: RESERVE_TIMES
        what it takes now, as far as the config's reserve_target goes. Never more than top_up_total over all of `accounts` (the
        providers in this wallet's books). Whether it did, or just had; if not, the log says why.

        The key itself signs for it: an order for no more than was ordered before, with a higher reserveTarget, which the contract
        takes from anyone (IEscrow.secure). Only the gas must be at hand.
        """
        async with self._one_at_a_time:
            at, borne = self._topped_up.get(refused.provider, (float("-inf"), 0))
            if self._tick() - at < JUST_NOW_SECONDS and _worst(tab, refused) <= borne:
                return True
            try:
                async with _alone(self._config.state_file(self._wallet.address).with_suffix(".reserving")):
                    why = await self._top_up(refused, tab, accounts, now_ns)
            except TallyError as error:
                why = str(error)
        if why:
            command = f"tally reserve {refused.provider} {format_amount(refused.terms.max_cost)}"
            log.warning("a provider wants more reserved for it", provider=refused.provider, why=why, do=command)
        return not why

    async def _top_up(self, refused: Placed, tab: Tab, accounts: Sequence[Account], now_ns: int) -> str:
        """Why it was not done, or nothing."""
        escrow, key, provider = self._escrow, self._wallet.address, refused.provider
        providers = list(dict.fromkeys([provider, *(account.provider for account in accounts)]))
        purse = await escrow.purse(key)
        held = await asyncio.gather(*(escrow.tab(key, one) for one in providers))
        needed = _worst(tab, refused) - held[0].settled
        target = max(
            reserve_for(tab, self._config.reserve_target), needed, min(self._config.reserve_target, RESERVE_TIMES * needed)
        )
        reserved = sum(one.reserved for one in held)
        more = target - held[0].reserved
        room = self._config.top_up_total - reserved
        if more > room:
            return f"it takes {_dollars(more)}, and top_up_total leaves {_dollars(room)} of what is reserved in all"
        if more > purse.free - purse.thawing:
            return f"it takes {_dollars(more)}, and the purse has {_dollars(purse.free - purse.thawing)} free"
        if more <= 0:
            return f"{_dollars(held[0].reserved)} is reserved for it already"
        if await escrow.rpc.balance(key) == 0:
            return f"{key} has no coins of the chain to pay for gas"
        order = replace(
            refused.order.message,
            ceiling=tab.ceiling,
            reserve_target=Amount(target),
            seq=max(tab.order_seq + 1, now_ns),
            deadline=await escrow.rpc.now() + self._config.start_seconds,
            claim_by=Seconds(0),  # nothing can be collected on it
            terms_hash=ZERO_HASH,
        )
        from tallystick.chain.sender import Sender  # noqa: PLC0415 - see `of`

        await escrow.secure(Sender(escrow.rpc, self._wallet), self._wallet.sign(order, escrow.deployment.domain))
        self._topped_up[provider] = self._tick(), int(target + held[0].settled)
        log.info("reserved more for a provider", provider=provider, amount=_dollars(more), reserved=_dollars(target))
        return ""

    async def idle(self, accounts: Sequence[Account], now: int) -> list[tuple[Account, Amount]]:
        """The reservations of providers that were not ordered from for the config's idle_days. Raises Unavailable."""
        before = now - self._config.idle_days * 86_400
        old = [account for account in accounts if account.used_at < before and not account.in_flight]
        held = [(account, (await self._escrow.tab(self._wallet.address, account.provider)).reserved) for account in old]
        return [(account, amount) for account, amount in held if amount]

    async def warn_idle(self, accounts: Sequence[Account], now: int) -> None:
        """Logs them, with the command that frees each. Raises Unavailable."""
        for account, amount in await self.idle(accounts, now):
            days = (now - account.used_at) // 86_400
            log.warning(
                "money is reserved for a provider that is not used",
                provider=account.provider,
                amount=format_amount(amount),
                days=days,
                do=f"tally release {account.provider}",
            )


def _worst(tab: Tab, refused: Placed) -> int:
    """The most that its provider can have collected of this payer, once the order has run: base units over the tab's life."""
    return max(tab.accepted, tab.believed) + max(tab.open_caps, refused.terms.max_cost)


def rpc_of(config: ClientConfig, deployed: str) -> str | None:
    """The RPC address that a client believes: the config's own; that of the deployment file only if it is on this machine, or the
    config says so. None: none.
    """
    if config.rpc is not None or config.use_deployment_rpc:
        return config.rpc or deployed
    try:
        host = urlsplit(deployed).hostname or ""
        return deployed if host == "localhost" or ipaddress.ip_address(host).is_loopback else None
    except ValueError:
        return None


@contextlib.asynccontextmanager
async def _alone(path: Path) -> AsyncIterator[None]:
    """Keeps other processes of this wallet from doing the same meanwhile. Raises Unavailable if one takes too long."""
    if sys.platform == "win32":
        yield
        return
    import fcntl  # noqa: PLC0415 - not everywhere

    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with path.open("a") as file:
        for _ in range(LOCK_TRIES):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                await asyncio.sleep(LOCK_PAUSE)
        else:
            raise Unavailable(Code.CLIENT_BUSY, f"another process of this wallet is reserving ({path})", fault=Fault.CLIENT)
        yield


def _dollars(units: int) -> str:
    return format_amount(Amount(max(units, 0)))
