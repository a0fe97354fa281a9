"""`tally wallet rotate`: moves the money of one hot key to another key of the same owner.

The state on chain determines the next step, so the command can be interrupted anywhere and repeated later. Only the block from
which withdrawals and deposits are counted is kept, in the home folder.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tallystick.cli.money.purse import fund_purse, providers_with_tabs
from tallystick.cli.onchain import open_escrow, parse_account, require_gas
from tallystick.cli.options import DeploymentFile, Json, PasswordFile, Rpc, complete_wallets, unlock
from tallystick.cli.output import dollars, note, show_json, step
from tallystick.protocol.errors import BadMessage, Code, Refusal, Unavailable
from tallystick.protocol.messages import Bind
from tallystick.protocol.types import Address, Amount
from tallystick.runtime.config import home
from tallystick.runtime.keystore import write_private

if TYPE_CHECKING:
    from tallystick.chain.escrow import Escrow
    from tallystick.chain.sender import Sender
    from tallystick.protocol.eip712 import Signer


@dataclass(slots=True)
class Progress:
    """What one run did. `continue_at`: chain time at which the next run can do more; 0 if no wait is running. `moved`: base units
    withdrawn from the old purse in all runs.
    """

    done: list[str] = field(default_factory=list)
    continue_at: int = 0
    moved: int = 0
    finished: bool = False

    def wait(self, at: int) -> None:
        """Notes a wait; the earliest one counts."""
        self.continue_at = min(at, self.continue_at or at)


def rotate(
    old: Annotated[str, typer.Argument(help="Wallet that signs now: its name or address.", autocompletion=complete_wallets)],
    new: Annotated[str, typer.Argument(help="Existing wallet that will sign instead.", autocompletion=complete_wallets)],
    owner: Annotated[
        str, typer.Option(help="Wallet that owns the old purse; it will own the new one.", autocompletion=complete_wallets)
    ],
    password_file: PasswordFile = None,
    deployment: DeploymentFile = None,
    rpc: Rpc = None,
    as_json: Json = False,
) -> None:
    """Move a purse to another hot key of the same owner: release, thaw, withdraw, bind the new key, deposit.

    The steps have waiting times: repeat the command when it says so, until it reports that it is done. First stop the programs
    that sign with the old key, or give them the new wallet: the old purse pays the old key's orders until the money has left.
    """
    old_key = parse_account(old, "OLD")
    if parse_account(new, "NEW") == old_key:
        raise BadMessage("NEW: expected another key than OLD, got the same key")

    async def run() -> tuple[Progress, int]:
        from tallystick.cli.transactions import ShownSender

        async with open_escrow(deployment, rpc) as escrow:
            await _check_owner(escrow, old_key, parse_account(owner, "--owner"))
            payer, signer = unlock(owner, password_file), unlock(new, password_file)
            await require_gas(escrow, payer.address)
            return await _advance(escrow, ShownSender(escrow.rpc, payer), old_key, signer), await escrow.rpc.now()

    progress, now = asyncio.run(run())
    if as_json:
        result = {"done": progress.done, "moved": str(progress.moved), "finished": progress.finished}
        show_json(result | {"continueAt": progress.continue_at or None})
        return
    from tallystick.chain.state_explainer import moment

    for text in progress.done:
        step(text)
    if progress.finished:
        step(f"done: {dollars(progress.moved)} moved; the purse of {old_key} is empty")
    else:
        when = moment(progress.continue_at, now) if progress.continue_at else "now"
        note(f"not done yet: repeat the command {when}")


async def _check_owner(escrow: Escrow, old: Address, owner: Address) -> None:
    """Raises Refusal if `owner` does not own the old purse, or is the hot key itself."""
    purse = await escrow.purse(old)
    if purse.owner is None:
        raise Refusal(Code.CHAIN_REFUSED, f"{old} has no purse, so there is nothing to move: use the new wallet")
    if purse.owner != owner:
        raise Refusal(Code.CHAIN_REFUSED, f"--owner: the purse of {old} belongs to {purse.owner}, got {owner}; name that wallet")
    if owner == old:
        raise Refusal(
            Code.CHAIN_REFUSED,
            f"{old} owns its own purse, so there is no owner to keep. Take the money out (tally thaw all, tally withdraw), send "
            "it to a wallet that signs nothing else, and open the purse with that: tally deposit AMOUNT --wallet NEW --owner ONE",
        )


async def _advance(escrow: Escrow, sender: Sender, old: Address, new: Signer) -> Progress:
    """Does every step that is possible now. Raises TallyError; the next run continues from the state on chain."""
    progress = Progress()
    record = _record_path(escrow, old, new.address)
    since = _read_start_block(record) or await escrow.rpc.block_number() + 1
    write_private(record, json.dumps({"since": since}).encode())
    await _bind(escrow, sender, new, progress)
    await _release(escrow, sender, old, progress)
    await _thaw(escrow, sender, old, progress)
    withdrawn, deposited = await _totals(escrow, old, new.address, since)
    due = Amount(min(withdrawn - deposited, await escrow.token.balance_of(sender.address)))
    if due > 0:
        await fund_purse(escrow, sender, new, due)
        progress.done.append(f"deposited {dollars(due)} for {new.address}")
    progress.moved = withdrawn
    purse = await escrow.purse(old)
    progress.finished = not progress.continue_at and not purse.free and deposited + max(due, 0) >= withdrawn
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
        raise Refusal(Code.CHAIN_REFUSED, f"NEW: the purse of {new.address} belongs to {purse.owner}; use another wallet")


async def _release(escrow: Escrow, sender: Sender, old: Address, progress: Progress) -> None:
    """Announces the release of every reservation, and completes those whose wait is over."""
    now = await escrow.rpc.now()
    for provider in await providers_with_tabs(escrow, old):
        tab = await escrow.tab(old, provider)
        if tab.release_at and tab.release_at <= now:
            await escrow.finish_release(sender, old, provider)
            progress.done.append(f"released {dollars(tab.reserved)} from {provider}")
        elif tab.release_at:
            progress.wait(tab.release_at)
        elif tab.reserved:
            await escrow.release(sender, old, provider)
            progress.done.append(f"announced the release of {dollars(tab.reserved)} reserved for {provider}")
            progress.wait((await escrow.tab(old, provider)).release_at)


async def _thaw(escrow: Escrow, sender: Sender, old: Address, progress: Progress) -> None:
    """Withdraws thawed money, and announces the thaw of the rest that is free."""
    purse = await escrow.purse(old)
    if purse.thawing and purse.thaw_at <= await escrow.rpc.now():
        await escrow.withdraw(sender, old)
        progress.done.append(f"withdrew {dollars(purse.thawing)} to {sender.address}")
        purse = await escrow.purse(old)
    if purse.free and not purse.thawing:
        await escrow.thaw(sender, old, purse.free)
        progress.done.append(f"announced the thaw of {dollars(purse.free)} in the purse of {old}")
        purse = await escrow.purse(old)
    if purse.thawing:
        progress.wait(purse.thaw_at)


async def _totals(escrow: Escrow, old: Address, new: Address, since: int) -> tuple[int, int]:
    """Base units withdrawn from the old purse and deposited into the new one since a block. Raises Unavailable."""
    from tallystick.chain.event_reader import read_events
    from tallystick.chain.events import Deposited, Withdrawn

    withdrawn, deposited, cursor, head = 0, 0, since, await escrow.rpc.block_number()
    while (page := await read_events(escrow.rpc, escrow.deployment, cursor)).cursor != cursor:
        cursor = page.cursor
        withdrawn += sum(event.amount for event in page.events if isinstance(event, Withdrawn) and event.key == old)
        deposited += sum(event.amount for event in page.events if isinstance(event, Deposited) and event.key == new)
    if cursor <= head:
        raise Unavailable(Code.CHAIN_UNAVAILABLE, "the chain changed while its events were read; repeat the command")
    return withdrawn, deposited


def _record_path(escrow: Escrow, old: Address, new: Address) -> Path:
    deployment = f"{escrow.deployment.chain_id}-{escrow.deployment.escrow}"
    return home() / "rotations" / f"{deployment}-{old}-{new}.json"


def _read_start_block(record: Path) -> int:
    """The block from which to count; 0 if no rotation has begun. Raises BadMessage."""
    if not record.exists():
        return 0
    try:
        return int(json.loads(record.read_bytes())["since"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise BadMessage(
            f"{record}: damaged ({error}). Remove it and repeat the command; money withdrawn before that must be "
            "deposited by hand"
        ) from None
