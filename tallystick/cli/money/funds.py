"""`tally thaw`, `withdraw`, `reserve`, `release`, `cash-out`, `stake` and `unstake`: moves of money on chain.

Moves with a waiting time take two runs: the first announces the move, the second completes it after the wait.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tallystick.cli.money.debts import warn_of_debts
from tallystick.cli.money.give_back import read_consent
from tallystick.cli.money.purse import (
    CancelThaw,
    Owner,
    ReserveAmount,
    ThawAmount,
    announce_restart,
    check_thaw_options,
    parse_amount_or_all,
    parse_positive,
    require_free,
    require_tokens,
)
from tallystick.cli.onchain import chain_option, open_escrow, parse_account, require_gas
from tallystick.cli.options import DEFAULT_WALLET, DeploymentFile, Json, PasswordFile, Provider, Rpc, Wallet, unlock
from tallystick.cli.output import dollars, json_fields, show_json, step
from tallystick.protocol.errors import BadMessage, Code, Refusal
from tallystick.protocol.types import Address, Amount, Seconds

if TYPE_CHECKING:
    from tallystick.chain.escrow import Escrow, Purse, TxResult
    from tallystick.chain.sender import Sender

Outcome = tuple[str, dict[str, Any]]
"""A sentence for people, and the fields for JSON."""


def thaw(
    amount: ThawAmount = None,
    cancel: CancelThaw = False,
    wallet: Wallet = DEFAULT_WALLET,
    owner: Owner = None,
    password_file: PasswordFile = None,
    deployment: DeploymentFile = None,
    rpc: Rpc = None,
    as_json: Json = False,
) -> None:
    """Announce that free money will leave the purse. After the waiting time, `tally withdraw` pays it out.

    Another announcement replaces the first one, and the wait begins anew.
    """
    check_thaw_options(amount, cancel=cancel)
    key, requested = parse_account(wallet, "--wallet"), parse_amount_or_all(amount)

    async def act(escrow: Escrow, sender: Sender) -> Outcome:
        purse = await _owned_purse(escrow, key, sender.address)
        if cancel:
            if not purse.thawing:
                raise Refusal(Code.CHAIN_REFUSED, f"--cancel: the purse of {key} has no thaw to cancel")
            tx = await escrow.cancel_thaw(sender, key)
            return f"{dollars(purse.thawing)} stay in the purse", _fields(tx, key=key, thawing=Amount(0))
        value = purse.free if requested is None else requested
        require_free(value, purse.free, key, "Money reserved for a provider becomes free with: tally release PROVIDER")
        owed = Amount(await warn_of_debts(escrow, key))
        await announce_restart(escrow.rpc, purse.thawing, purse.thaw_at, "tally withdraw", ask=not as_json)
        tx = await escrow.thaw(sender, key, value)
        at = (await escrow.purse(key)).thaw_at
        then = await _next_command(escrow, at, "tally withdraw")
        fields = _fields(tx, key=key, thawing=value, thaw_at=at, replaced=purse.thawing, owed=owed)
        return f"{dollars(value)} are thawing; {then}", fields

    _send(owner or wallet, password_file, deployment, rpc, act, as_json=as_json)


def withdraw(
    wallet: Wallet = DEFAULT_WALLET,
    owner: Owner = None,
    password_file: PasswordFile = None,
    deployment: DeploymentFile = None,
    rpc: Rpc = None,
    as_json: Json = False,
) -> None:
    """Pay thawed money to the purse's owner."""
    key = parse_account(wallet, "--wallet")

    async def act(escrow: Escrow, sender: Sender) -> Outcome:
        purse = await _owned_purse(escrow, key, sender.address)
        if not purse.thawing:
            raise Refusal(
                Code.CHAIN_REFUSED,
                f"nothing is thawing in the purse of {key}, which has {dollars(purse.free)} free: none was "
                "announced, or providers have collected it. Announce it with: tally thaw AMOUNT",
            )
        await _require_waited(escrow, purse.thaw_at, "the thaw")
        owed = Amount(await warn_of_debts(escrow, key))
        tx = await escrow.withdraw(sender, key)
        fields = _fields(tx, key=key, owner=sender.address, withdrawn=purse.thawing, owed=owed)
        return f"{dollars(purse.thawing)} were paid to {sender.address}", fields

    _send(owner or wallet, password_file, deployment, rpc, act, as_json=as_json)


def reserve(
    provider: Provider,
    amount: ReserveAmount,
    wallet: Wallet = DEFAULT_WALLET,
    owner: Owner = None,
    password_file: PasswordFile = None,
    deployment: DeploymentFile = None,
    rpc: Rpc = None,
    as_json: Json = False,
) -> None:
    """Reserve free money for one provider, so that no other can collect it. Cancels a running release."""
    key, payee = parse_account(wallet, "--wallet"), parse_account(provider, "PROVIDER")
    value = parse_positive(amount)

    async def act(escrow: Escrow, sender: Sender) -> Outcome:
        purse = await _owned_purse(escrow, key, sender.address)
        remedy = "Fill the purse: tally deposit AMOUNT" + (
            "; or keep what is thawing: tally thaw --cancel" if purse.thawing else ""
        )
        require_free(value, Amount(purse.free - purse.thawing), key, remedy)
        tx = await escrow.reserve(sender, key, payee, value)
        reserved = (await escrow.tab(key, payee)).reserved
        return f"{dollars(reserved)} are reserved for {payee}", _fields(tx, key=key, provider=payee, reserved=reserved)

    _send(owner or wallet, password_file, deployment, rpc, act, as_json=as_json)


def release(
    provider: Provider,
    consent: Annotated[
        Path | None,
        typer.Option(
            "--consent", help="The provider's signed consent (`tally give-back --consent`), which needs no waiting time."
        ),
    ] = None,
    wallet: Wallet = DEFAULT_WALLET,
    owner: Owner = None,
    password_file: PasswordFile = None,
    deployment: DeploymentFile = None,
    rpc: Rpc = None,
    as_json: Json = False,
) -> None:
    """Take back money reserved for a provider: the first run announces it, the second completes it after the waiting time."""
    key, payee = parse_account(wallet, "--wallet"), parse_account(provider, "PROVIDER")

    signed = None if consent is None else read_consent(consent, key, payee)

    async def act(escrow: Escrow, sender: Sender) -> Outcome:
        await _owned_purse(escrow, key, sender.address)
        tab = await escrow.tab(key, payee)
        if signed is not None:
            tx = await escrow.give_back_signed(sender, signed)
            rest = (await escrow.tab(key, payee)).reserved
            text = f"{dollars(tab.reserved - rest)} are free again; {dollars(rest)} stay reserved for {payee}"
            return text, _fields(tx, key=key, provider=payee, reserved=rest, released=not rest)
        if tab.release_at:
            await _require_waited(escrow, tab.release_at, "the release")
            tx = await escrow.finish_release(sender, key, payee)
            fields = _fields(tx, key=key, provider=payee, reserved=Amount(0), released=True)
            return f"{dollars(tab.reserved)} are free again", fields
        if not tab.reserved:
            raise Refusal(Code.CHAIN_REFUSED, f"nothing is reserved for {payee}: tally balance --provider {payee}")
        owed = Amount(await warn_of_debts(escrow, key, only=payee))
        tx = await escrow.release(sender, key, payee)
        at = (await escrow.tab(key, payee)).release_at
        then = await _next_command(escrow, at, f"tally release {provider}")
        text = f"the release of {dollars(tab.reserved)} is announced; until then {payee} can still collect them; {then}"
        return text, _fields(tx, key=key, provider=payee, reserved=tab.reserved, release_at=at, released=False, owed=owed)

    _send(owner or wallet, password_file, deployment, rpc, act, as_json=as_json)


def cash_out(
    account: Annotated[
        str | None, typer.Option(help="Account whose credit is paid: an address or a wallet name; default: the --wallet.")
    ] = None,
    set_payout: Annotated[
        str | None, typer.Option("--set-payout", help="Pay the wallet's credit to this address, now and in future.")
    ] = None,
    wallet: Wallet = DEFAULT_WALLET,
    password_file: PasswordFile = None,
    deployment: DeploymentFile = None,
    rpc: Rpc = None,
    as_json: Json = False,
) -> None:
    """Pay an account's credit (earned as provider, coordinator or reporter) to its payout address. Anyone may send it."""
    if account is not None and set_payout is not None:
        raise BadMessage("--set-payout: only the account itself can set its payout address; omit --account")
    payout = None if set_payout is None else parse_account(set_payout, "--set-payout")

    async def act(escrow: Escrow, sender: Sender) -> Outcome:
        payee = sender.address if account is None else parse_account(account, "--account")
        earned = await escrow.provider(payee)
        if not earned.credit:
            raise Refusal(
                Code.INSUFFICIENT_FUNDS,
                f"{payee} has no credit. Receipts become credit when their claims are settled on chain; a running node "
                "submits them by itself, `tally node collect` at once",
            )
        if payout is not None:
            await escrow.set_payout(sender, payout)
        tx, target = await escrow.cash_out(sender, payee), payout or earned.payout
        return f"{dollars(earned.credit)} were paid to {target}", _fields(tx, account=payee, payout=target, amount=earned.credit)

    _send(wallet, password_file, deployment, rpc, act, as_json=as_json)


def stake(
    amount: Annotated[str, typer.Argument(help="Dollars to add to the stake.")],
    mint: Annotated[bool, typer.Option("--mint", help="Make the test dollars first (local chains only).")] = False,
    wallet: Wallet = DEFAULT_WALLET,
    password_file: PasswordFile = None,
    deployment: DeploymentFile = None,
    rpc: Rpc = None,
    as_json: Json = False,
) -> None:
    """Add to a provider's stake, which it loses if it signs two contradicting receipts or claims more than its receipts."""
    value = parse_positive(amount)

    async def act(escrow: Escrow, sender: Sender) -> Outcome:
        provider = sender.address
        if mint:
            await escrow.token.mint(sender, provider, value)
        await require_tokens(escrow, provider, value)
        if await escrow.token.allowance(provider, escrow.deployment.escrow) < value:
            await escrow.token.approve(sender, escrow.deployment.escrow, value)
        tx = await escrow.stake(sender, value)
        staked = (await escrow.provider(provider)).stake
        return f"{dollars(staked)} are staked for {provider}", _fields(tx, account=provider, stake=staked)

    _send(wallet, password_file, deployment, rpc, act, as_json=as_json)


def unstake(
    amount: Annotated[
        str | None, typer.Argument(help='Dollars to take out, or "all"; omit to complete an announced withdrawal.')
    ] = None,
    cancel: Annotated[bool, typer.Option("--cancel", help="Cancel the announced withdrawal instead.")] = False,
    wallet: Wallet = DEFAULT_WALLET,
    password_file: PasswordFile = None,
    deployment: DeploymentFile = None,
    rpc: Rpc = None,
    as_json: Json = False,
) -> None:
    """Take out stake: with AMOUNT announces it; without AMOUNT, after the waiting time, pays it out.

    Another announcement replaces the first one, and the wait begins anew.
    """
    if cancel and amount is not None:
        raise BadMessage("expected either AMOUNT or --cancel")
    requested = parse_amount_or_all(amount)

    async def act(escrow: Escrow, sender: Sender) -> Outcome:
        provider = sender.address
        account = await escrow.provider(provider)
        if amount is None and not account.unstaking:
            raise Refusal(
                Code.CHAIN_REFUSED,
                f"no withdrawal of the {dollars(account.stake)} that {provider} has staked is announced. Announce it first: "
                "tally unstake AMOUNT",
            )
        if cancel:
            tx = await escrow.unstake(sender, Amount(0))
            return f"{dollars(account.unstaking)} stay staked", _fields(tx, account=provider, unstaking=Amount(0))
        if amount is None:
            await _require_waited(escrow, account.unstake_at, "the stake's waiting time")
            tx = await escrow.withdraw_stake(sender)
            fields = _fields(tx, account=provider, withdrawn=account.unstaking)
            return f"{dollars(account.unstaking)} were paid to {provider}", fields
        total = Amount(account.stake + account.unstaking)
        value = total if requested is None else requested
        if not 0 < value <= total:
            raise Refusal(
                Code.INSUFFICIENT_FUNDS,
                f"AMOUNT: expected more than 0 and at most {dollars(total)}, which {provider} has staked, got {dollars(value)}",
            )
        await announce_restart(escrow.rpc, account.unstaking, account.unstake_at, "tally unstake", ask=not as_json)
        tx = await escrow.unstake(sender, value)
        at = (await escrow.provider(provider)).unstake_at
        then = await _next_command(escrow, at, "tally unstake")
        text = f"{dollars(value)} are leaving the stake and can be slashed until they have left; {then}"
        return text, _fields(tx, account=provider, unstaking=value, unstake_at=at, replaced=account.unstaking)

    _send(wallet, password_file, deployment, rpc, act, as_json=as_json)


# -------------------------------------------------------------------------------------------------------------------- shared


def _send(
    wallet: str,
    password_file: Path | None,
    deployment: Path | None,
    rpc: str | None,
    act: Callable[[Escrow, Sender], Awaitable[Outcome]],
    *,
    as_json: bool,
) -> None:
    """Runs `act` with the escrow and a wallet that pays the gas, then prints the outcome. Raises TallyError."""
    from tallystick.cli.transactions import ShownSender

    async def run() -> None:
        async with open_escrow(deployment, rpc) as escrow:
            signer = unlock(wallet, password_file)
            await require_gas(escrow, signer.address)
            text, fields = await act(escrow, ShownSender(escrow.rpc, signer))
        if as_json:
            show_json(fields)
        else:
            step(text)

    asyncio.run(run())


async def _owned_purse(escrow: Escrow, key: Address, owner: Address) -> Purse:
    """The purse of a key, which `owner` must own. Raises Refusal."""
    purse = await escrow.purse(key)
    if purse.owner is None:
        raise Refusal(Code.CHAIN_REFUSED, f"{key} has no purse yet; the first deposit opens it: tally deposit AMOUNT")
    if purse.owner != owner:
        raise Refusal(
            Code.CHAIN_REFUSED,
            f"the purse of {key} belongs to {purse.owner}, not to {owner}; name the owner's wallet with --owner",
        )
    return purse


async def _require_waited(escrow: Escrow, at: Seconds, name: str) -> None:
    """Raises Refusal if a waiting time is not over."""
    from tallystick.chain.state_explainer import moment

    now = await escrow.rpc.now()
    if now < at:
        skip = f"tally chain advance {at - now}s{chain_option(escrow)}"
        raise Refusal(Code.CHAIN_REFUSED, f"{name} ends {moment(at, now)}; try again then (local chain: {skip})")


async def _next_command(escrow: Escrow, at: Seconds, command: str) -> str:
    from tallystick.chain.state_explainer import moment

    return f"{moment(at, await escrow.rpc.now())}: {command}"


def _fields(tx: TxResult, **fields: Any) -> dict[str, Any]:
    """Fields for JSON, with the transaction that changed them."""
    return json_fields(fields) | {"tx": tx.hash, "block": tx.block}
