"""What the audits of the last day say, as a health check: suspect answers, and audits that came to no verdict."""

from __future__ import annotations

from tallystick.audit.verdicts import Verdict
from tallystick.client.audits.schema import AuditState
from tallystick.client.audits.store import AuditStore
from tallystick.protocol.health import CheckResult, Health

DAY = 86_400
LATEST = 200
"""At most so many audits are looked at, newest first."""
MIN_FAILED, FAILED_SHARE = 3, 0.5
"""So many audits without a verdict, and such a share of all, are a warning: what is bought is not checked then."""


async def check_audits(store: AuditStore, now: int) -> CheckResult:
    """The state of `audits`. `value` is the number of audits of providers that ended within a day."""
    ended = [
        audit
        for audit in await store.latest(LATEST)
        if not audit.kind.planted and audit.finished_at is not None and now - audit.finished_at <= DAY
    ]
    count, suspect = len(ended), sum(audit.verdict is Verdict.SUSPECT for audit in ended)
    if suspect:
        text = f"{suspect} of {count} audits within a day found the answer suspect"
        return CheckResult(Health.WARN, text, "tally audit providers", count, "audits")
    failed = sum(audit.state is AuditState.FAILED for audit in ended)
    if failed >= max(MIN_FAILED, FAILED_SHARE * count):
        text = f"{failed} of {count} audits within a day came to no verdict"
        remedy = "`tally audit list` shows why; name an engine in [[referees]], or `tally audit share --allow`"
        return CheckResult(Health.WARN, text, remedy, count, "audits")
    return CheckResult(Health.PASS, value=count, unit="audits")
