"""`tally thaw`, `withdraw`, `reserve`, `release`, `cash-out`, `stake`, `unstake`: every way that money moves on chain by hand.

What ends after a wait is one command given twice: the first announces, the second, after the wait, collects.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tallystick.cli.onchain import account_of, open_escrow, require_coins
from tallystick.cli.options import DEFAULT_WALLET, DeploymentFile, Json, PasswordFile, Rpc, Wallet, unlock, wallets
from tallystick.cli.output import show_json, step
from tallystick.protocol.errors import BadMessage, Code, Refusal
from tallystick.protocol.types import Address, Amount, Seconds, format_amount, parse_amount

if TYPE_CHECKING:
    from tallystick.chain.escrow import Escrow, Purse, TxResult
    from tallystick.chain.sender import Sender

Owner = Annotated[
    str | None, typer.Option(help="Wallet that owns the purse; the same wallet by default.", autocompletion=wallets)
]
Provider = Annotated[str, typer.Argument(help="The provider: an address, or a wallet's name.")]

Done = tuple[str, dict[str, Any]]
"""What was done, in words and as facts."""


def thaw(
    amount: Annotated[str | None, typer.Argument(help='Dollars to take out, or "all" that is free.')] = None,
    cancel: Annotated[bool, typer.Option("--cancel", help="Call the running thaw off.")] = False,
    wallet: Wallet = DEFAULT_WALLET,
    owner: Owner = None,
    password_file: PasswordFile = None,
    deployment: DeploymentFile = None,
    rpc: Rpc = None,
    as_json: Json = False,
) -> None:
    """Announces that free money will leave the purse; after the wait, `tally withdraw` pays it out."""
    if cancel is (amount is not None):
        raise BadMessage('give an amount ("all" for all that is free), or --cancel')
    key, wanted = account_of(wallet, "--wallet"), _amount(amount)

    async def act(escrow: Escrow, sender: Sender) -> Done:
        purse = await _own_purse(escrow, key, sender.address)
        if cancel:
            if not purse.thawing:
                raise Refusal(Code.CHAIN_REFUSED, f"nothing is leaving the purse of {key}")
            tx = await escrow.cancel_thaw(sender, key)
            return f"{format_amount(purse.thawing)} stays in the purse", _facts(tx, key=key, thawing=Amount(0))
        value = purse.free if wanted is None else wanted
        if not 0 < value <= purse.free:
            raise Refusal(
                Code.INSUFFICIENT_FUNDS,
                f"the purse of {key} has {format_amount(purse.free)} free, not {format_amount(value)}. What is reserved for a "
                "provider becomes free with: tally release PROVIDER",
            )
        tx = await escrow.thaw(sender, key, value)
        at = (await escrow.purse(key)).thaw_at
        then = await _then(escrow, at, "tally withdraw")
        return f"{format_amount(value)} is leaving the purse; {then}", _facts(tx, key=key, thawing=value, thaw_at=at)

    _act(owner or wallet, password_file, deployment, rpc, act, as_json=as_json)


def withdraw(
    wallet: Wallet = DEFAULT_WALLET,
    owner: Owner = None,
    password_file: PasswordFile = None,
    deployment: DeploymentFile = None,
    rpc: Rpc = None,
    as_json: Json = False,
) -> None:
    """Pays what has thawed to the purse's owner."""
    key = account_of(wallet, "--wallet")

    async def act(escrow: Escrow, sender: Sender) -> Done:
        purse = await _own_purse(escrow, key, sender.address)
        if not purse.thawing:
            raise Refusal(
                Code.CHAIN_REFUSED,
                f"nothing is leaving the purse of {key}, which has {format_amount(purse.free)} free. Announce it first: "
                "tally thaw AMOUNT",
            )
        await _require_time(escrow, purse.thaw_at, "the thaw")
        tx = await escrow.withdraw(sender, key)
        return f"{format_amount(purse.thawing)} went to {sender.address}", _facts(
            tx, key=key, owner=sender.address, withdrawn=purse.thawing
        )

    _act(owner or wallet, password_file, deployment, rpc, act, as_json=as_json)


def reserve(
    provider: Provider,
    amount: Annotated[str, typer.Argument(help="Dollars to pledge to it, beyond what is pledged already.")],
    wallet: Wallet = DEFAULT_WALLET,
    owner: Owner = None,
    password_file: PasswordFile = None,
    deployment: DeploymentFile = None,
    rpc: Rpc = None,
    as_json: Json = False,
) -> None:
    """Pledges free money to one provider: nobody else can collect it. Calls a running release off."""
    key, to, value = account_of(wallet, "--wallet"), account_of(provider, "PROVIDER"), parse_amount(amount)

    async def act(escrow: Escrow, sender: Sender) -> Done:
        purse = await _own_purse(escrow, key, sender.address)
        free = Amount(purse.free - purse.thawing)
        if not 0 < value <= free:
            raise Refusal(
                Code.INSUFFICIENT_FUNDS,
                f"the purse of {key} has {format_amount(free)} to pledge, not {format_amount(value)}. To fill it: "
                "tally deposit AMOUNT" + ("; to keep what is leaving: tally thaw --cancel" if purse.thawing else ""),
            )
        tx = await escrow.reserve(sender, key, to, value)
        reserved = (await escrow.tab(key, to)).reserved
        return f"{format_amount(reserved)} is reserved for {to}", _facts(tx, key=key, provider=to, reserved=reserved)

    _act(owner or wallet, password_file, deployment, rpc, act, as_json=as_json)


def release(
    provider: Provider,
    wallet: Wallet = DEFAULT_WALLET,
    owner: Owner = None,
    password_file: PasswordFile = None,
    deployment: DeploymentFile = None,
    rpc: Rpc = None,
    as_json: Json = False,
) -> None:
    """Takes back what is reserved for a provider: the first time it announces it, after the wait it is done."""
    key, to = account_of(wallet, "--wallet"), account_of(provider, "PROVIDER")

    async def act(escrow: Escrow, sender: Sender) -> Done:
        await _own_purse(escrow, key, sender.address)
        tab = await escrow.tab(key, to)
        facts: dict[str, Any] = {"key": key, "provider": to, "reserved": tab.reserved}
        if tab.release_at:
            await _require_time(escrow, tab.release_at, "the release")
            tx = await escrow.finish_release(sender, key, to)
            return f"{format_amount(tab.reserved)} is free again", _facts(tx, **facts | {"reserved": Amount(0), "released": True})
        if not tab.reserved:
            raise Refusal(Code.CHAIN_REFUSED, f"nothing is reserved for {to}")
        tx = await escrow.release(sender, key, to)
        at = (await escrow.tab(key, to)).release_at
        then = await _then(escrow, at, f"tally release {provider}")
        said = f"{format_amount(tab.reserved)} will be free again; until then {to} can collect it; {then}"
        return said, _facts(tx, **facts, release_at=at, released=False)

    _act(owner or wallet, password_file, deployment, rpc, act, as_json=as_json)


def cash_out(
    account: Annotated[str | None, typer.Option(help="Whose credit, by address or wallet; the wallet's own by default.")] = None,
    to: Annotated[str | None, typer.Option("--set-payout", help="From now on pay the wallet's credit to this address.")] = None,
    wallet: Wallet = DEFAULT_WALLET,
    password_file: PasswordFile = None,
    deployment: DeploymentFile = None,
    rpc: Rpc = None,
    as_json: Json = False,
) -> None:
    """Pays what an account has earned (as provider, coordinator or reporter) to its payout address. Anyone may send it."""
    if account is not None and to is not None:
        raise BadMessage("--set-payout: only an account itself says where its credit goes; leave --account away")
    payout = None if to is None else account_of(to, "--set-payout")

    async def act(escrow: Escrow, sender: Sender) -> Done:
        who = sender.address if account is None else account_of(account, "--account")
        earned = await escrow.provider(who)
        if not earned.credit:
            raise Refusal(
                Code.INSUFFICIENT_FUNDS,
                f"{who} has no credit. What receipts promise becomes credit once claims are settled on chain; a node hands them "
                "in by itself",
            )
        if payout is not None:
            await escrow.set_payout(sender, payout)
        tx, goes = await escrow.cash_out(sender, who), payout or earned.payout
        return f"{format_amount(earned.credit)} went to {goes}", _facts(tx, account=who, payout=goes, amount=earned.credit)

    _act(wallet, password_file, deployment, rpc, act, as_json=as_json)


def stake(
    amount: Annotated[str, typer.Argument(help="Dollars to add to the stake.")],
    mint: Annotated[bool, typer.Option("--mint", help="Mint the test dollars first (local chains only).")] = False,
    wallet: Wallet = DEFAULT_WALLET,
    password_file: PasswordFile = None,
    deployment: DeploymentFile = None,
    rpc: Rpc = None,
    as_json: Json = False,
) -> None:
    """Backs a provider's word with money, which it loses if it signs two contradicting receipts or claims more than they say."""
    value = parse_amount(amount)
    if value == 0:
        raise BadMessage("amount: a stake is more than nothing")

    async def act(escrow: Escrow, sender: Sender) -> Done:
        who = sender.address
        if mint:
            await escrow.token.mint(sender, who, value)
        held = await escrow.token.balance_of(who)
        if held < value:
            raise Refusal(Code.INSUFFICIENT_FUNDS, f"{who} holds {format_amount(held)}, not {format_amount(value)}")
        if await escrow.token.allowance(who, escrow.deployment.escrow) < value:
            await escrow.token.approve(sender, escrow.deployment.escrow, value)
        tx = await escrow.stake(sender, value)
        staked = (await escrow.provider(who)).stake
        return f"{format_amount(staked)} is staked for {who}", _facts(tx, account=who, stake=staked)

    _act(wallet, password_file, deployment, rpc, act, as_json=as_json)


def unstake(
    amount: Annotated[
        str | None, typer.Argument(help='Dollars to take out, or "all"; nothing, to collect after the wait.')
    ] = None,
    cancel: Annotated[bool, typer.Option("--cancel", help="Let the stake stay.")] = False,
    wallet: Wallet = DEFAULT_WALLET,
    password_file: PasswordFile = None,
    deployment: DeploymentFile = None,
    rpc: Rpc = None,
    as_json: Json = False,
) -> None:
    """Takes a stake out: with an amount it announces it, without one, after the wait, it is paid out."""
    if cancel and amount is not None:
        raise BadMessage("give an amount, or --cancel")
    wanted = _amount(amount)

    async def act(escrow: Escrow, sender: Sender) -> Done:
        who = sender.address
        bond = await escrow.provider(who)
        if amount is None and not bond.unstaking:
            raise Refusal(
                Code.CHAIN_REFUSED,
                f"nothing of the {format_amount(bond.stake)} that {who} has staked is leaving. Announce it first: "
                "tally unstake AMOUNT",
            )
        if cancel:
            tx = await escrow.unstake(sender, Amount(0))
            return f"{format_amount(bond.unstaking)} stays staked", _facts(tx, account=who, unstaking=Amount(0))
        if amount is None:
            await _require_time(escrow, bond.unstake_at, "the stake's wait")
            tx = await escrow.withdraw_stake(sender)
            return f"{format_amount(bond.unstaking)} went to {who}", _facts(tx, account=who, withdrawn=bond.unstaking)
        total = Amount(bond.stake + bond.unstaking)
        value = total if wanted is None else wanted
        if not 0 < value <= total:
            raise Refusal(Code.INSUFFICIENT_FUNDS, f"{who} has {format_amount(total)} staked, not {format_amount(value)}")
        tx = await escrow.unstake(sender, value)
        at = (await escrow.provider(who)).unstake_at
        then = await _then(escrow, at, "tally unstake")
        said = f"{format_amount(value)} is leaving the stake, and can be lost until it has left; {then}"
        return said, _facts(tx, account=who, unstaking=value, unstake_at=at)

    _act(wallet, password_file, deployment, rpc, act, as_json=as_json)


# -------------------------------------------------------------------------------------------------------------------- shared


def _act(
    wallet: str,
    password_file: Path | None,
    deployment: Path | None,
    rpc: str | None,
    act: Callable[[Escrow, Sender], Awaitable[Done]],
    *,
    as_json: bool,
) -> None:
    """Does something with the escrow as a wallet, and says what was done. Raises TallyError."""
    from tallystick.chain.sender import Sender

    async def run() -> None:
        async with open_escrow(deployment, rpc) as escrow:
            signer = unlock(wallet, password_file)
            await require_coins(escrow, signer.address)
            said, facts = await act(escrow, Sender(escrow.rpc, signer))
        if as_json:
            show_json(facts)
        else:
            step(said)

    asyncio.run(run())


async def _own_purse(escrow: Escrow, key: Address, owner: Address) -> Purse:
    """The purse of a key, which `owner` must own. Raises Refusal."""
    purse = await escrow.purse(key)
    if purse.owner is None:
        raise Refusal(Code.CHAIN_REFUSED, f"{key} has no purse yet; the first deposit opens it: tally deposit AMOUNT")
    if purse.owner != owner:
        raise Refusal(
            Code.CHAIN_REFUSED,
            f"the purse of {key} belongs to {purse.owner}, not to {owner}; name that wallet with --owner",
        )
    return purse


async def _require_time(escrow: Escrow, at: Seconds, what: str) -> None:
    """Raises Refusal where it is too early."""
    from tallystick.chain.state_explainer import moment

    now = await escrow.rpc.now()
    if now < at:
        raise Refusal(
            Code.CHAIN_REFUSED, f"{what} ends {moment(at, now)}; not before (on a local chain: tally chain advance {at - now}s)"
        )


async def _then(escrow: Escrow, at: Seconds, command: str) -> str:
    from tallystick.chain.state_explainer import moment

    return f"{moment(at, await escrow.rpc.now())}: {command}"


def _amount(text: str | None) -> Amount | None:
    """None stands for all there is."""
    return None if text in (None, "all") else parse_amount(str(text))


def _facts(tx: TxResult, **facts: Any) -> dict[str, Any]:
    """Amounts as decimal strings of base units, as everywhere on the wire."""
    plain = {name: str(int(value)) if isinstance(value, Amount) else value for name, value in facts.items()}
    return plain | {"tx": tx.hash, "block": tx.block}
