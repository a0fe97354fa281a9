"""The client's own access to the escrow contract: reads of stakes and payments, reservation top-ups, and idle reservations.

It is available only if the config names a deployment file. Jobs run without it.
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

from tallystick.chain.read_cache import ReadCache
from tallystick.client.config import ClientConfig
from tallystick.client.coordinator.pinning import load_deployment
from tallystick.client.ledger.accounts import Account, debt_of
from tallystick.client.ledger.repair import PaidOrder
from tallystick.client.orders.signing import RESERVE_MULTIPLE, PlacedOrder, reserve_for
from tallystick.client.orders.tab import Tab
from tallystick.protocol.eip712 import Signer
from tallystick.protocol.errors import Code, Fault, TallyError, Unavailable
from tallystick.protocol.messages import Bind
from tallystick.protocol.public_url import public_url
from tallystick.protocol.types import ZERO_HASH, Address, Amount, Seconds, format_amount

if TYPE_CHECKING:
    from tallystick.chain.escrow import Escrow, Purse, TabState

log = structlog.get_logger()
STAKE_SECONDS = 60
"""Age in seconds up to which a cached stake is used."""
CACHED_STAKES = 10_000
MAX_DEBTS = 64
"""Accounts, the most recently used ones, whose debts are looked up when a thaw is noticed."""
REPEAT_SECONDS = 5.0
"""For so long after a top-up, another request that the same reservation covers starts no second one."""
READS_AT_ONCE = 16
LOCK_TRIES, LOCK_PAUSE = 100, 0.2
MAX_SETTLED = 1 << 62
"""Base units. No honest chain has paid more on a tab."""


class PayerEscrow:
    """The escrow as one payer uses it. A failed top-up is logged with the command that does it by hand.

    `clock` gives monotonic seconds.
    """

    def __init__(self, escrow: Escrow, wallet: Signer, config: ClientConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self._escrow, self._wallet, self._config, self._clock = escrow, wallet, config, clock
        self._stakes = ReadCache("stake of", self._read_stake, capacity=CACHED_STAKES, clock=clock)
        self._top_ups: dict[Address, tuple[float, int]] = {}
        """By provider: when its reservation was last topped up, and the total cost on its tab that this covers."""
        self._top_up_lock = asyncio.Lock()
        self._warned_of = 0
        """The end of the thaw that was last warned of, in Unix seconds."""

    @property
    def escrow(self) -> Escrow:
        """The contract's typed calls."""
        return self._escrow

    def bind(self, owner: Address) -> bytes:
        """The wallet's signature that `owner` may open and own its purse. Useless once the purse has an owner."""
        bind = Bind(key=self._wallet.address, owner=owner)
        return self._wallet.sign(bind, self._escrow.deployment.domain).signature

    async def purse(self) -> Purse:
        """The wallet's purse on chain. Raises Unavailable."""
        return await self._escrow.purse(self._wallet.address)

    async def tabs(self, providers: Sequence[Address]) -> list[TabState]:
        """The wallet's tabs with these providers, a few reads at a time. Raises Unavailable."""
        gate = asyncio.Semaphore(READS_AT_ONCE)

        async def read(provider: Address) -> TabState:
            async with gate:
                return await self._escrow.tab(self._wallet.address, provider)

        return await asyncio.gather(*map(read, providers))

    @classmethod
    def of(cls, config: ClientConfig, wallet: Signer) -> PayerEscrow | None:
        """The escrow of the config's deployment file; None without a file or a trusted RPC address (see `rpc_of`).

        Raises BadMessage if the file cannot be read.
        """
        deployment = load_deployment(config)
        rpc = None if deployment is None else rpc_of(config, deployment.rpc)
        if deployment is None:
            return None
        if rpc is None:
            log.warning(
                "chain not used: the RPC address in the deployment file is not known to be trusted",
                file=str(config.deployment),
                rpc=public_url(deployment.rpc),
                hint="set rpc to an endpoint that you trust, or use_deployment_rpc = true",
            )
            return None
        from tallystick.chain.endpoint import Rpc  # noqa: PLC0415 - slow to import, and many clients name no deployment
        from tallystick.chain.escrow import Escrow  # noqa: PLC0415

        return cls(Escrow(Rpc(rpc), deployment), wallet, config)

    async def close(self) -> None:
        """Cancels reads in progress and closes the connections to the endpoint."""
        await self._stakes.close()
        await self._escrow.rpc.close()

    async def stake(self, provider: Address) -> Amount:
        """A provider's stake, at most a minute old. Raises Unavailable."""
        return await self._stakes.get(provider, max_age=STAKE_SECONDS)

    async def _read_stake(self, provider: Address) -> Amount:
        return (await self._escrow.provider(provider)).stake

    async def settled(self, provider: Address) -> Amount:
        """The total that the chain paid to a provider on this payer's tab; 0 if the chain fails or claims an implausible sum."""
        try:
            settled = (await self._escrow.tab(self._wallet.address, provider)).settled
        except TallyError as error:
            log.info("settled amount not read from the chain", reason=str(error))
            return Amount(0)
        return settled if settled <= MAX_SETTLED else Amount(0)

    async def paid(self, provider: Address, enough: Amount) -> list[PaidOrder] | None:
        """The orders of this key on which the chain paid a provider, newest first, up to one that allows `enough` base units.

        None if the chain cannot be searched now.
        """
        from tallystick.chain.settlements import settling_orders  # noqa: PLC0415 - see `of`

        try:
            orders = await settling_orders(self._escrow, self._wallet.address, provider, enough=enough)
        except TallyError as error:
            log.info("settled orders not read from the chain", reason=str(error))
            return None
        return [PaidOrder(settling.order, settling.transaction) for settling in orders]

    async def top_up(self, refused: PlacedOrder, tab: Tab, accounts: Sequence[Account], now_ns: int) -> bool:
        """Raises the reservation for a provider that refused an order as unsecured. Returns whether it is, or just was, raised.

        The new reservation covers the order and some more like it (RESERVE_TIMES), within the config's reserve_target. All
        reservations of `accounts`, the providers in this wallet's ledger, stay within top_up_total. If nothing is reserved, the
        log says why.

        The key signs for it: an order for no more than was ordered before, with a higher reserveTarget, which the contract
        accepts from any sender (IEscrow.secure). Only coins for gas are needed.
        """
        async with self._top_up_lock:
            topped_up_at, covered = self._top_ups.get(refused.provider, (float("-inf"), 0))
            if self._clock() - topped_up_at < REPEAT_SECONDS and _worst_total(tab, refused) <= covered:
                return True
            try:
                async with _process_lock(self._config.ledger_path(self._wallet.address).with_suffix(".reserving")):
                    reason = await self._top_up(refused, tab, accounts, now_ns)
            except TallyError as error:
                reason = str(error)
        if reason:
            command = f"tally reserve {refused.provider} {format_amount(refused.terms.max_cost)}"
            log.warning("reservation too small for a provider", provider=refused.provider, reason=reason, hint=command)
        return not reason

    async def _top_up(self, refused: PlacedOrder, tab: Tab, accounts: Sequence[Account], now_ns: int) -> str:
        """Returns why nothing was reserved, or an empty text."""
        escrow, key, provider = self._escrow, self._wallet.address, refused.provider
        providers = list(dict.fromkeys([provider, *(account.provider for account in accounts)]))
        purse = await escrow.purse(key)
        tabs = await asyncio.gather(*(escrow.tab(key, address) for address in providers))
        needed = _worst_total(tab, refused) - tabs[0].settled
        target = max(
            reserve_for(tab, self._config.reserve_target), needed, min(self._config.reserve_target, RESERVE_MULTIPLE * needed)
        )
        missing = target - tabs[0].reserved
        allowed = self._config.top_up_total - sum(on_chain.reserved for on_chain in tabs)
        if missing > allowed:
            return f"{_dollars(missing)} more would be needed, but top_up_total allows {_dollars(allowed)} more"
        if missing > purse.free - purse.thawing:
            return f"{_dollars(missing)} more would be needed, but the purse has {_dollars(purse.free - purse.thawing)} free"
        if missing <= 0:
            return f"{_dollars(tabs[0].reserved)} is reserved for it already"
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
        self._top_ups[provider] = self._clock(), int(target + tabs[0].settled)
        log.info("reserved more for a provider", provider=provider, amount=_dollars(missing), reserved=_dollars(target))
        return ""

    async def idle(self, accounts: Sequence[Account], now: int) -> list[tuple[Account, Amount]]:
        """Reservations for providers that got no order for the config's idle_reserve_days. Raises Unavailable."""
        before = now - self._config.idle_reserve_days * 86_400
        unused = [account for account in accounts if account.used_at < before and not account.in_flight]
        reserved = [(account, (await self._escrow.tab(self._wallet.address, account.provider)).reserved) for account in unused]
        return [(account, amount) for account, amount in reserved if amount]

    async def warn_leaving(self, accounts: Sequence[Account]) -> None:
        """Logs a warning, once for each thaw, if money is leaving the purse while providers are owed some. Raises Unavailable."""
        purse = await self._escrow.purse(self._wallet.address)
        if not purse.thawing or purse.thaw_at == self._warned_of:
            return
        debts = [debt_of(account, await self.settled(account.provider)) for account in accounts[:MAX_DEBTS]]
        owing = [debt for debt in debts if debt is not None]
        if owing:
            self._warned_of = purse.thaw_at
            log.warning(
                "money is leaving a purse that owes some",
                thawing=format_amount(purse.thawing),
                owed=format_amount(Amount(sum(debt.owed for debt in owing))),
                in_flight=format_amount(Amount(sum(debt.in_flight for debt in owing))),
                providers=[debt.provider for debt in owing],
                hint="they collect now, and take no job on money that leaves; to keep it in the purse: tally thaw --cancel",
            )

    async def warn_idle(self, accounts: Sequence[Account], now: int) -> None:
        """Logs each idle reservation with the command that releases it. Raises Unavailable."""
        for account, amount in await self.idle(accounts, now):
            days = (now - account.used_at) // 86_400
            log.warning(
                "idle reservation",
                provider=account.provider,
                amount=format_amount(amount),
                days=days,
                hint=f"tally release {account.provider}",
            )


def _worst_total(tab: Tab, refused: PlacedOrder) -> int:
    """The most that the provider can have collected over the tab's life once the order has run, in base units."""
    return max(tab.accepted, tab.explained_total) + max(tab.open_caps, refused.terms.max_cost)


def rpc_of(config: ClientConfig, deployed: str) -> str | None:
    """The RPC address that the client trusts; None without one.

    That is the config's own address, or the deployment file's if it is on this machine or the config allows it.
    """
    if config.rpc is not None or config.use_deployment_rpc:
        return config.rpc or deployed
    try:
        host = urlsplit(deployed).hostname or ""
        return deployed if host == "localhost" or ipaddress.ip_address(host).is_loopback else None
    except ValueError:
        return None


@contextlib.asynccontextmanager
async def _process_lock(path: Path) -> AsyncIterator[None]:
    """Holds a lock against other processes of this wallet. Raises Unavailable if one of them holds it for too long."""
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
