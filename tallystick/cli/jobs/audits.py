"""`tally audit`: checks an answer by hand, and shows what audits found of providers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer
from typer.core import TyperGroup

from tallystick.cli.jobs.audited_providers import provider_json, show_providers, warn_of_named
from tallystick.cli.jobs.calibrate import calibrate
from tallystick.cli.jobs.jobs import show_time, with_ledger
from tallystick.cli.onchain import parse_account
from tallystick.cli.options import DEFAULT_WALLET, Config, CoordinatorUrl, Json, PasswordFile, Provider, Wallet, unlock
from tallystick.cli.output import counted, dollars, note, show_fields, show_json, show_table, step
from tallystick.cli.progress import activity
from tallystick.protocol.errors import Code, Refusal
from tallystick.protocol.types import Amount, format_amount, parse_job_id

if TYPE_CHECKING:
    from tallystick.audit.verdicts import Finding
    from tallystick.client.audits.conduct import Conclusion
    from tallystick.client.audits.kept_job import KeptJob
    from tallystick.client.audits.provider_audits import ProviderAudits
    from tallystick.client.audits.records import KnownAudit, Opinion
    from tallystick.client.audits.store import AuditStore
    from tallystick.client.config import ClientConfig
    from tallystick.client.ledger.ledger import Ledger
    from tallystick.client.sdk.market import Market

_SUBJECT = "job"


class JobOrCommand(TyperGroup):
    """A group whose first argument may be a job's id, which stands for `audit job ID`."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """See click.Group; Typer has a click of its own."""
        if args and self.get_command(ctx, args[0]) is None and not args[0].startswith("-"):
            args = [_SUBJECT, *args]
        return super().resolve_command(ctx, args)


app = typer.Typer(
    cls=JobOrCommand,
    no_args_is_help=True,
    help="Check that providers serve what they sell: `tally audit JOB` checks one answer.",
)
app.command("calibrate")(calibrate)


@app.command(_SUBJECT)
def audit_job(
    job_id: Annotated[str, typer.Argument(metavar="JOB", help="Job id, as in the response header x-tally-job.")],
    share: Annotated[
        bool, typer.Option("--share", help="Allow other providers of the model to see this prompt and answer, to judge it.")
    ] = False,
    again: Annotated[
        bool, typer.Option("--again", help="Audit a job that was audited before, and pay its referees once more.")
    ] = False,
    config: Config = None,
    wallet: Wallet = DEFAULT_WALLET,
    coordinator_url: CoordinatorUrl = None,
    password_file: PasswordFile = None,
    as_json: Json = False,
) -> None:
    """Audit one job now: let referees read its prompt and answer, and compare what they find with what its provider signed.

    Referees are your own engines ([[referees]] in the config) and, if you allow it, other providers of the same model, which are
    paid for it. Chats and completions can be audited, and requests that the gateway turns into a chat; they can be as long as
    they are kept on this machine ([audits] keep_hours). A job whose audit was paid before is audited again only with --again.
    The exit code is 1 if the answer is suspect.
    """
    from tallystick.client.config import load_config
    from tallystick.client.sdk.market import Market, audits_of

    job = parse_job_id(job_id, "JOB")
    loaded = load_config(config, {"coordinator": coordinator_url})
    signer = unlock(wallet, password_file)

    async def run() -> tuple[Conclusion, AuditContext]:
        async with Market.of(loaded, signer) as market:
            auditor = audits_of(market).auditor
            kept = await auditor.kept_jobs.find(job)
            if kept is None:
                raise await _why_not_kept(market, job.hex())
            if not again:
                await auditor.check_unpaid(job)
            consented = _with_consent(kept, loaded, share=share, as_json=as_json)
            with activity("waiting for the referees of the answer"):
                conclusion = await auditor.audit(consented, again=again)
            return conclusion, await _context(await auditor.store(), conclusion.audit)

    conclusion, context = asyncio.run(run())
    if as_json:
        show_json(_json(conclusion.audit, conclusion.opinions, context) | {"providerVerdict": conclusion.provider.value})
    else:
        _show(conclusion.audit, conclusion.opinions, context)
        say = step if conclusion.verdict.value == "pass" else note
        say(_in_words(conclusion, loaded.audits.opinions))
    if conclusion.verdict.value == "suspect":
        raise typer.Exit(1)


async def _why_not_kept(market: Market, job: str) -> Refusal:
    settings = market.config.audits
    if not settings.keeps_jobs:
        return Refusal(Code.UNKNOWN_JOB, f"JOB: {job} is not kept on this machine: [audits] enabled or keep_mib says so")
    known = await market.find(parse_job_id(job))
    whose = "this wallet's ledger does not have it either" if known is None else f"its ledger has it, as a job of {known.path}"
    text = (
        f"JOB: {job} is not kept on this machine, and {whose}; answers in text that ended with a receipt are kept for "
        f"{settings.keep_hours} hours, up to {settings.keep_mib} MiB"
    )
    return Refusal(Code.UNKNOWN_JOB, text)


def _with_consent(kept: KeptJob, config: ClientConfig, *, share: bool, as_json: bool) -> KeptJob:
    """The job with the user's word on who may see it. Asks at a terminal if nobody could judge it otherwise."""
    import sys

    from tallystick.client.audit_settings import PromptConsent

    if kept.consent.private and share:
        raise Refusal(Code.BAD_MESSAGE, "--share: this request was marked private, so no other provider may see it")
    own = any(referee.serves(kept.model, kept.precision) for referee in config.referees)
    if not share and not (own or kept.consent.may_share or kept.consent.private or as_json) and sys.stdin.isatty():
        text = f"Other providers of {kept.model} would read this prompt and answer to judge it, and be paid for that. Allow it?"
        share = typer.confirm(text, default=False, err=True)
    return replace(kept, consent=PromptConsent(may_share=True)) if share else kept


MISSING_REFEREES = (
    "; more referees must agree before it is confirmed: name another engine in [[referees]], or let other providers see prompts"
)


def _in_words(conclusion: Conclusion, opinions: int) -> str:
    words = {
        "pass": "the answer is what its provider sells, as far as the referees can tell",
        "suspect": "the answer is suspect: one audit convicts nobody, but this provider is audited more often now",
        "inconclusive": "the referees could not decide",
    }
    if conclusion.audit.unverifiable:
        words["inconclusive"] = "the answer cannot be checked, by its provider's doing: that convicts nobody and clears nobody"
    missing = MISSING_REFEREES if conclusion.verdict.value == "suspect" and len(conclusion.opinions) < opinions else ""
    if conclusion.provider.value == "confirmed":
        return f"the provider {conclusion.audit.provider} does not serve what it sells: it gets no more orders of this wallet"
    return words.get(conclusion.verdict.value, conclusion.verdict.value) + missing


@app.command("list")
def list_(
    config: Config = None,
    wallet: Wallet = DEFAULT_WALLET,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, max=10_000, help="Number of audits, newest first.")] = 20,
    as_json: Json = False,
) -> None:
    """List this wallet's latest audits, newest first. Needs no password.

    What is audited (`of`): a `job`; a `synthetic` request, made up in the shape of yours where the job itself may not be shown;
    or a referee, by an answer that is known to be good or bad (`planted-good`, `planted-bad`), which says nothing of a provider.
    """

    async def read(store: AuditStore, _ledger: Ledger) -> None:
        audits = await store.latest(limit)
        if as_json:
            show_json([_audit_json(audit) for audit in audits])
            return
        providers = await store.all_provider_audits()
        rows = [
            (
                audit.id,
                show_time(audit.created_at),
                audit.kind.value,
                audit.job or "-",
                audit.provider,
                _verdict(audit),
                audit.reason,
            )
            for audit in audits
        ]
        show_table(("audit", "at", "of", "job", "provider", "verdict", "found"), rows, title="Audits")
        if audits:
            spent = sum(audit.cost for audit in audits)
            note(f"{counted(len(audits), 'audit')}, {dollars(spent)}; more: tally audit show JOB, tally audit providers")
        warn_of_named(providers)

    _with_store(config, wallet, read)


@app.command("providers")
def providers(config: Config = None, wallet: Wallet = DEFAULT_WALLET, as_json: Json = False) -> None:
    """List what this wallet's audits found of each provider, by outcome. Needs no password.

    Unverifiable: the audit could not decide because of what the provider did. It kept back the evidence that it committed to, or
    gave an answer that nobody can score. A provider of which more than a fifth of the latest audits, and at least three, ended so
    is named.
    """

    async def read(store: AuditStore, _ledger: Ledger) -> None:
        show_providers(await store.all_provider_audits(), as_json=as_json)

    _with_store(config, wallet, read)


@app.command("show")
def show(
    which: Annotated[str, typer.Argument(metavar="JOB", help="Job id, or the number of an audit in `tally audit list`.")],
    config: Config = None,
    wallet: Wallet = DEFAULT_WALLET,
    as_json: Json = False,
) -> None:
    """Show an audit: what each referee found, test by test, and what became of its report. Needs no password."""

    async def read(store: AuditStore, _ledger: Ledger) -> None:
        audit = await (store.get(int(which)) if which.isdecimal() and len(which) < 12 else store.find(parse_job_id(which, "JOB")))
        if audit is None:
            raise Refusal(Code.UNKNOWN_JOB, f"JOB: this wallet has no audit of {which}; see: tally audit list")
        opinions, context = await store.opinions(audit.id), await _context(store, audit)
        if as_json:
            show_json(_json(audit, opinions, context))
        else:
            _show(audit, opinions, context)

    _with_store(config, wallet, read)


@app.command("unblock")
def unblock(provider: Provider, config: Config = None, wallet: Wallet = DEFAULT_WALLET, as_json: Json = False) -> None:
    """Allow orders to a provider again that audits confirmed. Its audits so far no longer count against it."""
    address = parse_account(provider, "PROVIDER")

    async def act(store: AuditStore, ledger: Ledger) -> None:
        was_blocked = await ledger.unblock(address, int(time.time()))
        await store.pardon(address)
        if not was_blocked:
            raise Refusal(Code.BAD_MESSAGE, f"PROVIDER: this wallet does not block {address}; see: tally receipt evidence")
        if as_json:
            show_json({"provider": address, "unblocked": True})
        else:
            step(f"{address} may get orders again, and its audits begin anew; a running gateway notices within seconds")

    _with_store(config, wallet, act)


@app.command("share")
def share_prompts(
    allow: Annotated[
        bool | None, typer.Option("--allow/--forbid", help="Whether audits may show your prompts to other providers.")
    ] = None,
    config: Config = None,
    wallet: Wallet = DEFAULT_WALLET,
    as_json: Json = False,
) -> None:
    """Show or change whether audits may show your prompts to other providers. The config ([audits] share_prompts) comes first."""
    from tallystick.client.audits.consent_file import QUESTION, read_answer, write_answer
    from tallystick.client.config import load_config

    loaded, payer = load_config(config), parse_account(wallet, "--wallet")
    path = loaded.consent_path(payer)
    if allow is not None:
        write_answer(path, share=allow, now=int(time.time()))
    answer = read_answer(path)
    if as_json:
        show_json({"sharePrompts": answer, "config": loaded.audits.share_prompts})
        return
    if loaded.audits.share_prompts is not None:
        note(f"the config decides: [audits] share_prompts = {str(loaded.audits.share_prompts).lower()}")
    elif answer is None:
        note(f"{QUESTION} Answer with: tally audit share --allow, or --forbid")
    else:
        step("audits may show prompts to other providers" if answer else "audits show no prompt to other providers")


def _with_store(config: Path | None, wallet: str, act: Callable[[AuditStore, Ledger], Awaitable[None]]) -> None:
    async def run(ledger: Ledger, loaded: ClientConfig) -> None:
        from tallystick.client.audits.store import AuditStore

        store = await AuditStore.open(loaded.audits_path(ledger.payer))
        try:
            await act(store, ledger)
        finally:
            await store.close()

    with_ledger(config, wallet, None, run)


class AuditContext(NamedTuple):
    """What is shown with an audit: what became of its report, and the audits of the provider."""

    report: str
    provider: ProviderAudits


async def _context(store: AuditStore, audit: KnownAudit) -> AuditContext:
    provider = await store.provider_audits(audit.provider, audit.model, audit.precision)
    return AuditContext(await store.report_state(audit.id), provider)


def _verdict(audit: KnownAudit) -> str:
    if audit.state.value != "done":
        return audit.state.value
    return "inconclusive, unverifiable" if audit.unverifiable else audit.verdict.value


def _show(audit: KnownAudit, opinions: tuple[Opinion, ...] | list[Opinion], context: AuditContext) -> None:
    fields = [
        ("job", audit.job or "-"),
        ("provider", audit.provider),
        ("model", f"{audit.model}, {audit.precision}"),
        ("of", audit.kind.value),
        ("verdict", f"{_verdict(audit)}: {audit.reason}" if audit.reason else _verdict(audit)),
        ("cost, dollars", format_amount(Amount(audit.cost))),
        ("report to the coordinator", context.report or "none"),
    ]
    if not audit.kind.planted:
        fields.append(("all audits of this provider", str(context.provider.counts)))
    show_fields(fields, title=f"audit {audit.id}")
    rows = [
        (opinion.referee, finding.test, finding.verdict.value, _number(finding.statistic), _number(finding.threshold))
        for opinion in opinions
        for finding in opinion.findings
    ]
    if rows:
        show_table(("referee", "test", "finds", "statistic", "suspect above"), rows, title="What the referees found")
    if not audit.kind.planted:
        warn_of_named([context.provider])


def _number(value: float) -> str:
    return f"{value:.5g}"


def _json(audit: KnownAudit, opinions: tuple[Opinion, ...] | list[Opinion], context: AuditContext) -> dict[str, Any]:
    members = {"opinions": [_opinion_json(opinion) for opinion in opinions], "report": context.report or None}
    return _audit_json(audit) | members | {"providerAudits": provider_json(context.provider)}


def _audit_json(audit: KnownAudit) -> dict[str, Any]:
    return {
        "audit": audit.id,
        "kind": audit.kind.value,
        "origin": audit.origin.value,
        "state": audit.state.value,
        "job": audit.job or None,
        "provider": audit.provider,
        "model": audit.model,
        "precision": audit.precision,
        "verdict": audit.verdict.value if audit.state.value == "done" else None,
        "unverifiable": audit.unverifiable,
        "coverage": audit.coverage,
        "reason": audit.reason,
        "cost": str(int(audit.cost)),
        "costDollars": format_amount(Amount(audit.cost)),
        "createdAt": audit.created_at,
        "finishedAt": audit.finished_at,
    }


def _opinion_json(opinion: Opinion) -> dict[str, Any]:
    return {
        "referee": opinion.referee,
        "verdict": opinion.verdict.value,
        "findings": [_finding_json(finding) for finding in opinion.findings],
        "billedTokens": opinion.counts.billed,
        "countedTokens": opinion.counts.counted,
        "cost": str(int(opinion.cost)),
        "at": opinion.at,
    }


def _finding_json(finding: Finding) -> dict[str, Any]:
    return {
        "test": finding.test,
        "statistic": finding.statistic,
        "threshold": finding.threshold,
        "conclusive": finding.conclusive,
        "verdict": finding.verdict.value,
    }
