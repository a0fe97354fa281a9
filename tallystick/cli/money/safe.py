"""`tally safe`: a purse that a Safe or another smart wallet owns.

The smart wallet moves the money from its own interface. These commands write the transactions that it must execute, and the hot
key signs that it belongs to that owner.
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

from tallystick.cli.money.purse import (
    CancelThaw,
    ReserveAmount,
    ThawAmount,
    announce_restart,
    check_thaw_options,
    parse_amount_or_all,
    parse_positive,
    require_free,
)
from tallystick.cli.onchain import open_escrow, parse_account
from tallystick.cli.options import DEFAULT_WALLET, DeploymentFile, Json, PasswordFile, Provider, Rpc, Wallet, unlock
from tallystick.cli.output import dollars, note, out, show_json, show_table, step
from tallystick.protocol.codecs import keccak
from tallystick.protocol.errors import BadMessage, Code, Refusal
from tallystick.protocol.messages import Bind
from tallystick.protocol.signatures import checksum
from tallystick.protocol.types import Address, Amount, parse_address
from tallystick.runtime.keystore import write_private

if TYPE_CHECKING:
    from tallystick.chain.escrow import Escrow, Purse

app = typer.Typer(
    no_args_is_help=True,
    help="Manage a purse that a Safe (or another smart wallet) owns: write the transactions that the owner must execute, in the "
    "format of Safe's Transaction Builder. The --wallet is the hot key, which only signs orders.",
)
BatchFile = Annotated[
    Path | None,
    typer.Option("--out", "-o", help="File to write for Safe's Transaction Builder; must not exist. Default: stdout."),
]


@dataclass(frozen=True, slots=True)
class SafeTransaction:
    """A transaction for the owner to execute. It transfers no coins of the chain."""

    summary: str
    to: Address
    data: bytes


Planner = Callable[["Escrow", "Purse"], Awaitable[Sequence[SafeTransaction]]]


@app.command()
def deposit(
    amount: Annotated[str, typer.Argument(help="Dollars to deposit, for example 10 or 2.50.")],
    owner: Annotated[str, typer.Option(help="Address of the Safe that owns the purse; it can never be changed.")],
    wallet: Wallet = DEFAULT_WALLET,
    password_file: PasswordFile = None,
    file: BatchFile = None,
    deployment: DeploymentFile = None,
    rpc: Rpc = None,
    as_json: Json = False,
) -> None:
    """Write a deposit into the purse. If the purse does not exist, the batch opens it first; the wallet signs that it belongs to
    the owner.
    """
    value, safe, key = parse_positive(amount), parse_address(owner, "--owner"), parse_account(wallet, "--wallet")
    if safe == key:
        raise BadMessage("--owner: a wallet that owns its own purse needs no Safe; use: tally deposit")

    async def plan(escrow: Escrow, purse: Purse) -> Sequence[SafeTransaction]:
        if purse.owner not in (None, safe):
            raise _owned_for_ever(key, purse.owner)
        if await escrow.rpc.request("eth_getCode", safe, "latest") in ("0x", None):
            note(f"note: there is no contract at {safe} on this chain; is it the right address?")
        if (held := await escrow.token.balance_of(safe)) < value:
            note(f"note: {safe} holds {dollars(held)} now and needs {dollars(value)} when it executes the batch")
        transactions = []
        if purse.owner is None:
            bind = unlock(wallet, password_file).sign(Bind(key=key, owner=safe), escrow.deployment.domain)
            transactions.append(_transaction(escrow, f"open the purse of {key} for {safe}", "open", key, safe, bind.signature))
        approve = escrow.token.calldata("approve", escrow.deployment.escrow, value)
        transactions.append(SafeTransaction(f"allow the escrow to take {dollars(value)}", escrow.token.address, approve))
        transactions.append(_transaction(escrow, f"deposit {dollars(value)}", "deposit", key, value))
        return transactions

    _write(key, safe, plan, file, deployment, rpc, as_json=as_json)


@app.command()
def thaw(
    amount: ThawAmount = None,
    cancel: CancelThaw = False,
    wallet: Wallet = DEFAULT_WALLET,
    file: BatchFile = None,
    deployment: DeploymentFile = None,
    rpc: Rpc = None,
    as_json: Json = False,
) -> None:
    """Write the announcement that free money will leave the purse. After the wait, `tally safe withdraw` pays it out."""
    check_thaw_options(amount, cancel=cancel)
    key, requested = parse_account(wallet, "--wallet"), parse_amount_or_all(amount)

    async def plan(escrow: Escrow, purse: Purse) -> Sequence[SafeTransaction]:
        if cancel:
            return [_transaction(escrow, "cancel the thaw", "cancelThaw", key)]
        value = purse.free if requested is None else requested
        require_free(value, purse.free, key, "Money reserved for a provider becomes free with: tally safe release PROVIDER")
        await announce_restart(escrow.rpc, purse.thawing, purse.thaw_at, "tally safe withdraw", ask=False)
        return [_transaction(escrow, f"announce a thaw of {dollars(value)}", "thaw", key, value)]

    _write(key, None, plan, file, deployment, rpc, as_json=as_json)


@app.command()
def withdraw(
    wallet: Wallet = DEFAULT_WALLET,
    file: BatchFile = None,
    deployment: DeploymentFile = None,
    rpc: Rpc = None,
    as_json: Json = False,
) -> None:
    """Write the payment of thawed money to the owner."""
    key = parse_account(wallet, "--wallet")

    async def plan(escrow: Escrow, purse: Purse) -> Sequence[SafeTransaction]:
        if not purse.thawing:
            raise Refusal(
                Code.CHAIN_REFUSED, f"nothing is thawing in the purse of {key}. Announce it first: tally safe thaw AMOUNT"
            )
        await _note_wait(escrow, purse.thaw_at)
        return [_transaction(escrow, f"withdraw {dollars(purse.thawing)}", "withdraw", key)]

    _write(key, None, plan, file, deployment, rpc, as_json=as_json)


@app.command()
def reserve(
    provider: Provider,
    amount: ReserveAmount,
    wallet: Wallet = DEFAULT_WALLET,
    file: BatchFile = None,
    deployment: DeploymentFile = None,
    rpc: Rpc = None,
    as_json: Json = False,
) -> None:
    """Write a reservation of free money for one provider, so that no other can collect it. It cancels a running release."""
    key, payee, value = parse_account(wallet, "--wallet"), parse_account(provider, "PROVIDER"), parse_positive(amount)

    async def plan(escrow: Escrow, purse: Purse) -> Sequence[SafeTransaction]:
        require_free(value, Amount(purse.free - purse.thawing), key, "Fill the purse: tally safe deposit AMOUNT --owner 0x…")
        return [_transaction(escrow, f"reserve {dollars(value)} for {payee}", "reserve", key, payee, value)]

    _write(key, None, plan, file, deployment, rpc, as_json=as_json)


@app.command()
def release(
    provider: Provider,
    wallet: Wallet = DEFAULT_WALLET,
    file: BatchFile = None,
    deployment: DeploymentFile = None,
    rpc: Rpc = None,
    as_json: Json = False,
) -> None:
    """Write the release of money reserved for a provider: first its announcement, after the waiting time its completion."""
    key, payee = parse_account(wallet, "--wallet"), parse_account(provider, "PROVIDER")

    async def plan(escrow: Escrow, _purse: Purse) -> Sequence[SafeTransaction]:
        tab = await escrow.tab(key, payee)
        if tab.release_at:
            await _note_wait(escrow, tab.release_at)
            summary = f"take back {dollars(tab.reserved)} from {payee}"
            return [_transaction(escrow, summary, "finishRelease", key, payee)]
        if not tab.reserved:
            raise Refusal(Code.CHAIN_REFUSED, f"nothing is reserved for {payee}: tally balance --provider {payee}")
        return [_transaction(escrow, f"announce the release of the reservation for {payee}", "release", key, payee)]

    _write(key, None, plan, file, deployment, rpc, as_json=as_json)


@app.command()
def bind(
    owner: Annotated[str, typer.Argument(help="Account that will own the purse for ever: a Safe, or one of a browser wallet.")],
    wallet: Wallet = DEFAULT_WALLET,
    password_file: PasswordFile = None,
    deployment: DeploymentFile = None,
    rpc: Rpc = None,
    as_json: Json = False,
) -> None:
    """Sign that the wallet's purse belongs to an owner. A coordinator's wallet page takes this signature to open the purse."""
    account, key = parse_address(owner, "OWNER"), parse_account(wallet, "--wallet")

    async def run() -> tuple[bytes, int]:
        async with open_escrow(deployment, rpc) as escrow:
            purse = await escrow.purse(key)
            if purse.owner is not None:
                raise _owned_for_ever(key, purse.owner)
            domain = escrow.deployment.domain
            return unlock(wallet, password_file).sign(Bind(key=key, owner=account), domain).signature, domain.chain_id

    signature, chain_id = asyncio.run(run())
    if as_json:
        fields = {"key": checksum(key), "owner": checksum(account), "chainId": chain_id}
        show_json(fields | {"signature": f"0x{signature.hex()}"})
        return
    note(f"{checksum(account)} can now open the purse of {checksum(key)}, and owns it then for ever:")
    out.print(f"0x{signature.hex()}", highlight=False, soft_wrap=True)


# -------------------------------------------------------------------------------------------------------------------- shared


def _transaction(escrow: Escrow, summary: str, function: str, *arguments: object) -> SafeTransaction:
    return SafeTransaction(summary, escrow.deployment.escrow, escrow.calldata(function, *arguments))


def _owned_for_ever(key: Address, owner: Address) -> Refusal:
    return Refusal(Code.CHAIN_REFUSED, f"the purse of {key} belongs to {owner} for ever; use another wallet (tally wallet new)")


async def _note_wait(escrow: Escrow, at: int) -> None:
    from tallystick.chain.state_explainer import moment

    if at > (now := await escrow.rpc.now()):
        note(f"note: it can be executed {moment(at, now)}, not before")


def _write(
    key: Address,
    owner: Address | None,
    plan: Planner,
    file: Path | None,
    deployment: Path | None,
    rpc: str | None,
    *,
    as_json: bool,
) -> None:
    """Plans the transactions for the purse's owner and writes them to a file or stdout. Raises TallyError."""
    if file is not None and file.exists():
        raise BadMessage(f"--out: {file} exists; give a file that does not")

    async def run() -> tuple[Sequence[SafeTransaction], Address, int]:
        async with open_escrow(deployment, rpc) as escrow:
            purse = await escrow.purse(key)
            executor = purse.owner or owner
            if executor is None:
                raise Refusal(Code.CHAIN_REFUSED, f"{key} has no purse yet; open it: tally safe deposit AMOUNT --owner 0x…")
            return await plan(escrow, purse), executor, escrow.deployment.chain_id

    transactions, executor, chain_id = asyncio.run(run())
    document = batch(transactions, executor, chain_id, int(time.time() * 1000))
    if file is not None:
        try:
            write_private(file, (json.dumps(document, indent=2) + "\n").encode(), replace=False)
        except FileExistsError:
            raise BadMessage(f"--out: {file} exists; give a file that does not") from None
    if as_json:
        steps = [
            {"summary": tx.summary, "to": checksum(tx.to), "value": "0", "data": f"0x{tx.data.hex()}"} for tx in transactions
        ]
        parties = {"owner": checksum(executor), "key": checksum(key), "chainId": chain_id}
        show_json(parties | {"transactions": steps, "batch": document})
        return
    if file is None:
        out.print_json(data=document)
        return
    show_table(("no.", "transaction", "to"), [(number, tx.summary, checksum(tx.to)) for number, tx in enumerate(transactions, 1)])
    step(
        f"wrote {file}: load it in the Transaction Builder of the Safe {checksum(executor)}, and check each entry before signing"
    )


def batch(transactions: Sequence[SafeTransaction], owner: Address, chain_id: int, created_ms: int) -> dict[str, Any]:
    """One batch in the format of Safe's Transaction Builder. `created_ms`: Unix time in milliseconds."""
    document: dict[str, Any] = {
        "version": "1.0",
        "chainId": str(chain_id),
        "createdAt": created_ms,
        "meta": {
            "name": "Tallystick",
            "description": "; ".join(transaction.summary for transaction in transactions),
            "txBuilderVersion": "1.16.5",
            "createdFromSafeAddress": checksum(owner),
            "createdFromOwnerAddress": "",
        },
        "transactions": [
            {
                "to": checksum(transaction.to),
                "value": "0",
                "data": f"0x{transaction.data.hex()}",
                "contractMethod": None,
                "contractInputsValues": None,
            }
            for transaction in transactions
        ],
    }
    document["meta"]["checksum"] = batch_checksum(document)
    return document


def batch_checksum(document: dict[str, Any]) -> str:
    """The checksum with which the Transaction Builder detects a modified batch: keccak256 over all members but the name."""
    meta = {name: value for name, value in document["meta"].items() if name != "checksum"} | {"name": None}
    return "0x" + keccak(_canonical(document | {"meta": meta}).encode()).hex()


def _canonical(value: Any) -> str:
    """The Transaction Builder's serialisation: an object is the JSON list of its sorted names, then its values in that order."""
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
