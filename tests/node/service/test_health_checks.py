"""The node's checks: each dependency by itself, well and ill."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from node.service.health_checks import watch
from tallystick.protocol.errors import Code, Unavailable
from tallystick.protocol.health import CheckResult, Health


class _Store:
    async def ping(self) -> float:
        return 0.002


class _Chain:
    def __init__(self, results: dict[str, CheckResult] | Exception) -> None:
        self._results = results

    async def check(self) -> dict[str, CheckResult]:
        if isinstance(self._results, Exception):
            raise self._results
        return self._results


def _link(*, connected: bool = True, problem: str = "") -> Any:
    return SimpleNamespace(
        session=SimpleNamespace(endpoint="e") if connected else None, problem=problem, url="ws://127.0.0.1:9/v1/node"
    )


NOW = 1_800_000_000


def _ask(left: int = 3_600) -> Any:
    return SimpleNamespace(message=SimpleNamespace(valid_until=NOW + left))


def _rated(results: dict[str, CheckResult]) -> Any:
    async def check() -> dict[str, CheckResult]:
        return results

    return check


async def _checks(tmp_path: Path, chain: Any = None, store: Any = None, **changes: Any) -> dict[str, CheckResult]:
    parts: dict[str, Any] = {
        "config": SimpleNamespace(state=tmp_path, ask_validity=3_600),
        "links": [_link()],
        "asks": SimpleNamespace(current=(_ask(),)),
        "ratings": SimpleNamespace(check=_rated({})),
        "engine_pool": SimpleNamespace(engines={"a": SimpleNamespace(up=True)}),
        "state_recovery": SimpleNamespace(problem=""),
        "coordinator_credit": SimpleNamespace(serves=lambda _endpoint: True, problems=lambda: ()),
        "collector": SimpleNamespace(open_alarms=frozenset()),
    }
    node: Any = SimpleNamespace(**parts | changes)
    of_store: Any = store or _Store()
    of_chain: Any = chain or _Chain({"chain": CheckResult(Health.PASS)})
    report = await watch(node, of_store, of_chain, lambda: NOW).report()
    return dict(report.results)


async def test_a_node_that_is_well(tmp_path: Path) -> None:
    """Every dependency is named and passes."""
    checks = await _checks(tmp_path)
    assert {name: check.status for name, check in checks.items()} == dict.fromkeys(
        ("coordinator", "engines", "database", "disk", "chain", "debts", "asks"), Health.PASS
    )


DOWN, UP = SimpleNamespace(up=False), SimpleNamespace(up=True)
SUSPENDED = SimpleNamespace(serves=lambda _endpoint: False, problems=lambda: ("suspended: it leaves work unpaid",))
ILL: dict[str, tuple[str, Health, dict[str, Any], str]] = {
    "no coordinator": ("coordinator", Health.FAIL, {"links": [_link(connected=False, problem="refused")]}, "refused"),
    "one of two": ("coordinator", Health.WARN, {"links": [_link(), _link(connected=False, problem="refused")]}, "refused"),
    "suspended": ("coordinator", Health.FAIL, {"coordinator_credit": SUSPENDED}, "unpaid"),
    "not recovered": (
        "coordinator",
        Health.FAIL,
        {"state_recovery": SimpleNamespace(problem="asks it for receipts")},
        "receipts",
    ),
    "no engine": (
        "engines",
        Health.FAIL,
        {"engine_pool": SimpleNamespace(engines={"a": DOWN}), "asks": SimpleNamespace(current=())},
        "a does not answer",
    ),
    "an ask that was not renewed": ("asks", Health.WARN, {"asks": SimpleNamespace(current=(_ask(), _ask(900)))}, "in 900 s"),
    "an expired ask": ("asks", Health.WARN, {"asks": SimpleNamespace(current=(_ask(-5),))}, "has expired"),
    "integrity": (
        "integrity",
        Health.WARN,
        {"ratings": SimpleNamespace(check=_rated({"integrity": CheckResult(Health.WARN, "it fell", "tally node why")}))},
        "it fell",
    ),
    "no model": ("engines", Health.FAIL, {"asks": SimpleNamespace(current=())}, "no engine lists a model"),
    "one engine of two": (
        "engines",
        Health.WARN,
        {"engine_pool": SimpleNamespace(engines={"a": DOWN, "b": UP})},
        "a does not answer",
    ),
    "debt": ("debts", Health.WARN, {"collector": SimpleNamespace(open_alarms={("thawing", "0x1")})}, "thawing"),
    "no folder": ("disk", Health.FAIL, {"config": SimpleNamespace(state=Path("/missing/state"))}, "does not answer"),
}


@pytest.mark.parametrize("case", ILL)
async def test_what_is_ill(tmp_path: Path, case: str) -> None:
    """The state, what is wrong, and what to do."""
    name, status, changes, text = ILL[case]
    check = (await _checks(tmp_path, **changes))[name]
    assert (check.status, text in check.output, bool(check.remedy)) == (status, True, True)


async def test_a_chain_that_is_down_stops_no_job(tmp_path: Path) -> None:
    """It delays settlement, so it is a warning; so is an empty wallet."""
    away = Unavailable(Code.CHAIN_UNAVAILABLE, "no answer")
    check = (await _checks(tmp_path, _Chain(away)))["chain"]
    assert (check.status, "`rpc`" in check.remedy) == (Health.WARN, True)
    poor = {"chain": CheckResult(Health.PASS), "gas": CheckResult(Health.FAIL, "0 coins", "fund it")}
    checks = await _checks(tmp_path, _Chain(poor))
    assert (checks["gas"].status, checks["gas"].remedy) == (Health.WARN, "fund it")


async def test_a_database_that_is_lost(tmp_path: Path) -> None:
    """Without its state the node must not go on."""

    class Lost(_Store):
        async def ping(self) -> float:
            raise Unavailable(Code.DATABASE_UNAVAILABLE, "deleted")

    check = (await _checks(tmp_path, store=Lost()))["database"]
    assert (check.status, "state" in check.remedy) == (Health.FAIL, True)
