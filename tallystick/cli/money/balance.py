"""`tally deposit`, `tally balance`: a payer's money, and where every unit of it is."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tallystick.cli.onchain import account_of, open_escrow, require_coins
from tallystick.cli.options import (
    DEFAULT_WALLET,
    Config,
    DeploymentFile,
    Json,
    PasswordFile,
    Rpc,
    Wallet,
    unlock,
    wallets,
)
from tallystick.cli.output import show_json, show_rows, step
from tallystick.protocol.errors import BadMessage, Code, Refusal
from tallystick.protocol.messages import Bind
from tallystick.protocol.types import Address, Amount, Seconds, format_amount, parse_address, parse_amount

if TYPE_CHECKING:
    from tallystick.chain.escrow import Escrow, TabState
    from tallystick.chain.rpc import Sender
    from tallystick.client.config import ClientConfig
    from tallystick.client.ledger.accounts import Account
    from tallystick.protocol.eip712 import Domain, Signer

PERMIT_SECONDS = 3_600
DAY = 86_400


def deposit(
    amount: Annotated[str | None, typer.Argument(help="Dollars to deposit, for example 10 or 2.50.")] = None,
    up_to: Annotated[
        str | None,
        typer.Option("--top-up-to", help="Instead: deposit what the purse, reservations included, has less than this."),
    ] = None,
    wallet: Wallet = DEFAULT_WALLET,
    owner: Annotated[
        str | None, typer.Option(help="Wallet that owns and fills the purse; the same wallet by default.", autocompletion=wallets)
    ] = None,
    mint: Annotated[bool, typer.Option(help="Mint the test dollars first (local chains only).")] = False,
    password_file: PasswordFile = None,
    deployment: DeploymentFile = None,
    rpc: Rpc = None,
    as_json: Json = False,
) -> None:
    """Fills a wallet's purse, from which its jobs are paid. The first deposit opens the purse and binds it to its owner.

    What the purse has is the most that its key can spend: `--top-up-to 5`, given every day, bounds a hot key to five dollars.
    """
    from tallystick.chain.rpc import Sender

    if (amount is None) is (up_to is None):
        raise BadMessage("give an amount, or --top-up-to")
    wanted = parse_amount(amount or str(up_to))
    key = unlock(wallet, password_file)
    payer = key if owner is None else unlock(owner, password_file)

    async def run() -> None:
        async with open_escrow(deployment, rpc) as escrow:
            value = wanted if up_to is None else Amount(max(0, wanted - await limit_of(escrow, key.address)))
            nothing = up_to is not None and not value
            tx = None if nothing else await fill_purse(escrow, Sender(escrow.rpc, payer), key, value, mint=mint)
            purse = await escrow.purse(key.address)
            facts = {"key": key.address, "deposited": str(value), "free": str(purse.free), "owner": purse.owner, "tx": tx}
            if as_json:
                show_json(facts)
            else:
                done = "nothing to deposit" if nothing else f"deposited {format_amount(value)}"
                step(f"{done}; the purse of {key.address} has {format_amount(purse.free)} free")

    asyncio.run(run())


async def limit_of(escrow: Escrow, key: Address) -> Amount:
    """The most that a key can spend, but for what is leaving: free and reserved money of its purse. Raises Unavailable."""
    purse = await escrow.purse(key)
    tabs = [await escrow.tab(key, one) for one in await providers_of(escrow, key)] if purse.owner else []
    return Amount(purse.free - purse.thawing + sum(tab.reserved for tab in tabs))


async def fill_purse(escrow: Escrow, sender: Sender, key: Signer, value: Amount, *, mint: bool = False) -> str:
    """Opens the purse of `key` for the sender if need be and deposits; the transaction's hash. Raises TallyError."""
    if value <= 0:
        raise BadMessage("amount: a deposit is more than nothing")
    purse = await escrow.purse(key.address)
    if purse.owner is not None and purse.owner != sender.address:
        raise Refusal(Code.BAD_MESSAGE, f"the purse of {key.address} belongs to {purse.owner}, not to {sender.address}")
    await require_coins(escrow, sender.address)
    if mint:
        await escrow.token.mint(sender, sender.address, value)
    held = await escrow.token.balance_of(sender.address)
    if held < value:
        have = f"{sender.address} holds {format_amount(held)} dollars (token {escrow.token.address}), not {format_amount(value)}"
        raise Refusal(Code.INSUFFICIENT_FUNDS, f"{have}: send it some; on a local chain --mint makes them")
    if purse.owner is None:
        bind = key.sign(Bind(key=key.address, owner=sender.address), escrow.deployment.domain)
        await escrow.open_purse(sender, key.address, sender.address, bind)
    deadline = Seconds(await escrow.rpc.now() + PERMIT_SECONDS)
    permit = await escrow.token.permit(sender.signer, escrow.deployment.escrow, value, deadline)
    return (await escrow.deposit_with_permit(sender, key.address, permit)).hash


def balance(
    wallet: Wallet = DEFAULT_WALLET,
    account: Annotated[str | None, typer.Option("--address", help="Look at this address instead of a wallet.")] = None,
    provider: Annotated[list[str] | None, typer.Option(help="Also show the tab with this provider (repeatable).")] = None,
    every: Annotated[
        bool, typer.Option("--all-tabs", help="Look for every tab in the contract's events too; slow where the chain is long.")
    ] = False,
    config: Config = None,
    deployment: DeploymentFile = None,
    rpc: Rpc = None,
    as_json: Json = False,
) -> None:
    """Shows where an account's money is and how to get it back: wallet, purse, jobs under way, reservations, credit.

    Providers are those of this machine's ledger (of --config) and those named. Needs no password.
    """
    from tallystick.client.config import load_config

    address = parse_address(account) if account else account_of(wallet, "--wallet")
    providers = [account_of(one, "--provider") for one in provider or []]
    loaded = load_config(config)

    async def run() -> None:
        async with open_escrow(deployment or loaded.deployment, rpc or loaded.rpc) as escrow:
            accounts = await _accounts(loaded, address, escrow.deployment.domain)
            found = await providers_of(escrow, address) if every else []
            named = dict.fromkeys([*accounts, *providers, *found])
            now = await escrow.rpc.now()
            tabs = [(one, await escrow.tab(address, one), accounts.get(one)) for one in named]
            places = await places_of(escrow, address, tabs, idle_before=now - loaded.idle_reserve_days * DAY)
        if as_json:
            show_json({"address": address, "places": places})
        else:
            told = [place for place in places if int(place["amount"]) or place["place"] in ("wallet", "purse, free")]
            rows = [(place["place"], format_amount(int(place["amount"])), place["how"]) for place in told]
            show_rows(("where", "amount", "how to get it"), rows, title=f"Balance of {address}")

    asyncio.run(run())


async def providers_of(escrow: Escrow, payer: Address) -> list[Address]:
    """Every provider that a payer ever had a tab with, from the contract's events. Raises Unavailable."""
    from tallystick.chain.events import Reserved, Settled, read_events

    cursor, found = escrow.deployment.block, dict[Address, None]()
    while (page := await read_events(escrow.rpc, escrow.deployment, cursor)).cursor != cursor:
        cursor = page.cursor
        found |= {one.provider: None for one in page.events if isinstance(one, Reserved | Settled) and one.payer == payer}
    return list(found)


async def _accounts(config: ClientConfig, payer: Address, domain: Domain) -> dict[Address, Account]:
    """This machine's accounts of a payer, if it has a ledger here."""
    from tallystick.client.ledger.ledger import Ledger

    path = config.ledger_path(payer)
    if not path.exists():
        return {}
    ledger = await Ledger.open(path, payer)
    try:
        return {account.provider: account for account in await ledger.accounts(domain, int(time.time()))}
    finally:
        await ledger.close()


async def places_of(
    escrow: Escrow, address: Address, tabs: Sequence[tuple[Address, TabState, Account | None]], *, idle_before: int = 0
) -> list[dict[str, Any]]:
    """Every place where an account's money can sit, in base units. What jobs under way may cost, and what providers can collect,
    is part of what is reserved for them and of what is free; it is told beside that. Raises Unavailable.
    """
    purse = await escrow.purse(address)
    account = await escrow.provider(address)
    held = await escrow.token.balance_of(address)
    places: list[tuple[str, int, str]] = [
        ("wallet", held, "it is yours"),
        ("purse, free", purse.free - purse.thawing, "tally thaw AMOUNT, wait, tally withdraw"),
        ("purse, thawing", purse.thawing, _after(purse.thaw_at, "tally withdraw")),
    ]
    for provider, tab, known in tabs:
        idle = known is not None and tab.reserved and not known.in_flight and known.used_at < idle_before
        since = f"not used since {time.strftime('%F', time.localtime(known.used_at))}: " if idle and known else ""
        places.append((f"reserved for {provider}", tab.reserved, since + _released(provider, tab.release_at)))
        if known is not None:
            places.append((f"within the above: in flight with {provider}", known.in_flight, "free when the jobs end"))
            owed = max(known.billed - tab.settled, 0)
            places.append((f"within the above: owed to {provider}", owed, "it is theirs, and leaves when they collect"))
    places += [
        ("credit as provider or coordinator", account.credit, f"tally cash-out pays it to {account.payout}"),
        ("stake", account.stake, "tally unstake AMOUNT, wait, tally unstake"),
        ("stake, leaving", account.unstaking, _after(account.unstake_at, "tally unstake")),
    ]
    return [{"place": place, "amount": str(int(amount)), "how": how} for place, amount, how in places]


def _after(at: int, command: str) -> str:
    return f"{command}, from {time.strftime('%F %T', time.localtime(at))} on" if at else "-"


def _released(provider: Address, at: int) -> str:
    again = _after(at, f"tally release {provider}")
    return again if at else f"tally release {provider}, wait, the same again; or the provider gives it back"
