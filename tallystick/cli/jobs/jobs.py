"""`tally job show` and `tally job list`: the jobs of a wallet."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tallystick.cli.onchain import parse_account
from tallystick.cli.options import DEFAULT_WALLET, Config, CoordinatorUrl, Json, PasswordFile, Wallet
from tallystick.cli.output import outcome_words, show_fields, show_json, show_table
from tallystick.protocol.errors import BadMessage, Code, Refusal, TallyError
from tallystick.protocol.types import Address, JobId, format_amount, parse_job_id
from tallystick.runtime.keystore import PASSWORD_HELP

if TYPE_CHECKING:
    from tallystick.client.config import ClientConfig
    from tallystick.client.ledger.ledger import Ledger
    from tallystick.client.ledger.queries import KnownJob

job = typer.Typer(no_args_is_help=True, help="Show the jobs of a wallet.")


@job.command("show")
def show(
    job_id: Annotated[str, typer.Argument(metavar="ID", help="Job id, as in the response header x-tally-job.")],
    config: Config = None,
    wallet: Wallet = DEFAULT_WALLET,
    coordinator_url: CoordinatorUrl = None,
    offline: Annotated[bool, typer.Option("--offline", help="Do not ask the coordinator.")] = False,
    password_file: PasswordFile = None,
    as_json: Json = False,
) -> None:
    """Show a job: its orders, every attempt and why it ended, tokens, cost, receipt and settlement.

    Reads this wallet's ledger, which needs no password, and asks the coordinator, which shows a job only to its payer and
    therefore needs one. There is no prompt: without a password from a file or the environment, the ledger alone is shown.
    """
    try:
        wanted = parse_job_id(job_id, "ID")
    except BadMessage as error:
        raise BadMessage(f"{error}; see: tally job list") from None

    async def find(ledger: Ledger, loaded: ClientConfig) -> None:
        known = await ledger.find_job(wanted)
        status, silence = (None, "not asked") if offline else await _ask_coordinator(loaded, wallet, password_file, wanted)
        if known is None and status is None:
            raise Refusal(
                Code.UNKNOWN_JOB,
                f"ID: neither the ledger of {ledger.payer} nor the coordinator ({silence}) has a job {wanted.hex()}; "
                "see: tally job list",
            )
        from tallystick.client.jobs.export import job_json

        document = (job_json(known) if known else {"job": wanted.hex()}) | {"coordinator": status}
        if as_json:
            show_json(document)
        else:
            _show(document, silence, await _evidence_words(document, loaded, ledger.payer))

    with_ledger(config, wallet, coordinator_url, find)


@job.command("list")
def list_(
    config: Config = None,
    wallet: Wallet = DEFAULT_WALLET,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, max=10_000, help="Number of jobs, newest first.")] = 20,
    as_json: Json = False,
) -> None:
    """List this wallet's latest jobs, newest first. Needs no password."""

    async def read(ledger: Ledger, _config: ClientConfig) -> None:
        jobs = await ledger.latest_jobs(limit)
        if as_json:
            from tallystick.client.jobs.export import job_json

            show_json([job_json(known) for known in jobs])
        else:
            show_table(("job", "at", "model", "state", "dollars"), map(_row, jobs))

    with_ledger(config, wallet, None, read)


def with_ledger(
    config: Path | None, wallet: str, coordinator_url: str | None, act: Callable[[Ledger, ClientConfig], Awaitable[None]]
) -> None:
    """Runs `act` with a wallet's ledger and the client's config. Needs no password. Raises TallyError."""
    from tallystick.client.config import load_config
    from tallystick.client.ledger.ledger import Ledger

    loaded = load_config(config, {"coordinator": coordinator_url})
    payer = parse_account(wallet, "--wallet")

    async def run() -> None:
        ledger = await Ledger.open(loaded.ledger_path(payer), payer)
        try:
            await act(ledger, loaded)
        finally:
            await ledger.close()

    asyncio.run(run())


async def _ask_coordinator(
    config: ClientConfig, wallet: str, password_file: Path | None, wanted: JobId
) -> tuple[dict[str, Any] | None, str]:
    """The coordinator's view of a job; or None and the reason why there is none."""
    from tallystick.client.coordinator.access_tokens import AccessTokens
    from tallystick.client.coordinator.http_client import CoordinatorClient
    from tallystick.runtime.keystore import open_wallet

    def no_password() -> str:
        raise Refusal(
            Code.UNAUTHENTICATED, f"it shows a job to its payer only, which needs the wallet's password: {PASSWORD_HELP}"
        )

    try:
        if wallet.startswith(("0x", "0X")):
            text = "it shows a job to its payer only: give --wallet the payer's wallet instead of its address"
            raise Refusal(Code.UNAUTHENTICATED, text)
        signer = open_wallet(wallet, password_file=password_file, prompt=no_password)
        async with CoordinatorClient(config.coordinator, config) as coordinator:
            coordinator.authorize = AccessTokens(signer, coordinator.info, lambda: int(time.time()))
            return (await coordinator.job(wanted)).raw, ""
    except TallyError as error:
        return None, str(error)


async def _evidence_words(document: dict[str, Any], loaded: ClientConfig, payer: Address) -> str:
    """What the provider committed to of the answer's tokens, and whether the rows are here."""
    if document.get("evidenceRoot") is None:
        return "none"
    from tallystick.client.audits.kept_jobs import KeptJobs

    kept_jobs = KeptJobs(loaded.kept_jobs_path(payer), limit=0, hours=loaded.audits.keep_hours, now=lambda: int(time.time()))
    kept = await kept_jobs.find(parse_job_id(document["job"], "ID"))
    if kept is None or not kept.evidence:
        return "the receipt commits to it; its rows are not kept here"
    return f"{len(kept.rows)} tokens, as the receipt commits to"


def _show(document: dict[str, Any], silence: str, evidence: str) -> None:
    status = document["coordinator"]
    state = document.get("state")
    fields: list[tuple[str, object]] = []
    if state:
        usage, reason = document["usage"], document["reason"]
        fields += [
            ("state", f"{state}: {reason}" if reason else state),
            ("model", document["model"]),
            ("payer", document["payer"]),
        ]
        fields += [("submitted", show_time(document["createdAt"])), ("ended", show_time(document["finishedAt"]))]
        if usage:
            fields += [("provider", document["provider"]), ("outcome", outcome_words(document["outcome"]))]
            fields += [("tokens", f"{usage['inputTokens']} + {usage['outputTokens']}")]
            fields += [("cost, dollars", document["costDollars"]), ("receipt", document["receipt"]["digest"])]
            fields += [("evidence", evidence)]
    if status:
        settlement = status.get("settlement")
        tx = settlement.get("tx") if isinstance(settlement, dict) else None
        fields += [("coordinator's state", _coordinator_state(status)), ("settled in", tx or "not settled yet")]
    else:
        fields += [("coordinator's state", f"unknown: {silence}")]
    show_fields(fields, title=f"job {document['job']}")
    if status:
        rows = [_attempt_row(attempt) for attempt in status.get("attempts") or () if isinstance(attempt, dict)]
        show_table(("attempt", "provider", "state", "reason", "receipt"), rows, title="Attempts, by the coordinator's account")
    if document.get("shortlist"):
        orders = ((order["provider"], order["state"], format_amount(int(order["cap"]))) for order in document["shortlist"])
        show_table(("provider", "order", "cap, dollars"), orders, title="Orders that this wallet signed")


def _coordinator_state(status: dict[str, Any]) -> str:
    """The job's state at the coordinator, with its place if it waits for a free slot."""
    state = str(status["state"])
    if status.get("queue") is None:
        return state
    from tallystick.protocol.queue_place import QueuePlace

    place = QueuePlace.from_json(status["queue"])
    return f"{state}: all providers are busy; number {place.position} in the queue{place.words}"


def _attempt_row(attempt: dict[str, Any]) -> tuple[object, ...]:
    number = f"{attempt.get('attempt')} (beside it)" if attempt.get("hedged") else attempt.get("attempt")
    fields = (attempt.get(name) for name in ("provider", "state", "reason"))
    return (number, *fields, "yes" if attempt.get("receipt") else "no")


def _row(known: KnownJob) -> tuple[object, ...]:
    at = f"{datetime.fromtimestamp(known.created_at).astimezone():%m-%d %H:%M}"
    return known.job.hex(), at, known.model, known.state.value, format_amount(known.cost) if known.receipt else ""


def show_time(at: int | None) -> str:
    """A Unix time in this machine's time zone; empty for None."""
    return "" if at is None else f"{datetime.fromtimestamp(at).astimezone():%F %T}"
