"""`tally safe`: a purse owned by a Safe or any other smart wallet. That wallet moves the money from its own interface; here the
hot key signs that it belongs to it, and the transactions that it must execute are written down.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tallystick.cli.onchain import account_of, open_escrow
from tallystick.cli.options import DEFAULT_WALLET, DeploymentFile, Json, PasswordFile, Rpc, Wallet, unlock
from tallystick.cli.output import err, out, show_json, show_rows, step
from tallystick.protocol.codecs import keccak
from tallystick.protocol.eip712 import checksum
from tallystick.protocol.errors import BadMessage, Code, Refusal
from tallystick.protocol.messages import Bind
from tallystick.protocol.types import Address, Amount, format_amount, parse_address, parse_amount
from tallystick.runtime.keystore import write_private

if TYPE_CHECKING:
    from tallystick.chain.escrow import Escrow, Purse

app = typer.Typer(
    no_args_is_help=True,
    help="A purse that a Safe (or another smart wallet) owns: writes the transactions that the owner must execute, in the format "
    "of Safe's Transaction Builder. The wallet here is the hot key, which only signs orders.",
)
Out = Annotated[
    Path | None, typer.Option("--out", "-o", help="File for Safe's Transaction Builder; it must not exist. Else on stdout.")
]
Provider = Annotated[str, typer.Argument(help="The provider: an address, or a wallet's name.")]


@dataclass(frozen=True, slots=True)
class Call:
    """A transaction for the owner to execute; it pays no coins of the chain."""

    what: str
    to: Address
    data: bytes


Plan = Callable[["Escrow", "Purse"], Awaitable[Sequence[Call]]]


@app.command()
def deposit(
    amount: Annotated[str, typer.Argument(help="Dollars to deposit, for example 10 or 2.50.")],
    owner: Annotated[str, typer.Option(help="Address of the Safe that owns the purse, for ever.")],
    wallet: Wallet = DEFAULT_WALLET,
    password_file: PasswordFile = None,
    to: Out = None,
    deployment: DeploymentFile = None,
    rpc: Rpc = None,
    as_json: Json = False,
) -> None:
    """Opens the purse for its owner if that was not done, and deposits. The wallet signs that it belongs to the owner."""
    value, safe, key = parse_amount(amount), parse_address(owner, "--owner"), account_of(wallet, "--wallet")
    if not value:
        raise BadMessage("amount: a deposit is more than nothing")
    if safe == key:
        raise BadMessage("--owner: a wallet that owns its own purse needs no Safe; use: tally deposit")

    async def plan(escrow: Escrow, purse: Purse) -> Sequence[Call]:
        if purse.owner not in (None, safe):
            raise Refusal(Code.CHAIN_REFUSED, f"the purse of {key} belongs to {purse.owner}, for ever; take another wallet")
        if await escrow.rpc.request("eth_getCode", safe, "latest") in ("0x", None):
            err.print(f"note: there is no contract at {safe} on this chain; is it the right address?", highlight=False)
        if (held := await escrow.token.balance_of(safe)) < value:
            err.print(f"note: it holds {format_amount(held)} dollars now, and must hold them when it executes", highlight=False)
        calls = []
        if purse.owner is None:
            bind = unlock(wallet, password_file).sign(Bind(key=key, owner=safe), escrow.deployment.domain)
            calls.append(_call(escrow, f"open the purse of {key} for {safe}", "open", key, safe, bind.signature))
        spender = escrow.deployment.escrow
        approve = escrow.token.calldata("approve", spender, value)
        calls.append(Call(f"let the escrow take {format_amount(value)} dollars", escrow.token.address, approve))
        calls.append(_call(escrow, f"deposit {format_amount(value)} dollars", "deposit", key, value))
        return calls

    _write(key, safe, plan, to, deployment, rpc, as_json=as_json)


@app.command()
def thaw(
    amount: Annotated[str | None, typer.Argument(help='Dollars to take out, or "all" that is free.')] = None,
    cancel: Annotated[bool, typer.Option("--cancel", help="Call the running thaw off.")] = False,
    wallet: Wallet = DEFAULT_WALLET,
    to: Out = None,
    deployment: DeploymentFile = None,
    rpc: Rpc = None,
    as_json: Json = False,
) -> None:
    """Announces that free money will leave the purse; after the wait, `tally safe withdraw` pays it out."""
    if cancel is (amount is not None):
        raise BadMessage('give an amount ("all" for all that is free), or --cancel')
    key = account_of(wallet, "--wallet")

    async def plan(escrow: Escrow, purse: Purse) -> Sequence[Call]:
        if cancel:
            return [_call(escrow, "call the thaw off", "cancelThaw", key)]
        value = purse.free if amount == "all" else parse_amount(str(amount))
        _require(value, purse.free)
        return [_call(escrow, f"announce that {format_amount(value)} dollars leave", "thaw", key, value)]

    _write(key, None, plan, to, deployment, rpc, as_json=as_json)


@app.command()
def withdraw(
    wallet: Wallet = DEFAULT_WALLET, to: Out = None, deployment: DeploymentFile = None, rpc: Rpc = None, as_json: Json = False
) -> None:
    """Pays what has thawed to the owner."""
    key = account_of(wallet, "--wallet")

    async def plan(escrow: Escrow, purse: Purse) -> Sequence[Call]:
        if not purse.thawing:
            raise Refusal(Code.CHAIN_REFUSED, "nothing is leaving the purse. Announce it first: tally safe thaw AMOUNT")
        await _tell_wait(escrow, purse.thaw_at)
        return [_call(escrow, f"withdraw {format_amount(purse.thawing)} dollars", "withdraw", key)]

    _write(key, None, plan, to, deployment, rpc, as_json=as_json)


@app.command()
def reserve(
    provider: Provider,
    amount: Annotated[str, typer.Argument(help="Dollars to pledge to it, beyond what is pledged already.")],
    wallet: Wallet = DEFAULT_WALLET,
    to: Out = None,
    deployment: DeploymentFile = None,
    rpc: Rpc = None,
    as_json: Json = False,
) -> None:
    """Pledges free money to one provider: nobody else can collect it. Calls a running release off."""
    key, whom, value = account_of(wallet, "--wallet"), account_of(provider, "PROVIDER"), parse_amount(amount)

    async def plan(escrow: Escrow, purse: Purse) -> Sequence[Call]:
        _require(value, Amount(purse.free - purse.thawing))
        return [_call(escrow, f"reserve {format_amount(value)} dollars for {whom}", "reserve", key, whom, value)]

    _write(key, None, plan, to, deployment, rpc, as_json=as_json)


@app.command()
def release(
    provider: Provider,
    wallet: Wallet = DEFAULT_WALLET,
    to: Out = None,
    deployment: DeploymentFile = None,
    rpc: Rpc = None,
    as_json: Json = False,
) -> None:
    """Takes back what is reserved for a provider: the first time it announces it, after the wait it is done."""
    key, whom = account_of(wallet, "--wallet"), account_of(provider, "PROVIDER")

    async def plan(escrow: Escrow, _purse: Purse) -> Sequence[Call]:
        tab = await escrow.tab(key, whom)
        if tab.release_at:
            await _tell_wait(escrow, tab.release_at)
            return [_call(escrow, f"take back {format_amount(tab.reserved)} dollars from {whom}", "finishRelease", key, whom)]
        if not tab.reserved:
            raise Refusal(Code.CHAIN_REFUSED, f"nothing is reserved for {whom}")
        return [_call(escrow, f"announce that the reservation for {whom} ends", "release", key, whom)]

    _write(key, None, plan, to, deployment, rpc, as_json=as_json)


# -------------------------------------------------------------------------------------------------------------------- shared


def _call(escrow: Escrow, what: str, function: str, *arguments: object) -> Call:
    return Call(what, escrow.deployment.escrow, escrow.calldata(function, *arguments))


def _require(value: Amount, free: Amount) -> None:
    if not 0 < value <= free:
        raise Refusal(Code.INSUFFICIENT_FUNDS, f"the purse has {format_amount(free)} free, not {format_amount(value)}")


async def _tell_wait(escrow: Escrow, at: int) -> None:
    from tallystick.chain.state_explainer import moment

    if at > (now := await escrow.rpc.now()):
        err.print(f"note: it can be executed {moment(at, now)}, not before", highlight=False)


def _write(
    key: Address, owner: Address | None, plan: Plan, to: Path | None, deployment: Path | None, rpc: str | None, *, as_json: bool
) -> None:
    """Plans the calls and writes them. Raises TallyError."""
    if to is not None and to.exists():
        raise BadMessage(f"{to} exists")

    async def run() -> tuple[Sequence[Call], Address, int]:
        async with open_escrow(deployment, rpc) as escrow:
            purse = await escrow.purse(key)
            whose = purse.owner or owner
            if whose is None:
                raise Refusal(Code.CHAIN_REFUSED, f"{key} has no purse yet; to open it: tally safe deposit AMOUNT --owner 0x…")
            return await plan(escrow, purse), whose, escrow.deployment.chain_id

    calls, whose, chain_id = asyncio.run(run())
    document = batch(calls, whose, chain_id, int(time.time() * 1000))
    if to is not None:
        try:
            write_private(to, (json.dumps(document, indent=2) + "\n").encode(), replace=False)
        except FileExistsError:
            raise BadMessage(f"{to} exists") from None
    if as_json:
        steps = [{"what": call.what, "to": checksum(call.to), "value": "0", "data": f"0x{call.data.hex()}"} for call in calls]
        show_json({"owner": checksum(whose), "key": checksum(key), "chain_id": chain_id, "calls": steps, "batch": document})
        return
    if to is None:
        out.print_json(data=document)
        return
    show_rows(("no.", "what", "to"), [(number, call.what, checksum(call.to)) for number, call in enumerate(calls, 1)])
    step(f"wrote {to}: load it in the Transaction Builder of the Safe {checksum(whose)}, and look at each call before you sign")


def batch(calls: Sequence[Call], owner: Address, chain_id: int, created_ms: int) -> dict[str, Any]:
    """The calls as Safe's Transaction Builder takes them, one batch."""
    made: dict[str, Any] = {
        "version": "1.0",
        "chainId": str(chain_id),
        "createdAt": created_ms,
        "meta": {
            "name": "Tallystick",
            "description": "; ".join(call.what for call in calls),
            "txBuilderVersion": "1.16.5",
            "createdFromSafeAddress": checksum(owner),
            "createdFromOwnerAddress": "",
        },
        "transactions": [
            {
                "to": checksum(call.to),
                "value": "0",
                "data": f"0x{call.data.hex()}",
                "contractMethod": None,
                "contractInputsValues": None,
            }
            for call in calls
        ],
    }
    made["meta"]["checksum"] = batch_checksum(made)
    return made


def batch_checksum(document: dict[str, Any]) -> str:
    """What the Transaction Builder recomputes to see whether a batch was altered: over all but its name."""
    meta = {name: value for name, value in document["meta"].items() if name != "checksum"} | {"name": None}
    return "0x" + keccak(_canonical(document | {"meta": meta}).encode()).hex()


def _canonical(value: Any) -> str:
    """Its own form of JSON: an object is the list of its sorted names, then the values in that order."""
    if isinstance(value, dict):
        names = sorted(value)
        return (
            "{"
            + json.dumps(names, separators=(",", ":"), ensure_ascii=False)
            + "".join(_canonical(value[name]) + "," for name in names)
            + "}"
        )
    if isinstance(value, list):
        return "[" + ",".join(map(_canonical, value)) + "]"
    return json.dumps(value, ensure_ascii=False)
