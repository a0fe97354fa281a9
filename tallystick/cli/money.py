"""`tally deposit`, `tally balance`: a payer's money, and where every unit of it is."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tallystick.cli.onchain import open_escrow, require_coins
from tallystick.cli.options import (
    DEFAULT_WALLET,
    DeploymentFile,
    Json,
    PasswordFile,
    Rpc,
    Wallet,
    keystore_path,
    unlock,
)
from tallystick.cli.output import show_json, show_rows, step
from tallystick.protocol.errors import BadMessage, Code, Refusal
from tallystick.protocol.messages import Bind
from tallystick.protocol.types import Address, Amount, Seconds, format_amount, parse_address, parse_amount
from tallystick.runtime.keys import keystore_address

if TYPE_CHECKING:
    from tallystick.chain.escrow import Escrow
    from tallystick.chain.rpc import Sender
    from tallystick.protocol.eip712 import Signer

PERMIT_SECONDS = 3_600


def deposit(
    amount: Annotated[str, typer.Argument(help="Dollars to deposit, for example 10 or 2.50.")],
    wallet: Wallet = DEFAULT_WALLET,
    owner: Annotated[str | None, typer.Option(help="Wallet that owns and fills the purse; the same wallet by default.")] = None,
    mint: Annotated[bool, typer.Option(help="Mint the test dollars first (local chains only).")] = False,
    password_file: PasswordFile = None,
    deployment: DeploymentFile = None,
    rpc: Rpc = None,
    as_json: Json = False,
) -> None:
    """Fills a wallet's purse, from which its jobs are paid. The first deposit opens the purse and binds it to its owner."""
    from tallystick.chain.rpc import Sender

    value = parse_amount(amount)
    key = unlock(wallet, password_file)
    payer = key if owner is None else unlock(owner, password_file)

    async def run() -> None:
        async with open_escrow(deployment, rpc) as escrow:
            tx = await fill_purse(escrow, Sender(escrow.rpc, payer), key, value, mint=mint)
            purse = await escrow.purse(key.address)
            facts = {"key": key.address, "deposited": str(value), "free": str(purse.free), "owner": purse.owner, "tx": tx}
            if as_json:
                show_json(facts)
            else:
                step(f"deposited {format_amount(value)}; the purse of {key.address} has {format_amount(purse.free)} free")

    asyncio.run(run())


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
        raise Refusal(Code.INSUFFICIENT_FUNDS, f"{sender.address} holds {format_amount(held)}, not {format_amount(value)}")
    if purse.owner is None:
        bind = key.sign(Bind(key=key.address, owner=sender.address), escrow.deployment.domain)
        await escrow.open_purse(sender, key.address, sender.address, bind)
    deadline = Seconds(int(time.time()) + PERMIT_SECONDS)
    permit = await escrow.token.permit(sender.signer, escrow.deployment.escrow, value, deadline)
    return (await escrow.deposit_with_permit(sender, key.address, permit)).hash


def balance(
    wallet: Wallet = DEFAULT_WALLET,
    account: Annotated[str | None, typer.Option("--address", help="Look at this address instead of a wallet.")] = None,
    provider: Annotated[list[str] | None, typer.Option(help="Also show the tab with this provider (repeatable).")] = None,
    deployment: DeploymentFile = None,
    rpc: Rpc = None,
    as_json: Json = False,
) -> None:
    """Shows where an account's money is and how to get it back: wallet, purse, reservations, credit. Needs no password."""
    address = parse_address(account) if account else parse_address(keystore_address(keystore_path(wallet)))
    providers = [parse_address(one, "--provider") for one in provider or []]

    async def run() -> None:
        async with open_escrow(deployment, rpc) as escrow:
            places = await places_of(escrow, address, providers)
        if as_json:
            show_json({"address": address, "places": places})
        else:
            rows = [(place["place"], format_amount(int(place["amount"])), place["how"]) for place in places]
            show_rows(("where", "amount", "how to get it"), rows, title=f"Balance of {address}")

    asyncio.run(run())


async def places_of(escrow: Escrow, address: Address, providers: list[Address]) -> list[dict[str, Any]]:
    """Every place where an account's money can sit, in base units. Raises Unavailable."""
    purse = await escrow.purse(address)
    account = await escrow.provider(address)
    tabs = [(one, await escrow.tab(address, one)) for one in providers]
    held = await escrow.token.balance_of(address)
    thaw = f"until {time.strftime('%F %T', time.localtime(purse.thaw_at))}, then the owner withdraws" if purse.thaw_at else "none"
    places: list[tuple[str, int, str]] = [
        ("wallet", held, "it is yours"),
        ("purse, free", purse.free - purse.thawing, "the owner thaws it, waits, withdraws"),
        ("purse, thawing", purse.thawing, thaw),
        *((f"reserved for {one}", tab.reserved, "release the tab, or the provider gives it back") for one, tab in tabs),
        ("credit as provider or coordinator", account.credit, f"cash out to {account.payout}"),
        ("stake", account.stake, "unstake, wait, withdraw"),
    ]
    return [{"place": place, "amount": str(int(amount)), "how": how} for place, amount, how in places]
