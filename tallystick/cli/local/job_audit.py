"""The audit of the demo's job: the other node of the market judges the answer, by a scoring job that is paid like any other."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tallystick.cli.progress import activity
from tallystick.protocol.errors import TallyError
from tallystick.protocol.types import Address, format_amount, parse_job_id

if TYPE_CHECKING:
    from tallystick.audit.verdicts import Finding
    from tallystick.client.audits.conduct import Conclusion
    from tallystick.client.audits.kept_job import KeptJob
    from tallystick.client.audits.kept_jobs import KeptJobs
    from tallystick.protocol.eip712 import Signer

AUDIT_SECONDS = 180.0
KEPT_SECONDS = 10.0
_TOLD = ("divergence", "surprisal", "margin")


async def audit_traced_job(
    coordinator: str, signer: Signer, home: Path, job: str, providers: Mapping[str, Address]
) -> dict[str, Any]:
    """Audits a job of the demo's payer. `home`: the folder of the demo. Never raises TallyError: `reason` says why it did not.

    The result has `verdict` (pass, suspect or inconclusive), `referee`, `cost` in base units as text, and `findings`.
    """
    from tallystick.client.audit_settings import PromptConsent
    from tallystick.client.config import ClientConfig
    from tallystick.client.sdk.market import Market, audits_of

    config = ClientConfig(coordinator=coordinator, ledger_file=home / "client" / f"{signer.address}.db")
    try:
        async with asyncio.timeout(AUDIT_SECONDS), Market.of(config, signer) as market:
            auditor = audits_of(market).auditor
            kept = await _find(auditor.kept_jobs, job)
            if kept is None:
                return _not_audited("the gateway does not keep it")
            with activity("waiting for the audit of the answer"):
                conclusion = await auditor.audit(replace(kept, consent=PromptConsent(may_share=True)))
    except TimeoutError:
        return _not_audited(f"the referee took longer than {AUDIT_SECONDS:g} s")
    except TallyError as error:
        return _not_audited(str(error))
    return _result(conclusion, providers)


async def _find(kept_jobs: KeptJobs, job: str) -> KeptJob | None:
    """The job, which the gateway writes in batches."""
    deadline = asyncio.get_running_loop().time() + KEPT_SECONDS
    while True:
        kept = await kept_jobs.find(parse_job_id(job))
        if kept is not None or asyncio.get_running_loop().time() > deadline:
            return kept
        await asyncio.sleep(0.1)


def _not_audited(reason: str) -> dict[str, Any]:
    return {"verdict": None, "referee": None, "cost": "0", "findings": [], "reason": reason}


def _result(conclusion: Conclusion, providers: Mapping[str, Address]) -> dict[str, Any]:
    names = {address: name for name, address in providers.items()}
    referees = [names.get(Address(opinion.referee), opinion.referee) for opinion in conclusion.opinions]
    findings = [_finding(finding) for opinion in conclusion.opinions for finding in opinion.findings if finding.conclusive]
    return {
        "verdict": conclusion.verdict.value,
        "referee": ", ".join(referees),
        "cost": str(int(conclusion.audit.cost)),
        "findings": findings,
        "reason": conclusion.reason,
    }


def _finding(finding: Finding) -> dict[str, Any]:
    return {"test": finding.test, "statistic": finding.statistic, "threshold": finding.threshold}


def audit_words(audit: Mapping[str, Any]) -> str:
    """The audit in one line."""
    if audit["verdict"] is None:
        return f"not audited: {audit['reason']}"
    told = [item for item in audit["findings"] if item["test"] in _TOLD]
    tests = ", ".join(f"{item['test']} {item['statistic']:.2g} of {item['threshold']:.2g}" for item in told)
    cost = format_amount(int(audit["cost"]))
    return f"{audit['verdict']}, by {audit['referee']} for {cost}" + (f" ({tests})" if tests else "")
