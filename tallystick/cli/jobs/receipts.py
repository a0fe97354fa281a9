"""`tally receipt`: verify proofs and evidence offline, list and unblock providers, report dishonest ones to the contract."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tallystick.cli.jobs.jobs import show_time, with_ledger
from tallystick.cli.onchain import open_escrow, parse_account, require_gas
from tallystick.cli.options import DEFAULT_WALLET, Config, DeploymentFile, Json, PasswordFile, Provider, Rpc, Wallet, unlock
from tallystick.cli.output import show_fields, show_json, step
from tallystick.cli.progress import activity
from tallystick.protocol.errors import BadMessage, Code, Refusal, TallyError

if TYPE_CHECKING:
    from tallystick.chain.escrow import Escrow
    from tallystick.client.config import ClientConfig
    from tallystick.client.ledger.ledger import Ledger
    from tallystick.client.receipts.evidence import EvidenceFile
    from tallystick.client.receipts.proof import Finding, Proof
    from tallystick.protocol.eip712 import Domain, Signed, Signer
    from tallystick.protocol.messages import Receipt

app = typer.Typer(no_args_is_help=True, help="Verify what providers signed, and act on dishonest receipts.")
Claim = Annotated[
    str | None, typer.Option("--claim", metavar="TX", help="Transaction with the claim; default: the newest settlements.")
]


@app.command("verify")
def verify(
    file: Annotated[
        Path,
        typer.Argument(
            help="A proof (from `tally chat --save-proof`, or the gateway's `proofs` folder) or evidence (from the `evidence` "
            "folder)."
        ),
    ],
    tokenizer: Annotated[
        Path | None, typer.Option(help="The model's tokenizer.json, to count the tokens of evidence again.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Verify a proof offline: that order and receipt are signed, that the price is right, and that the answer is the one signed.
    Or verify evidence: that a receipt is dishonest, or that audited answers are not what their provider sold.

    The exit code is 1 if a check fails. Needs only the file: no wallet, no network, no chain.
    """
    from tallystick.client.receipts.proof import Proof, describe
    from tallystick.client.receipts.token_audit import recount_with

    if _is_audit_evidence(file):
        _show_audit_evidence(file, as_json=as_json)
        return
    document = _read(file)
    if not isinstance(document, Proof):
        _show_evidence(document, document.check(None if tokenizer is None else recount_with(tokenizer)), as_json=as_json)
        return
    findings = document.check()
    if as_json:
        show_json(describe(document, findings))
        return
    show_fields(((finding.check, finding.found) for finding in findings), title=f"job {document.terms.job.hex()}")
    step("the proof is valid; to see if the chain paid it: tally job show ID")


@app.command("evidence")
def evidence(config: Config = None, wallet: Wallet = DEFAULT_WALLET, as_json: Json = False) -> None:
    """List dishonest receipts that this wallet was given, with their evidence files, and the providers that it blocks.

    A blocked provider gets no more orders: for a dishonest receipt, for answers that it charged and did not deliver, or for
    payments beyond its receipts.
    """

    async def read(ledger: Ledger, loaded: ClientConfig) -> None:
        folder = loaded.ledger_path(ledger.payer).parent / "evidence"
        latest = {known.job: known for known in await ledger.evidence()}
        records: list[dict[str, Any]] = []
        for known in latest.values():
            path = folder / f"{known.job.hex()}.json"
            record = {"provider": known.provider, "job": known.job.hex(), "foundAt": known.recorded_at, "reason": known.reason}
            records.append(record | {"file": str(path), "convincesOthers": _convinces_others(path)})
        dishonest = {record["provider"] for record in records}
        others = {provider: reason for provider, reason in (await ledger.blocked()).items() if provider not in dishonest}
        if as_json:
            blank = {"job": None, "foundAt": None, "file": None, "convincesOthers": False}
            show_json(records + [{"provider": provider, "reason": reason} | blank for provider, reason in others.items()])
        elif not records and not others:
            step("this wallet has no dishonest receipt and blocks no provider")
        else:
            _show_blocked(records, others)

    with_ledger(config, wallet, None, read)


def _show_blocked(records: list[dict[str, Any]], others: dict[Any, str]) -> None:
    for record in records:
        fields = [("found", show_time(record["foundAt"])), ("reason", record["reason"]), ("evidence", record["file"])]
        convinces = "yes" if record["convincesOthers"] else "no: it rests on this wallet's word or token count"
        show_fields([*fields, ("convinces others", convinces)], title=f"provider {record['provider']}")
    for provider, reason in others.items():
        show_fields([("blocked because", reason)], title=f"provider {provider}")
    step("these providers get no more orders of this wallet; to change that: tally receipt unblock PROVIDER")


@app.command("unblock")
def unblock(
    provider: Provider,
    config: Config = None,
    wallet: Wallet = DEFAULT_WALLET,
    as_json: Json = False,
) -> None:
    """Allow orders to a blocked provider again.

    For a receipt that was refused by mistake (for example with a wrong tokenizer), or for a loss that you accept.
    """
    address = parse_account(provider, "PROVIDER")

    async def act(ledger: Ledger, _config: ClientConfig) -> None:
        if not await ledger.unblock(address, int(time.time())):
            raise Refusal(Code.BAD_MESSAGE, f"PROVIDER: this wallet does not block {address}; see: tally receipt evidence")
        if as_json:
            show_json({"provider": address, "unblocked": True})
        else:
            step(f"{address} may get orders again; a running gateway notices within seconds")

    with_ledger(config, wallet, None, act)


def _read(file: Path) -> EvidenceFile | Proof:
    """Reads an evidence file or a proof. Raises BadMessage."""
    from tallystick.client.audits.evidence_file import FORMAT as AUDIT_FORMAT
    from tallystick.client.receipts.evidence import FORMAT, EvidenceFile
    from tallystick.client.receipts.proof import FORMAT as PROOF_FORMAT
    from tallystick.client.receipts.proof import read_proof
    from tallystick.protocol.wire import loads

    data = _read_bytes(file)
    raw = loads(data, str(file))
    form = raw.get("tallystick") if isinstance(raw, dict) else None
    if form == FORMAT:
        return EvidenceFile.from_json(raw)
    if form != PROOF_FORMAT:
        got = f"one with {form!r:.60}" if form is not None else "one without it" if isinstance(raw, dict) else "no object"
        raise BadMessage(
            f'{file}: expected a JSON object whose member "tallystick" is "{PROOF_FORMAT}" (a proof), "{FORMAT}" (evidence of a '
            f'dishonest receipt) or "{AUDIT_FORMAT}" (evidence of an audit; `tally receipt verify` alone takes it), got {got}'
        )
    return read_proof(data)


def _convinces_others(path: Path) -> bool:
    from tallystick.client.receipts.evidence import read_evidence

    try:
        return read_evidence(path.read_bytes()).convinces
    except (OSError, TallyError):
        return False


@app.command("report")
def report(
    file: Annotated[Path, typer.Argument(help="Evidence or a proof: a file that contains the provider's receipt.")],
    claim: Claim = None,
    wallet: Wallet = DEFAULT_WALLET,
    password_file: PasswordFile = None,
    deployment: DeploymentFile = None,
    rpc: Rpc = None,
    as_json: Json = False,
) -> None:
    """Report a dishonest provider to the contract: it loses stake, and this wallet gets the reporter's part.

    The contract slashes for two different receipts of one number, and for a claim above a receipt of the same or a later number;
    the claim is found on chain. Other dishonesty costs the provider this wallet's orders, but no stake.
    """
    from tallystick.cli.jobs import overclaims

    domain, receipt, others = _read_receipts(file)
    contradicting = next(
        (other for other in others if other.message.seq == receipt.message.seq and other.message != receipt.message), None
    )

    async def run() -> None:
        async with open_escrow(deployment, rpc) as escrow:
            if escrow.deployment.domain != domain:
                raise BadMessage(
                    f"{file}: its receipts are for contract {domain.contract} on chain {domain.chain_id}, another deployment "
                    "than this one; name its file with --deployment"
                )
            signer = unlock(wallet, password_file)
            if contradicting is not None and claim is None:
                await _slash_equivocation(escrow, signer, receipt, contradicting, as_json=as_json)
                return
            context = f"{file}: no two receipts of the same number; " if contradicting is None else ""
            overclaim_list = await overclaims.find(escrow, [receipt, *others], claim, context)
            await overclaims.slash(escrow, signer, overclaim_list, as_json=as_json)

    asyncio.run(run())


async def _slash_equivocation(
    escrow: Escrow, signer: Signer, receipt: Signed[Receipt], other: Signed[Receipt], *, as_json: bool
) -> None:
    from tallystick.chain.events import Slashed
    from tallystick.cli.jobs.overclaims import report_slashed
    from tallystick.cli.transactions import ShownSender

    await require_gas(escrow, signer.address)
    tx = await escrow.slash_equivocation(ShownSender(escrow.rpc, signer), receipt, other)
    slashed, provider = sum(event.amount for event in tx.of(Slashed)), receipt.message.provider
    if as_json:
        show_json({"provider": provider, "slashed": str(slashed), "tx": tx.hash, "block": tx.block})
    else:
        report_slashed(provider, slashed)


def _read_receipts(file: Path) -> tuple[Domain, Signed[Receipt], tuple[Signed[Receipt], ...]]:
    """The deployment of an evidence or proof file, its receipt, and other receipts of the same tab. Raises BadMessage."""
    from tallystick.client.receipts.proof import Proof

    document = _read(file)
    if isinstance(document, Proof):
        return document.domain, document.receipt, ()
    tab = (document.receipt.message.payer, document.receipt.message.provider)
    others = [other for other in document.others if (other.message.payer, other.message.provider) == tab]
    return document.domain, document.receipt, tuple(others)


@app.command("overclaims")
def find_overclaims(
    provider: Provider,
    claim: Claim = None,
    report_them: Annotated[bool, typer.Option("--report", help="Report them to the contract: the provider loses stake.")] = False,
    config: Config = None,
    wallet: Wallet = DEFAULT_WALLET,
    password_file: PasswordFile = None,
    deployment: DeploymentFile = None,
    rpc: Rpc = None,
    as_json: Json = False,
) -> None:
    """Compare a provider's claims on chain with all receipts that it gave to this wallet.

    With --report, each claim above a receipt of the same or a later number costs the provider stake; this wallet gets the
    reporter's part.
    """
    from tallystick.cli.jobs import overclaims

    address = parse_account(provider, "PROVIDER")

    async def act(ledger: Ledger, _config: ClientConfig) -> None:
        async with open_escrow(deployment, rpc) as escrow:
            domain = escrow.deployment.domain
            refused = [known for known in await ledger.evidence() if (known.provider, known.domain) == (address, domain)]
            receipts = [*await ledger.receipts(domain, address), *(known.receipt for known in refused)]
            if not receipts:
                raise Refusal(Code.BAD_MESSAGE, f"PROVIDER: this wallet's ledger has no receipt of {address} to compare with")
            try:
                with activity("reading the provider's claims on chain"):
                    overclaim_list = await overclaims.find(escrow, receipts, claim)
            except overclaims.NoOverclaim as none:
                if report_them or claim is not None:
                    raise
                if as_json:
                    show_json({"provider": address, "slashed": None, "overclaims": []})
                else:
                    step(str(none))
                return
            if report_them:
                await overclaims.slash(escrow, unlock(wallet, password_file), overclaim_list, as_json=as_json)
            elif as_json:
                documents = [overclaims.describe(overclaim) for overclaim in overclaim_list]
                show_json({"provider": address, "slashed": None, "overclaims": documents})
            else:
                overclaims.show(overclaim_list)
                step(f"the contract slashes for this: tally receipt overclaims {address} --report")

    with_ledger(config, wallet, None, act)


def _read_bytes(file: Path) -> bytes:
    """Reads a file of at most MAX_BYTES. Raises BadMessage."""
    from tallystick.client.receipts.proof import MAX_BYTES

    try:
        with file.open("rb") as opened:
            data = opened.read(MAX_BYTES + 1)
    except OSError as error:
        raise BadMessage(f"{file}: {error.strerror}") from None
    if len(data) > MAX_BYTES:
        raise BadMessage(f"{file}: expected at most {MAX_BYTES} bytes, got more")
    return data


def _is_audit_evidence(file: Path) -> bool:
    from tallystick.client.audits.evidence_file import FORMAT
    from tallystick.protocol.wire import loads

    raw = loads(_read_bytes(file), str(file))
    return isinstance(raw, dict) and raw.get("tallystick") == FORMAT


def _show_audit_evidence(file: Path, *, as_json: bool) -> None:
    from tallystick.client.audits.evidence_file import read_audit_evidence

    evidence = read_audit_evidence(_read_bytes(file))
    findings = evidence.check()
    if as_json:
        documents = [{"check": finding.check, "found": finding.found} for finding in findings]
        show_json({"dishonest": True, "provider": evidence.provider, "model": evidence.model, "findings": documents})
        return
    show_fields(((finding.check, finding.found) for finding in findings), title=f"evidence against {evidence.provider}")
    step("the provider did not serve what it sold: whoever trusts these referees can check that by this file")


def _show_evidence(evidence: EvidenceFile, findings: list[Finding], *, as_json: bool) -> None:
    message = evidence.receipt.message
    if as_json:
        documents = [{"check": finding.check, "found": finding.found} for finding in findings]
        show_json({"dishonest": True, "provider": message.provider, "payer": message.payer, "findings": documents})
        return
    show_fields(((finding.check, finding.found) for finding in findings), title=f"evidence against {message.provider}")
    step("the receipt is dishonest, and this file shows it to anyone")
    if evidence.equivocation is not None:
        step("the contract slashes for this: tally receipt report FILE")
