"""What providers signed: `tally receipt verify` for those who were not there, and what became of dishonest receipts."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tallystick.cli.jobs import show_time, with_books
from tallystick.cli.onchain import account_of, open_escrow, require_coins
from tallystick.cli.options import DEFAULT_WALLET, Config, DeploymentFile, Json, PasswordFile, Rpc, Wallet, unlock
from tallystick.cli.output import show_facts, show_json, step
from tallystick.protocol.errors import BadMessage, Code, Refusal, TallyError
from tallystick.protocol.types import Amount, format_amount

if TYPE_CHECKING:
    from tallystick.client.config import ClientConfig
    from tallystick.client.evidence import EvidenceFile
    from tallystick.client.ledger import Ledger
    from tallystick.client.proof import Finding

app = typer.Typer(no_args_is_help=True, help="Check what providers signed.")


@app.command("verify")
def verify(
    file: Annotated[
        Path,
        typer.Argument(help="A proof (`tally chat --save`, a gateway's `proofs` folder), or evidence (the folder `evidence`)."),
    ],
    tokenizer: Annotated[
        Path | None, typer.Option(help="A model's tokenizer.json, to count the tokens of evidence again.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Checks a job's proof offline: who signed order and receipt, that the price is right, and that the answer is the one signed.
    Or evidence: what shows to anyone that a receipt is dishonest.

    Ends with exit code 1 if anything is not so. It needs nothing but the file: neither wallet, nor network, nor chain.
    """
    from tallystick.client.evidence import FORMAT, EvidenceFile
    from tallystick.client.proof import MAX_BYTES, describe, read_proof
    from tallystick.client.recount import recount_with
    from tallystick.protocol.wire import loads

    try:
        with file.open("rb") as opened:
            data = opened.read(MAX_BYTES + 1)
    except OSError as error:
        raise BadMessage(f"{file}: {error.strerror}") from None
    raw = loads(data, "file") if len(data) <= MAX_BYTES else None
    if isinstance(raw, dict) and raw.get("tallystick") == FORMAT:
        evidence = EvidenceFile.from_json(raw)
        _show_evidence(evidence, evidence.check(None if tokenizer is None else recount_with(tokenizer)), as_json=as_json)
        return
    proof = read_proof(data)
    findings = proof.check()
    if as_json:
        show_json(describe(proof, findings))
        return
    show_facts(((finding.check, finding.found) for finding in findings), title=f"job {proof.terms.job.hex()}")
    step("all of it is so; whether the chain paid it is another question: tally job show")


@app.command("evidence")
def evidence(config: Config = None, wallet: Wallet = DEFAULT_WALLET, as_json: Json = False) -> None:
    """Lists the dishonest receipts that this wallet was given, with the file of each, and the providers that get no more orders
    of it, with the reason: a dishonest receipt, answers that were charged and did not arrive, or payments beyond receipts.
    """

    async def read(ledger: Ledger, loaded: ClientConfig) -> None:
        folder = loaded.state_file(ledger.payer).parent / "evidence"
        latest = {one.job: one for one in await ledger.evidence()}
        found = [(one, folder / f"{one.job.hex()}.json", _convinces(folder / f"{one.job.hex()}.json")) for one in latest.values()]
        told = [
            {"provider": one.provider, "job": one.job.hex(), "foundAt": one.found_at, "reason": one.reason}
            | {"file": str(path), "convincesOthers": convinces}
            for one, path, convinces in found
        ]
        barred = await ledger.frozen()
        others = {provider: why for provider, why in barred.items() if all(provider != one.provider for one in latest.values())}
        if as_json:
            blank = {"job": None, "foundAt": None, "file": None, "convincesOthers": False}
            show_json(told + [{"provider": provider, "reason": why} | blank for provider, why in others.items()])
        elif not told and not others:
            step("no provider was dishonest to this wallet")
        else:
            for one, path, convinces in found:
                facts = [("found", show_time(one.found_at)), ("what is wrong", one.reason), ("evidence", path)]
                facts.append(("shows it to others", "yes" if convinces else "no: it is this wallet's word, or its count"))
                show_facts(facts, title=f"provider {one.provider}")
            for provider, why in others.items():
                show_facts([("why it gets no more orders", why)], title=f"provider {provider}")
            step("they get no more orders of this wallet; to change that: tally receipt forgive PROVIDER")

    with_books(config, wallet, None, read)


@app.command("forgive")
def forgive(
    provider: Annotated[str, typer.Argument(help="The provider: an address, or a wallet's name.")],
    config: Config = None,
    wallet: Wallet = DEFAULT_WALLET,
    as_json: Json = False,
) -> None:
    """Lets a provider have orders of this wallet again, where its receipt was refused by mistake, say by a wrong tokenizer, or
    where it charged for answers that did not arrive, or was paid beyond its receipts, and you accept that.
    """
    whom = account_of(provider, "PROVIDER")

    async def act(ledger: Ledger, _config: ClientConfig) -> None:
        if not await ledger.forgive(whom, int(time.time())):
            raise Refusal(Code.BAD_MESSAGE, f"{whom} is not among those that this wallet leaves out: tally receipt evidence")
        if as_json:
            show_json({"provider": whom, "forgiven": True})
        else:
            step(f"{whom} may have orders again; a gateway that runs notices within seconds")

    with_books(config, wallet, None, act)


def _convinces(path: Path) -> bool:
    from tallystick.client.evidence import read_evidence

    try:
        return read_evidence(path.read_bytes()).convinces
    except (OSError, TallyError):
        return False


@app.command("report")
def report(
    file: Annotated[Path, typer.Argument(help="Evidence with two receipts of the same seq.")],
    wallet: Wallet = DEFAULT_WALLET,
    password_file: PasswordFile = None,
    deployment: DeploymentFile = None,
    rpc: Rpc = None,
    as_json: Json = False,
) -> None:
    """Takes evidence of two contradicting receipts to the chain: the provider loses stake, this wallet gets the reporter's part.

    Other dishonesty costs a provider this wallet's orders, but not its stake.
    """
    from tallystick.chain.events import Slashed
    from tallystick.chain.sender import Sender
    from tallystick.client.evidence import read_evidence

    try:
        found = read_evidence(file.read_bytes())
    except OSError as error:
        raise BadMessage(f"{file}: {error.strerror}") from None
    other = found.equivocation
    if other is None:
        raise Refusal(Code.BAD_MESSAGE, f"{file}: no two receipts of the same seq, which is what the contract punishes")

    async def run() -> None:
        async with open_escrow(deployment, rpc) as escrow:
            signer = unlock(wallet, password_file)
            await require_coins(escrow, signer.address)
            tx = await escrow.slash_equivocation(Sender(escrow.rpc, signer), found.receipt, other)
        taken = sum(event.amount for event in tx.of(Slashed))
        if as_json:
            show_json({"provider": found.receipt.message.provider, "slashed": str(taken), "tx": tx.hash, "block": tx.block})
        else:
            step(f"{found.receipt.message.provider} lost {format_amount(Amount(taken))}; your part is credit: tally cash-out")

    asyncio.run(run())


def _show_evidence(evidence: EvidenceFile, findings: list[Finding], *, as_json: bool) -> None:
    message = evidence.receipt.message
    if as_json:
        told = [{"check": finding.check, "found": finding.found} for finding in findings]
        show_json({"dishonest": True, "provider": message.provider, "payer": message.payer, "findings": told})
        return
    show_facts(((finding.check, finding.found) for finding in findings), title=f"evidence against {message.provider}")
    step("the receipt is dishonest, whoever looks at it")
    if evidence.equivocation is not None:
        step("the contract punishes that: tally receipt report FILE")
