"""Reports that wait for the coordinator: sent in the order in which they were signed, and again after a failure."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import structlog

from tallystick.client.audits.store import AuditStore
from tallystick.protocol.audit_reports import ReportRequest
from tallystick.protocol.eip712 import Signed
from tallystick.protocol.errors import BadMessage, Refusal, TallyError
from tallystick.protocol.messages import ReportAck
from tallystick.protocol.wire import dumps, loads

log = structlog.get_logger()
RETRY_SECONDS = 60
MAX_ATTEMPTS = 12
SendReport = Callable[[ReportRequest], Awaitable[Signed[ReportAck]]]
"""Sends a report, and checks the acknowledgement. Raises TallyError."""


@dataclass(frozen=True, slots=True)
class ReportQueue:
    """The reports of one wallet. `now` is Unix seconds."""

    store: AuditStore
    send: SendReport
    now: Callable[[], int]

    async def add(self, audit: int, request: ReportRequest, delay: int = 0) -> None:
        """Stores a report to be sent after `delay` seconds, also if this process ends meanwhile."""
        await self.store.add_report(audit, dumps(request.to_json()).decode(), self.now() + delay)

    async def send_due(self, limit: int = 16) -> None:
        """Sends the reports that are due. Never raises for a coordinator that refuses, or does not answer."""
        for report in await self.store.due_reports(self.now(), limit):
            try:
                answer = await self.send(ReportRequest.from_json(loads(report.body, "report")))
            except (Refusal, BadMessage) as error:  # it will not be taken later either
                log.info("the coordinator refused the report of an audit", audit=report.audit, reason=str(error))
                await self.store.end_report(report.id, "refused", str(error))
            except TallyError as error:
                if report.attempts + 1 >= MAX_ATTEMPTS:
                    await self.store.end_report(report.id, "refused", str(error))
                else:
                    due_at = self.now() + RETRY_SECONDS * (1 << min(report.attempts, 8))
                    await self.store.postpone_report(report.id, str(error), due_at)
            else:
                await self.store.end_report(report.id, "sent", answer.dumps())
