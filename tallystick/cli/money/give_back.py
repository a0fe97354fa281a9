"""`tally give-back`: a provider returns what a payer has reserved for it, at once or by a signed consent that the payer sends."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer

from tallystick.cli.onchain import open_escrow, parse_account, parse_duration, require_gas
from tallystick.cli.options import DEFAULT_WALLET, DeploymentFile, Json, PasswordFile, Rpc, Wallet, unlock
from tallystick.cli.output import dollars, json_fields, show_json, step
from tallystick.protocol.eip712 import Signed, loads_signed
from tallystick.protocol.errors import BadMessage, Code, Refusal
from tallystick.protocol.messages import Release
from tallystick.protocol.types import Address, Amount, Seconds, parse_amount
from tallystick.runtime.keystore import write_private

MAX_CONSENT_BYTES = 1 << 16


def give_back(
    payer: Annotated[str, typer.Argument(help="Payer whose reservation is reduced: an address or a wallet name.")],
    keep: Annotated[str, typer.Option("--keep", help="Dollars that stay reserved, such as what the payer still owes.")] = "0",
    consent: Annotated[
        Path | None,
        typer.Option(
            "--consent", help="Write a signed consent to this file instead, for `tally release PROVIDER --consent FILE`."
        ),
    ] = None,
    valid: Annotated[str, typer.Option("--valid", help="How long the consent is valid, for example 1h.")] = "1h",
    wallet: Wallet = DEFAULT_WALLET,
    password_file: PasswordFile = None,
    deployment: DeploymentFile = None,
    rpc: Rpc = None,
    as_json: Json = False,
) -> None:
    """Give a payer back what it has reserved for this provider, without its waiting time. The --wallet is the provider's.

    Collect what the payer owes first (`tally node collect`). With --consent nothing is sent: the payer pays the gas.
    """
    account, floor = parse_account(payer, "PAYER"), parse_amount(keep, field="--keep")
    seconds = parse_duration(valid, "--valid")

    async def run() -> None:
        from tallystick.cli.transactions import ShownSender

        async with open_escrow(deployment, rpc) as escrow:
            signer = unlock(wallet, password_file)
            reserved = (await escrow.tab(account, signer.address)).reserved
            if reserved <= floor:
                raise Refusal(
                    Code.CHAIN_REFUSED,
                    f"{account} has {dollars(reserved)} reserved for {signer.address}, which is not more than --keep {keep}: "
                    "nothing was sent",
                )
            freed = Amount(reserved - floor)
            fields = {"payer": account, "provider": signer.address, "given_back": freed, "reserved": floor}
            if consent is not None:
                deadline = Seconds(await escrow.rpc.now() + seconds)
                unsigned = Release(payer=account, provider=signer.address, floor=floor, deadline=deadline)
                signed = signer.sign(unsigned, escrow.deployment.domain)
                write_private(consent, signed.dumps().encode(), replace=False)
                fields |= {"consent": str(consent), "deadline": deadline}
                command = "tally release PROVIDER --consent FILE"
                text = f"wrote {consent}, with which the payer frees {dollars(freed)} within {valid}: {command}"
            else:
                await require_gas(escrow, signer.address)
                tx = await escrow.give_back(ShownSender(escrow.rpc, signer), account, floor)
                fields |= {"tx": tx.hash, "block": tx.block}
                text = f"{dollars(freed)} are free again for {account}; {dollars(floor)} stay reserved"
        if as_json:
            show_json(json_fields(fields))
        else:
            step(text)

    if consent is not None and consent.exists():
        raise BadMessage(f"--consent: {consent} exists; give a file that does not")
    asyncio.run(run())


def read_consent(path: Path, payer: Address, provider: Address) -> Signed[Release]:
    """The consent that `tally give-back --consent` wrote. Raises BadMessage if it is for another tab."""
    try:
        with path.open("rb") as file:
            signed = loads_signed(Release, file.read(MAX_CONSENT_BYTES))
    except OSError as error:
        raise BadMessage(f"--consent: {path}: {error.strerror}") from None
    parties = (signed.message.payer, signed.message.provider)
    if parties != (payer, provider):
        raise BadMessage(f"--consent: expected the consent of {provider} for {payer}, got that of {parties[1]} for {parties[0]}")
    return signed
