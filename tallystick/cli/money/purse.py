"""Purse operations that several commands share: funding, what a key can spend, amounts and checks of thaw and reserve."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from tallystick.cli.onchain import require_gas
from tallystick.cli.options import complete_wallets
from tallystick.cli.output import dollars, note
from tallystick.protocol.errors import BadMessage, Code, Refusal
from tallystick.protocol.messages import Bind
from tallystick.protocol.types import Address, Amount, Hash, Seconds, parse_amount

if TYPE_CHECKING:
    from tallystick.chain.endpoint import Rpc
    from tallystick.chain.escrow import Escrow
    from tallystick.chain.sender import Sender
    from tallystick.protocol.eip712 import Signer

PERMIT_SECONDS = 3_600
ALL = "all"

Owner = Annotated[
    str | None, typer.Option(help="Wallet that owns the purse; default: the --wallet itself.", autocompletion=complete_wallets)
]
ThawAmount = Annotated[str | None, typer.Argument(help='Dollars to take out, or "all" for the whole free amount.')]
CancelThaw = Annotated[bool, typer.Option("--cancel", help="Cancel the announced thaw instead.")]
ReserveAmount = Annotated[str, typer.Argument(help="Dollars to reserve, in addition to what is reserved already.")]


def parse_positive(text: str, field: str = "AMOUNT") -> Amount:
    """An amount of dollars above zero, in base units. Raises BadMessage."""
    amount = parse_amount(text, field=field)
    if amount == 0:
        raise BadMessage(f"{field}: expected more than 0 dollars, got {text}")
    return amount


def parse_amount_or_all(text: str | None) -> Amount | None:
    """An amount in base units; None means all there is. Raises BadMessage."""
    return None if text in (None, ALL) else parse_amount(str(text), field="AMOUNT")


def check_thaw_options(amount: str | None, *, cancel: bool) -> None:
    """Raises BadMessage unless exactly one of AMOUNT and --cancel is given."""
    if cancel is (amount is not None):
        raise BadMessage('expected either AMOUNT ("all" for the whole free amount) or --cancel')


async def announce_restart(rpc: Rpc, earlier: Amount, at: Seconds, command: str, *, ask: bool) -> None:
    """Says that another announcement replaces a waiting one of `earlier` base units, and that the wait begins anew.

    `command` pays the earlier amount out. With `ask`, a person at a terminal is asked first, and typer.Abort ends the command.
    """
    if not earlier:
        return
    from tallystick.chain.state_explainer import moment

    now = await rpc.now()
    due = f"can be paid out now ({command})" if at <= now else f"can be paid out {moment(at, now)}"
    note(
        f"{dollars(earlier)} announced before {due}. This announcement replaces it, and the wait begins anew for the whole amount"
    )
    if ask and sys.stdin.isatty():
        typer.confirm("Begin the wait anew?", default=False, abort=True, err=True)


def require_free(amount: Amount, free: Amount, key: Address, remedy: str) -> None:
    """Raises Refusal unless `amount` is above zero and at most the free part of the key's purse."""
    if not 0 < amount <= free:
        raise Refusal(
            Code.INSUFFICIENT_FUNDS,
            f"AMOUNT: expected more than 0 and at most {dollars(free)}, which the purse of {key} has free, got "
            f"{dollars(amount)}. "
            f"{remedy}",
        )


async def fund_purse(escrow: Escrow, sender: Sender, key: Signer, amount: Amount, *, mint: bool = False) -> str:
    """Deposits into the purse of `key`, which the sender owns; opens the purse if it does not exist. Returns the transaction's
    hash. With `mint`, makes the test dollars first. If the owner has no coins for gas and the key has, the owner signs and the
    key sends. Raises TallyError.
    """
    if amount <= 0:
        raise BadMessage("AMOUNT: expected more than 0 dollars, got 0")
    purse = await escrow.purse(key.address)
    if purse.owner is not None and purse.owner != sender.address:
        raise Refusal(
            Code.BAD_MESSAGE,
            f"the purse of {key.address} belongs to {purse.owner}, not to {sender.address}; name the owner's wallet with --owner",
        )
    owner, payer = sender.signer, await _gas_payer(escrow, sender, key)
    await require_gas(escrow, payer.address)
    if mint:
        await escrow.token.mint(payer, owner.address, amount)
    await require_tokens(escrow, owner.address, amount)
    if purse.owner is None:
        bind = key.sign(Bind(key=key.address, owner=owner.address), escrow.deployment.domain)
        await escrow.open_purse(payer, key.address, owner.address, bind)
    deadline = Seconds(await escrow.rpc.now() + PERMIT_SECONDS)
    if payer is sender:
        permit = await escrow.token.permit(owner, escrow.deployment.escrow, amount, deadline)
        return (await escrow.deposit_with_permit(sender, key.address, permit)).hash
    salt = Hash(os.urandom(32))
    signed = await escrow.token.authorize(owner, escrow.deployment.escrow, key.address, amount, salt, valid_before=deadline)
    return (await escrow.deposit_with_authorization(payer, key.address, signed)).hash


async def _gas_payer(escrow: Escrow, owner: Sender, key: Signer) -> Sender:
    """The wallet that sends a deposit: the owner's, or the purse's key if only that one has coins for gas."""
    from tallystick.cli.transactions import ShownSender

    if key.address == owner.address or await escrow.rpc.balance(owner.address) or not await escrow.rpc.balance(key.address):
        return owner
    return ShownSender(escrow.rpc, key)


async def require_tokens(escrow: Escrow, holder: Address, amount: Amount) -> None:
    """Raises Refusal if an account holds less of the settlement token than `amount`."""
    held = await escrow.token.balance_of(holder)
    if held < amount:
        raise Refusal(
            Code.INSUFFICIENT_FUNDS,
            f"{holder} holds {dollars(held)} (token {escrow.token.address}) and needs {dollars(amount)}: send it the difference; "
            "on a local chain --mint makes test dollars",
        )


async def spendable(escrow: Escrow, key: Address) -> Amount:
    """The most that a key can spend: free and reserved money of its purse, without what is thawing. Raises Unavailable."""
    purse = await escrow.purse(key)
    tabs = [await escrow.tab(key, provider) for provider in await providers_with_tabs(escrow, key)] if purse.owner else []
    return Amount(purse.free - purse.thawing + sum(tab.reserved for tab in tabs))


async def providers_with_tabs(escrow: Escrow, payer: Address) -> list[Address]:
    """Every provider that a payer ever had a tab with, from the contract's events. Raises Unavailable."""
    from tallystick.chain.event_reader import read_events
    from tallystick.chain.events import Reserved, Settled

    cursor, providers = escrow.deployment.block, dict[Address, None]()
    while (page := await read_events(escrow.rpc, escrow.deployment, cursor)).cursor != cursor:
        cursor = page.cursor
        providers |= {
            event.provider: None for event in page.events if isinstance(event, Reserved | Settled) and event.payer == payer
        }
    return list(providers)
