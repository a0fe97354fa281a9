"""`tally wallet rotate`: the money of one hot key goes to another, of the same owner, whose key stays as it is.

What is on chain says what is to be done next, so it can be cut off anywhere and given again, also days later. Only from which
block on it counts what went out and came in is kept, in the home folder.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tallystick.cli.money.balance import fill_purse, providers_of
from tallystick.cli.onchain import account_of, open_escrow, require_coins
from tallystick.cli.options import DeploymentFile, Json, PasswordFile, Rpc, unlock, wallets
from tallystick.cli.output import err, show_json, step
from tallystick.protocol.errors import BadMessage, Code, Refusal, Unavailable
from tallystick.protocol.messages import Bind
from tallystick.protocol.types import Address, Amount, format_amount
from tallystick.runtime.config import home
from tallystick.runtime.keystore import write_private

if TYPE_CHECKING:
    from tallystick.chain.escrow import Escrow
    from tallystick.chain.sender import Sender
    from tallystick.protocol.eip712 import Signer


@dataclass(slots=True)
class Progress:
    """What this run did, when the next can do more (0: no wait runs), and how much has moved in all."""

    done: list[str] = field(default_factory=list)
    again_at: int = 0
    moved: int = 0
    finished: bool = False

    def wait(self, at: int) -> None:
        """Until the first wait is over."""
        self.again_at = min(at, self.again_at or at)


def rotate(
    old: Annotated[str, typer.Argument(help="The wallet that signs now; an address will do.", autocompletion=wallets)],
    new: Annotated[str, typer.Argument(help="The wallet to sign from now on; it exists.", autocompletion=wallets)],
    owner: Annotated[
        str, typer.Option(help="The wallet that owns the old purse; it will own the new one.", autocompletion=wallets)
    ],
    password_file: PasswordFile = None,
    deployment: DeploymentFile = None,
    rpc: Rpc = None,
    as_json: Json = False,
) -> None:
    """Moves a purse to another hot key of the same owner: takes back, thaws, withdraws, binds the new key, deposits.

    Waits lie between: give the same command again when it says so, until it says that it is done. First stop what signs with the
    old key, or give it the new wallet: until the money is out, orders that the old key signs are still paid from it.
    """
    leaving = account_of(old, "OLD")
    if account_of(new, "NEW") == leaving:
        raise BadMessage("NEW: is the same key as OLD")

    async def run() -> tuple[Progress, int]:
        from tallystick.chain.sender import Sender

        async with open_escrow(deployment, rpc) as escrow:
            holder = account_of(owner, "--owner")
            await _check(escrow, leaving, holder)
            payer, signer = unlock(owner, password_file), unlock(new, password_file)
            await require_coins(escrow, payer.address)
            return await _advance(escrow, Sender(escrow.rpc, payer), leaving, signer), await escrow.rpc.now()

    progress, now = asyncio.run(run())
    if as_json:
        told = {"done": progress.done, "moved": str(progress.moved), "finished": progress.finished}
        show_json(told | {"again_at": progress.again_at or None})
        return
    from tallystick.chain.state_explainer import moment

    for one in progress.done:
        step(one)
    if progress.finished:
        step(f"done: {format_amount(Amount(progress.moved))} dollars moved; the purse of {leaving} is empty")
    else:
        when = moment(progress.again_at, now) if progress.again_at else "now"
        err.print(f"not done yet: give the same command again {when}", highlight=False, soft_wrap=True)


async def _check(escrow: Escrow, old: Address, owner: Address) -> None:
    """Raises Refusal where the owner is not the owner, or is the hot key itself."""
    purse = await escrow.purse(old)
    if purse.owner is None:
        raise Refusal(Code.CHAIN_REFUSED, f"{old} has no purse, so there is nothing to move: use the new wallet")
    if purse.owner != owner:
        raise Refusal(Code.CHAIN_REFUSED, f"the purse of {old} belongs to {purse.owner}, not to {owner}; name that wallet")
    if owner == old:
        raise Refusal(
            Code.CHAIN_REFUSED,
            f"{old} owns its own purse, so there is no owner to keep. Take the money out (tally thaw all, tally withdraw), send "
            "it to a wallet that signs nothing else, and open the purse with that: tally deposit AMOUNT --wallet NEW --owner ONE",
        )


async def _advance(escrow: Escrow, sender: Sender, old: Address, new: Signer) -> Progress:
    """Does all that can be done now. Raises TallyError; what was done until then is found again."""
    progress = Progress()
    record = _record(escrow, old, new.address)
    since = _since(record) or await escrow.rpc.block_number() + 1
    write_private(record, json.dumps({"since": since}).encode())
    await _bind(escrow, sender, new, progress)
    await _release(escrow, sender, old, progress)
    await _thaw(escrow, sender, old, progress)
    gone, come = await _counted(escrow, old, new.address, since)
    due = Amount(min(gone - come, await escrow.token.balance_of(sender.address)))
    if due > 0:
        await fill_purse(escrow, sender, new, due)
        progress.done.append(f"deposited {format_amount(due)} for {new.address}")
    progress.moved = gone
    purse = await escrow.purse(old)
    progress.finished = not progress.again_at and not purse.free and come + max(due, 0) >= gone
    if progress.finished:
        record.unlink()
    return progress


async def _bind(escrow: Escrow, sender: Sender, new: Signer, progress: Progress) -> None:
    purse = await escrow.purse(new.address)
    if purse.owner is None:
        bind = new.sign(Bind(key=new.address, owner=sender.address), escrow.deployment.domain)
        await escrow.open_purse(sender, new.address, sender.address, bind)
        progress.done.append(f"bound {new.address} to {sender.address}")
    elif purse.owner != sender.address:
        raise Refusal(Code.CHAIN_REFUSED, f"the purse of {new.address} belongs to {purse.owner}; take another wallet")


async def _release(escrow: Escrow, sender: Sender, old: Address, progress: Progress) -> None:
    """Takes back what is reserved: announced first, done after the wait."""
    now = await escrow.rpc.now()
    for provider in await providers_of(escrow, old):
        tab = await escrow.tab(old, provider)
        if tab.release_at and tab.release_at <= now:
            await escrow.finish_release(sender, old, provider)
            progress.done.append(f"took back {format_amount(tab.reserved)} from {provider}")
        elif tab.release_at:
            progress.wait(tab.release_at)
        elif tab.reserved:
            await escrow.release(sender, old, provider)
            progress.done.append(f"announced that the reservation of {format_amount(tab.reserved)} for {provider} ends")
            progress.wait((await escrow.tab(old, provider)).release_at)


async def _thaw(escrow: Escrow, sender: Sender, old: Address, progress: Progress) -> None:
    """Withdraws what has thawed, and announces the rest that is free."""
    purse = await escrow.purse(old)
    if purse.thawing and purse.thaw_at <= await escrow.rpc.now():
        await escrow.withdraw(sender, old)
        progress.done.append(f"withdrew {format_amount(purse.thawing)} to {sender.address}")
        purse = await escrow.purse(old)
    if purse.free and not purse.thawing:
        await escrow.thaw(sender, old, purse.free)
        progress.done.append(f"announced that {format_amount(purse.free)} leave the purse of {old}")
        purse = await escrow.purse(old)
    if purse.thawing:
        progress.wait(purse.thaw_at)


async def _counted(escrow: Escrow, old: Address, new: Address, since: int) -> tuple[int, int]:
    """What left the old purse and what came into the new one from that block on, in base units. Raises Unavailable."""
    from tallystick.chain.events import Deposited, Withdrawn, read_events

    gone, come, cursor, head = 0, 0, since, await escrow.rpc.block_number()
    while (page := await read_events(escrow.rpc, escrow.deployment, cursor)).cursor != cursor:
        cursor = page.cursor
        gone += sum(one.amount for one in page.events if isinstance(one, Withdrawn) and one.key == old)
        come += sum(one.amount for one in page.events if isinstance(one, Deposited) and one.key == new)
    if cursor <= head:
        raise Unavailable(Code.CHAIN_UNAVAILABLE, "the chain changed while it was read; give the same command again")
    return gone, come


def _record(escrow: Escrow, old: Address, new: Address) -> Path:
    where = f"{escrow.deployment.chain_id}-{escrow.deployment.escrow}"
    return home() / "rotations" / f"{where}-{old}-{new}.json"


def _since(record: Path) -> int:
    """From where on to count; 0 where nothing was begun. Raises BadMessage."""
    if not record.exists():
        return 0
    try:
        return int(json.loads(record.read_bytes())["since"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise BadMessage(f"{record}: damaged ({error}); remove it: then only what leaves from now on is deposited") from None
