"""What providers signed: `tally receipt verify` for those who were not there, and what became of dishonest receipts."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tallystick.cli.jobs.jobs import show_time, with_books
from tallystick.cli.onchain import account_of, open_escrow, require_coins
from tallystick.cli.options import DEFAULT_WALLET, Config, DeploymentFile, Json, PasswordFile, Rpc, Wallet, unlock
from tallystick.cli.output import show_facts, show_json, step
from tallystick.protocol.errors import BadMessage, Code, Refusal, TallyError
from tallystick.protocol.types import Amount, format_amount

if TYPE_CHECKING:
    from tallystick.chain.escrow import Escrow
    from tallystick.client.config import ClientConfig
    from tallystick.client.ledger.ledger import Ledger
    from tallystick.client.receipts.evidence import EvidenceFile
    from tallystick.client.receipts.proof import Finding
    from tallystick.protocol.eip712 import Domain, Signed, Signer
    from tallystick.protocol.messages import Receipt

app = typer.Typer(no_args_is_help=True, help="Check what providers signed.")
Claim = Annotated[
    str | None, typer.Option("--claim", metavar="TX", help="The transaction with the claim, instead of the newest settlements.")
]


@app.command("verify")
def verify(
    file: Annotated[
        Path,
        typer.Argument(
            help="A proof (`tally chat --save-proof`, a gateway's `proofs` folder), or evidence (the folder `evidence`)."
        ),
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
    from tallystick.client.receipts.evidence import FORMAT, EvidenceFile
    from tallystick.client.receipts.proof import describe, read_proof
    from tallystick.client.receipts.token_audit import recount_with
    from tallystick.protocol.wire import loads

    data = _read(file)
    raw = loads(data, "file")
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
        folder = loaded.ledger_path(ledger.payer).parent / "evidence"
        latest = {one.job: one for one in await ledger.evidence()}
        found = [(one, folder / f"{one.job.hex()}.json", _convinces(folder / f"{one.job.hex()}.json")) for one in latest.values()]
        told = [
            {"provider": one.provider, "job": one.job.hex(), "foundAt": one.recorded_at, "reason": one.reason}
            | {"file": str(path), "convincesOthers": convinces}
            for one, path, convinces in found
        ]
        barred = await ledger.blocked()
        others = {provider: why for provider, why in barred.items() if all(provider != one.provider for one in latest.values())}
        if as_json:
            blank = {"job": None, "foundAt": None, "file": None, "convincesOthers": False}
            show_json(told + [{"provider": provider, "reason": why} | blank for provider, why in others.items()])
        elif not told and not others:
            step("no provider was dishonest to this wallet")
        else:
            for one, path, convinces in found:
                facts = [("found", show_time(one.recorded_at)), ("what is wrong", one.reason), ("evidence", path)]
                facts.append(("shows it to others", "yes" if convinces else "no: it is this wallet's word, or its count"))
                show_facts(facts, title=f"provider {one.provider}")
            for provider, why in others.items():
                show_facts([("why it gets no more orders", why)], title=f"provider {provider}")
            step("they get no more orders of this wallet; to change that: tally receipt unblock PROVIDER")

    with_books(config, wallet, None, read)


@app.command("unblock")
def unblock(
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
        if not await ledger.unblock(whom, int(time.time())):
            raise Refusal(Code.BAD_MESSAGE, f"{whom} is not among those that this wallet leaves out: tally receipt evidence")
        if as_json:
            show_json({"provider": whom, "unblocked": True})
        else:
            step(f"{whom} may have orders again; a gateway that runs notices within seconds")

    with_books(config, wallet, None, act)


def _read(file: Path) -> bytes:
    """A file's bytes. Raises BadMessage where there are none, or too many."""
    from tallystick.client.receipts.proof import MAX_BYTES

    try:
        with file.open("rb") as opened:
            data = opened.read(MAX_BYTES + 1)
    except OSError as error:
        raise BadMessage(f"{file}: {error.strerror}") from None
    if len(data) > MAX_BYTES:
        raise BadMessage(f"{file}: larger than {MAX_BYTES} bytes")
    return data


def _convinces(path: Path) -> bool:
    from tallystick.client.receipts.evidence import read_evidence

    try:
        return read_evidence(path.read_bytes()).convinces
    except (OSError, TallyError):
        return False


@app.command("report")
def report(
    file: Annotated[Path, typer.Argument(help="Evidence, or a proof: anything with the provider's receipt in it.")],
    claim: Claim = None,
    wallet: Wallet = DEFAULT_WALLET,
    password_file: PasswordFile = None,
    deployment: DeploymentFile = None,
    rpc: Rpc = None,
    as_json: Json = False,
) -> None:
    """Takes a dishonest provider to the chain: it loses stake, this wallet gets the reporter's part. Punished are two different
    receipts of one seq, and a claim above a receipt of the same or a later seq: the claim is looked up on chain.

    Other dishonesty costs a provider this wallet's orders, but not its stake.
    """
    from tallystick.cli.jobs import overclaims

    domain, receipt, others = _read_receipts(file)
    other = next((one for one in others if one.message.seq == receipt.message.seq and one.message != receipt.message), None)

    async def run() -> None:
        async with open_escrow(deployment, rpc) as escrow:
            if escrow.deployment.domain != domain:
                raise BadMessage(f"{file}: of contract {domain.contract} on chain {domain.chain_id}, another deployment's")
            signer = unlock(wallet, password_file)
            if other is not None and claim is None:
                await _slash_equivocation(escrow, signer, receipt, other, as_json=as_json)
                return
            also = f"{file}: no two receipts of the same seq; " if other is None else ""
            found = await overclaims.find(escrow, [receipt, *others], claim, also)
            await overclaims.slash(escrow, signer, found, as_json=as_json)

    asyncio.run(run())


async def _slash_equivocation(
    escrow: Escrow, signer: Signer, receipt: Signed[Receipt], other: Signed[Receipt], *, as_json: bool
) -> None:
    from tallystick.chain.events import Slashed
    from tallystick.chain.sender import Sender

    await require_coins(escrow, signer.address)
    tx = await escrow.slash_equivocation(Sender(escrow.rpc, signer), receipt, other)
    taken, provider = sum(event.amount for event in tx.of(Slashed)), receipt.message.provider
    if as_json:
        show_json({"provider": provider, "slashed": str(taken), "tx": tx.hash, "block": tx.block})
    else:
        step(f"{provider} lost {format_amount(Amount(taken))}; your part is credit: tally cash-out")


def _read_receipts(file: Path) -> tuple[Domain, Signed[Receipt], tuple[Signed[Receipt], ...]]:
    """The deployment of an evidence or proof file, its receipt, and the others of the same tab. Raises BadMessage."""
    from tallystick.client.receipts.evidence import FORMAT, EvidenceFile
    from tallystick.client.receipts.proof import read_proof
    from tallystick.protocol.wire import loads

    data = _read(file)
    raw = loads(data, "file")
    if isinstance(raw, dict) and raw.get("tallystick") == FORMAT:
        found = EvidenceFile.from_json(raw)
        mine = found.receipt.message
        same = [one for one in found.others if (one.message.payer, one.message.provider) == (mine.payer, mine.provider)]
        return found.domain, found.receipt, tuple(same)
    proof = read_proof(data)
    return proof.domain, proof.receipt, ()


@app.command("overclaims")
def find_overclaims(
    provider: Annotated[str, typer.Argument(help="The provider: an address, or a wallet's name.")],
    claim: Claim = None,
    report_them: Annotated[bool, typer.Option("--report", help="Take them to the chain: the provider loses stake.")] = False,
    config: Config = None,
    wallet: Wallet = DEFAULT_WALLET,
    password_file: PasswordFile = None,
    deployment: DeploymentFile = None,
    rpc: Rpc = None,
    as_json: Json = False,
) -> None:
    """Compares what a provider claimed on chain from this wallet with all receipts that it gave to this wallet.

    With --report each claim above a receipt of the same or a later seq costs the provider stake; this wallet gets the reporter's
    part.
    """
    from tallystick.cli.jobs import overclaims

    whom = account_of(provider, "PROVIDER")

    async def act(ledger: Ledger, _config: ClientConfig) -> None:
        async with open_escrow(deployment, rpc) as escrow:
            domain = escrow.deployment.domain
            refused = [one for one in await ledger.evidence() if (one.provider, one.domain) == (whom, domain)]
            receipts = [*await ledger.receipts(domain, whom), *(one.receipt for one in refused)]
            if not receipts:
                raise Refusal(Code.BAD_MESSAGE, f"this wallet's books have no receipt of {whom}, so no claim can be compared")
            try:
                found = await overclaims.find(escrow, receipts, claim)
            except overclaims.NoOverclaim as none:
                if report_them or claim is not None:
                    raise
                if as_json:
                    show_json({"provider": whom, "slashed": None, "overclaims": []})
                else:
                    step(str(none))
                return
            if report_them:
                await overclaims.slash(escrow, unlock(wallet, password_file), found, as_json=as_json)
            elif as_json:
                show_json({"provider": whom, "slashed": None, "overclaims": [overclaims.describe(one) for one in found]})
            else:
                overclaims.show(found)
                step(f"the contract punishes that: tally receipt overclaims {whom} --report")

    with_books(config, wallet, None, act)


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
