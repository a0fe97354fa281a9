"""Health reports, after the draft "Health Check Response Format for HTTP APIs" (draft-inadarei-api-health-check-06)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum

HEALTH_JSON = "application/health+json"
LIVENESS_PATH, READINESS_PATH = "/healthz", "/readyz"
"""Whether a process serves (always 200), and the state of each dependency (200, or 503 if one fails)."""


class Health(StrEnum):
    """The state of a dependency, or of all of them."""

    PASS = "pass"  # noqa: S105 - the draft's word, no password
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class CheckResult:
    """The state of one dependency. Anybody may read it, so `output` and `remedy` name no address and no secret."""

    status: Health
    output: str = ""
    """What is wrong."""
    remedy: str = ""
    """What the operator does about it."""
    value: str | float | None = None
    """What was measured, in `unit`."""
    unit: str = ""

    def to_json(self, at: float) -> dict[str, object]:
        """The entry of the report; `at` is the time of the check in Unix seconds."""
        fields: dict[str, object] = {"status": self.status.value, "time": datetime.fromtimestamp(at, UTC).isoformat()}
        named = {"observedValue": self.value, "observedUnit": self.unit or None, "output": self.output, "remedy": self.remedy}
        return fields | {name: value for name, value in named.items() if value not in {None, ""}}


@dataclass(frozen=True, slots=True)
class HealthReport:
    """The state of every dependency, by name, at the time of the check (Unix seconds)."""

    results: Mapping[str, CheckResult]
    at: float

    @property
    def status(self) -> Health:
        """The worst state of a dependency."""
        states = {result.status for result in self.results.values()}
        return next((state for state in (Health.FAIL, Health.WARN) if state in states), Health.PASS)

    @property
    def http_status(self) -> int:
        """200 if requests can be served, perhaps with restrictions, else 503."""
        return 503 if self.status is Health.FAIL else 200

    def to_json(self, version: str) -> dict[str, object]:
        """The body of a readiness route. Each check is a list, as the draft has it."""
        checks = {name: [result.to_json(self.at)] for name, result in self.results.items()}
        return {"status": self.status.value, "version": version, "checks": checks}

    @property
    def summary(self) -> dict[str, str]:
        """The state of each dependency, by name."""
        return {name: result.status.value for name, result in self.results.items()}
