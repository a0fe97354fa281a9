"""An empty coordinator, as far as its HTTP API needs one to describe itself."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

from coordinator.http.api import ApiContext
from coordinator.http.metrics import CoordinatorMetrics
from coordinator.http.schemas import Info
from coordinator.jobs.job_totals import JobTotals


class Anything(SimpleNamespace):
    """Stands for every part of the market; numbers are 0, and counts are empty."""

    def __getattr__(self, name: str) -> Any:
        if name == "counts":
            return {}
        if name == "job_totals":
            return JobTotals()
        return 0 if name in {"size", "live", "waiting", "free_slots", "in_flight"} else Anything()


def api_context() -> ApiContext:
    """What `build_control_plane` is given to write its OpenAPI document and its metrics."""
    info = Info.model_construct()
    part = cast("Any", Anything())
    return ApiContext(part, lambda: 0, part, part, part, info, part, CoordinatorMetrics(lambda: None), part)
