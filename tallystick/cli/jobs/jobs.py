"""Looking at jobs: `tally job show`, `tally job list`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from tallystick.cli.onchain import account_of
from tallystick.cli.options import DEFAULT_WALLET, Config, Json, PasswordFile, Wallet
from tallystick.cli.output import show_facts, show_json, show_rows
from tallystick.protocol.errors import Code, Refusal, TallyError
from tallystick.protocol.types import JobId, format_amount, parse_job_id
from tallystick.runtime.keystore import PASSWORD_HELP

if TYPE_CHECKING:
    from tallystick.client.config import ClientConfig
    from tallystick.client.ledger.ledger import Ledger
    from tallystick.client.ledger.queries import KnownJob

job = typer.Typer(no_args_is_help=True, help="See what became of jobs.")

T = TypeVar("T")


@job.command("show")
def show(
    job_id: Annotated[str, typer.Argument(metavar="ID", help="The job's id, as in the header x-tally-job.")],
    config: Config = None,
    wallet: Wallet = DEFAULT_WALLET,
    coordinator_url: Annotated[str | None, typer.Option("--coordinator", help="The coordinator's address.")] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Do not ask the coordinator.")] = False,
    password_file: PasswordFile = None,
    as_json: Json = False,
) -> None:
    """Shows a job: its offers, every attempt and why it ended, tokens, cost, receipt, and what the chain paid.

    It reads this wallet's books, which needs no password, and asks the coordinator what it knows, which does: a coordinator tells
    of a job to its payer only. The password is not prompted for; without it the books are shown alone.
    """
    number = parse_job_id(job_id.removeprefix("0x"))

    async def find(ledger: Ledger, loaded: ClientConfig) -> None:
        known = await ledger.find_job(number)
        told, silence = (None, "not asked") if offline else await _ask(loaded, wallet, password_file, number)
        if known is None and told is None:
            raise Refusal(Code.UNKNOWN_JOB, f"neither the books of {ledger.payer} nor the coordinator know this job ({silence})")
        from tallystick.client.jobs.export import job_json

        document = (job_json(known) if known else {"job": number.hex()}) | {"coordinator": told}
        if as_json:
            show_json(document)
        else:
            _show(document, silence)

    with_books(config, wallet, coordinator_url, find)


@job.command("list")
def listing(
    config: Config = None,
    wallet: Wallet = DEFAULT_WALLET,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, max=10_000, help="How many, the newest.")] = 20,
    as_json: Json = False,
) -> None:
    """Lists this wallet's last jobs, newest first. Needs no password."""

    async def read(ledger: Ledger, _config: ClientConfig) -> None:
        found = await ledger.latest_jobs(limit)
        if as_json:
            from tallystick.client.jobs.export import job_json

            show_json([job_json(known) for known in found])
        else:
            show_rows(("job", "at", "model", "state", "cost"), map(_row, found), keyed=True)

    with_books(config, wallet, None, read)


def with_books(
    config: Path | None, wallet: str, coordinator_url: str | None, act: Callable[[Ledger, ClientConfig], Awaitable[None]]
) -> None:
    """Acts on a wallet's books, without its password."""
    from tallystick.client.config import load_config
    from tallystick.client.ledger.ledger import Ledger

    loaded = load_config(config, {"coordinator": coordinator_url})
    payer = account_of(wallet, "--wallet")

    async def run() -> None:
        ledger = await Ledger.open(loaded.ledger_path(payer), payer)
        try:
            await act(ledger, loaded)
        finally:
            await ledger.close()

    asyncio.run(run())


async def _ask(config: ClientConfig, wallet: str, password_file: Path | None, number: JobId) -> tuple[dict[str, Any] | None, str]:
    """What the coordinator knows of the job, and if nothing, why."""
    from tallystick.client.coordinator.access_tokens import AccessTokens
    from tallystick.client.coordinator.http_client import CoordinatorClient
    from tallystick.runtime.keystore import open_wallet

    def no_password() -> str:
        raise Refusal(
            Code.UNAUTHENTICATED, f"it tells of a job to its payer only, so it takes the wallet's password: {PASSWORD_HELP}"
        )

    try:
        if wallet.startswith(("0x", "0X")):
            text = "it tells of a job to its payer only: name the payer's wallet instead of its address"
            raise Refusal(Code.UNAUTHENTICATED, text)
        signer = open_wallet(wallet, password_file=password_file, prompt=no_password)
        async with CoordinatorClient(config.coordinator, config) as asked:
            tokens = AccessTokens(signer, asked.info, lambda: int(time.time()))
            asked.authorize = tokens
            return (await asked.job(number)).raw, ""
    except TallyError as error:
        return None, str(error)


def _show(document: dict[str, Any], silence: str) -> None:
    told = document["coordinator"]
    state = document.get("state")
    facts: list[tuple[str, object]] = []
    if state:
        usage, reason = document["usage"], document["reason"]
        facts += [
            ("state", f"{state}: {reason}" if reason else state),
            ("model", document["model"]),
            ("payer", document["payer"]),
        ]
        facts += [("placed", show_time(document["createdAt"])), ("ended", show_time(document["finishedAt"]))]
        if usage:
            facts += [("provider", document["provider"]), ("outcome", document["outcome"])]
            facts += [("tokens", f"{usage['inputTokens']} + {usage['outputTokens']}"), ("cost", document["costDollars"])]
            facts += [("receipt", document["receipt"]["digest"])]
    if told:
        settlement = told.get("settlement")
        tx = settlement.get("tx") if isinstance(settlement, dict) else None
        facts += [("coordinator says", told["state"]), ("settled by", tx or "not yet")]
    else:
        facts += [("coordinator says", f"nothing: {silence}")]
    show_facts(facts, title=f"job {document['job']}")
    if told:
        rows = [_attempt(one) for one in told.get("attempts") or () if isinstance(one, dict)]
        show_rows(("attempt", "provider", "state", "why", "receipt"), rows, title="attempts, as the coordinator tells them")
    if document.get("shortlist"):
        orders = ((o["provider"], o["state"], format_amount(int(o["cap"]))) for o in document["shortlist"])
        show_rows(("provider", "order", "at most"), orders, title="orders that this wallet signed")


def _attempt(told: dict[str, Any]) -> tuple[object, ...]:
    return (*(told.get(name) for name in ("attempt", "provider", "state", "reason")), "yes" if told.get("receipt") else "no")


def _row(known: KnownJob) -> tuple[object, ...]:
    bill = known.receipt.message if known.receipt else None
    at = f"{datetime.fromtimestamp(known.created_at).astimezone():%m-%d %H:%M}"
    return known.job.hex(), at, known.model, known.state.value, format_amount(bill.cost) if bill else ""


def show_time(at: int | None) -> str:
    """A Unix time as people of this place write it."""
    return "" if at is None else f"{datetime.fromtimestamp(at).astimezone():%F %T}"
