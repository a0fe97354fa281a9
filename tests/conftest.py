"""Hooks and fixtures of the whole suite. Skipped tests are summed up by reason; they fail a run for which
TALLYSTICK_REQUIRE_SERVICES is set, as in CI.
"""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Iterator

import pytest
import structlog
from hypothesis import HealthCheck, settings

settings.register_profile("any_machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any_machine")
_POSTGRES = "TALLYSTICK_TEST_POSTGRES"
"""The environment variable with the URL of the tests' database, if there is one."""
_skipped: Counter[str] = Counter()
"""Skipped tests by reason."""


def pytest_configure(config: pytest.Config) -> None:
    """Gives each process of a run a PostgreSQL database of its own: tests empty it, and hold its lock."""
    url, worker = os.environ.get(_POSTGRES), getattr(config, "workerinput", {}).get("workerid")
    if url and worker:
        os.environ[_POSTGRES] = asyncio.run(_own_database(url, worker))


async def _own_database(url: str, worker: str) -> str:
    import asyncpg

    name = f"tests_{worker}"
    connection = await asyncpg.connect(url.replace("+asyncpg", ""))
    try:
        await connection.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
        await connection.execute(f"CREATE DATABASE {name}")
    finally:
        await connection.close()
    return f"{url.rpartition('/')[0]}/{name}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begins with what takes minutes, and then with what takes seconds: so one process has the tests of whole markets, the others
    take its share of the rest, and all end at the same time.
    """
    items.sort(key=lambda item: (item.path.name != "test_chaos.py", item.path.parent.name != "e2e"))


@pytest.fixture(autouse=True)
def logging_as_configured() -> Iterator[None]:
    """Undoes what a command that ran in this process configured, so each test sees the log lines of all levels."""
    yield
    structlog.reset_defaults()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Records skipped tests."""
    if report.skipped and not hasattr(report, "wasxfail"):
        place = report.longrepr
        reason = str(place[2]) if isinstance(place, tuple) else str(place)
        _skipped[reason.removeprefix("Skipped: ")] += 1


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fails a run that skipped tests although all services are available."""
    if _skipped and os.environ.get("TALLYSTICK_REQUIRE_SERVICES") and not hasattr(session.config, "workerinput"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Prints one line for each reason for which tests were skipped."""
    for reason, count in _skipped.most_common():
        terminalreporter.write_line(f"skipped {count}: {reason}")
    if _skipped and os.environ.get("TALLYSTICK_REQUIRE_SERVICES"):
        skipped = _skipped.total()
        terminalreporter.write_line(f"{skipped} tests were skipped, but TALLYSTICK_REQUIRE_SERVICES allows none", red=True)
