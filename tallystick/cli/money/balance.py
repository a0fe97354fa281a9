"""`tally deposit` and `tally balance`: fund a purse, and show where an account's money is."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tallystick.cli.money.debts import ledger_accounts
from tallystick.cli.money.purse import Owner, fund_purse, parse_positive, providers_with_tabs, spendable
from tallystick.cli.onchain import open_escrow, parse_account
from tallystick.cli.options import DEFAULT_WALLET, Config, DeploymentFile, Json, PasswordFile, Rpc, Wallet, unlock
from tallystick.cli.output import dollars, json_fields, show_json, show_table, step
from tallystick.protocol.errors import BadMessage
from tallystick.protocol.types import Address, Amount, format_amount, parse_address, parse_amount

if TYPE_CHECKING:
    from tallystick.chain.escrow import Escrow, TabState
    from tallystick.client.ledger.accounts import Account

DAY_SECONDS = 86_400


def deposit(
    amount: Annotated[str | None, typer.Argument(help="Dollars to deposit, for example 10 or 2.50.")] = None,
    top_up_to: Annotated[
        str | None,
        typer.Option(
            "--top-up-to", help="Instead of AMOUNT: deposit what the purse (with reservations) has less than this, in dollars."
        ),
    ] = None,
    wallet: Wallet = DEFAULT_WALLET,
    owner: Owner = None,
    mint: Annotated[bool, typer.Option("--mint", help="Make the test dollars first (local chains only).")] = False,
    password_file: PasswordFile = None,
    coordinator: Annotated[
        str | None,
        typer.Option("--coordinator", help="Coordinator of the market, which tells its contract if there is no deployment file."),
    ] = None,
    deployment: DeploymentFile = None,
    rpc: Rpc = None,
    as_json: Json = False,
) -> None:
    """Deposit dollars into a wallet's purse, which pays for its jobs. The first deposit opens the purse and binds it to its
    owner.

    The wallet can spend no more than its purse has. `--top-up-to 5`, run daily, limits a hot key to five dollars. Without a
    deployment file, the market's contract is asked of its coordinator and checked on the chain.
    """
    from tallystick.cli.transactions import ShownSender

    if (amount is None) is (top_up_to is None):
        raise BadMessage("expected either AMOUNT or --top-up-to")
    requested = parse_amount(str(top_up_to), field="--top-up-to") if amount is None else parse_positive(amount)
    key = unlock(wallet, password_file)
    payer = key if owner is None else unlock(owner, password_file)

    async def run() -> None:
        async with open_escrow(deployment, rpc, coordinator=coordinator) as escrow:
            value = requested
            if top_up_to is not None:
                value = Amount(max(0, requested - await spendable(escrow, key.address)))
            tx = await fund_purse(escrow, ShownSender(escrow.rpc, payer), key, value, mint=mint) if value else None
            purse = await escrow.purse(key.address)
            if as_json:
                fields = {"key": key.address, "deposited": value, "free": purse.free, "owner": purse.owner, "tx": tx}
                show_json(json_fields(fields))
            else:
                result = f"deposited {dollars(value)}" if value else "nothing to deposit"
                step(f"{result}; the purse of {key.address} has {dollars(purse.free)} free")

    asyncio.run(run())


def balance(
    wallet: Wallet = DEFAULT_WALLET,
    account: Annotated[str | None, typer.Option("--address", help="Show this address instead of a wallet.")] = None,
    provider: Annotated[
        list[str] | None, typer.Option(help="Also show the tab with this provider: an address or a wallet name (repeatable).")
    ] = None,
    all_tabs: Annotated[
        bool, typer.Option("--all-tabs", "--all", help="Also find every tab in the contract's events; slow on a long chain.")
    ] = False,
    config: Config = None,
    deployment: DeploymentFile = None,
    rpc: Rpc = None,
    as_json: Json = False,
) -> None:
    """Show where an account's money is and how to get it back: wallet, purse, running jobs, reservations, credit, stake.

    Shows tabs with the providers in this machine's ledger and with those named by --provider. Needs no password.
    """
    from tallystick.client.config import load_config

    address = parse_address(account) if account else parse_account(wallet, "--wallet")
    named = [parse_account(text, "--provider") for text in provider or []]
    loaded = load_config(config)

    async def run() -> None:
        async with open_escrow(deployment or loaded.deployment, rpc or loaded.rpc) as escrow:
            accounts = await ledger_accounts(loaded, address, escrow.deployment.domain)
            on_chain = await providers_with_tabs(escrow, address) if all_tabs else []
            now = await escrow.rpc.now()
            tabs = [
                (peer, await escrow.tab(address, peer), accounts.get(peer))
                for peer in dict.fromkeys([*accounts, *named, *on_chain])
            ]
            places = await places_of(escrow, address, tabs, idle_before=now - loaded.idle_reserve_days * DAY_SECONDS)
        if as_json:
            show_json({"address": address, "places": places})
        else:
            shown = [place for place in places if int(place["amount"]) or place["place"] in ("wallet", "purse, free")]
            rows = [(place["place"], format_amount(int(place["amount"])), place["how"]) for place in shown]
            show_table(("where", "dollars", "how to get it"), rows, title=f"Balance of {address}")

    asyncio.run(run())


async def places_of(
    escrow: Escrow, address: Address, tabs: Sequence[tuple[Address, TabState, Account | None]], *, idle_before: int = 0
) -> list[dict[str, Any]]:
    """Every place where an account's money can be, in base units. What running jobs may cost and what providers can collect is
    contained in the reserved and free amounts, and is listed separately as "within the above". Raises Unavailable.
    """
    purse = await escrow.purse(address)
    account = await escrow.provider(address)
    held = await escrow.token.balance_of(address)
    places: list[tuple[str, int, str]] = [
        ("wallet", held, "it is yours"),
        ("purse, free", purse.free - purse.thawing, "tally thaw AMOUNT, wait, tally withdraw"),
        ("purse, thawing", purse.thawing, _command_from("tally withdraw", purse.thaw_at)),
    ]
    for provider, tab, known in tabs:
        idle = known is not None and tab.reserved and not known.in_flight and known.used_at < idle_before
        since = f"not used since {time.strftime('%F', time.localtime(known.used_at))}: " if idle and known else ""
        places.append((f"reserved for {provider}", tab.reserved, since + _release_hint(provider, tab.release_at)))
        if known is not None:
            places.append((f"within the above: in flight with {provider}", known.in_flight, "free when the jobs end"))
            owed = max(known.billed - tab.settled, 0)
            places.append((f"within the above: owed to {provider}", owed, "belongs to the provider, which collects it"))
    places += [
        ("credit as provider or coordinator", account.credit, f"tally cash-out pays it to {account.payout}"),
        ("stake", account.stake, "tally unstake AMOUNT, wait, tally unstake"),
        ("stake, leaving", account.unstaking, _command_from("tally unstake", account.unstake_at)),
    ]
    return [{"place": place, "amount": str(int(amount)), "how": how} for place, amount, how in places]


def _command_from(command: str, at: int) -> str:
    return f"{command}, from {time.strftime('%F %T', time.localtime(at))} on" if at else "-"


def _release_hint(provider: Address, at: int) -> str:
    command = f"tally release {provider}"
    return _command_from(command, at) if at else f"{command}, wait, repeat it; or the provider runs: tally give-back"
