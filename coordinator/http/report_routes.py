"""The route of reports of audits."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

from coordinator.http.schemas import AuditReportBody
from coordinator.jobs.audit_reports import AuditReports
from tallystick.protocol.audit_reports import ReportRequest


def add_report_routes(api: FastAPI, reports: AuditReports) -> None:
    """Adds the route /v1/reports."""

    @api.post("/v1/reports")
    async def report(body: AuditReportBody) -> dict[str, Any]:
        """Takes a payer's signed report on a job that it paid, with the job's receipt.

        A job is reported once, and once more if its provider is convicted. `ack` is this coordinator's signed promise that its
        match log has the report as the leaf that it names. The same report gets the same `ack` again. A report counts by what
        its payer settled on chain.
        """
        ack = await reports.accept(ReportRequest.from_json(body.model_dump()))
        return {"ack": ack.to_json()}
