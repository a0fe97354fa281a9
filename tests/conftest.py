"""For the whole suite: where TALLYSTICK_REQUIRE_SERVICES is set, as in CI, a skipped test fails the run."""

from __future__ import annotations

import os

import pytest

_skipped: list[str] = []


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Remembers what was skipped."""
    if report.skipped and not hasattr(report, "wasxfail"):
        _skipped.append(report.nodeid)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Nothing that needs a real service may be skipped quietly where the services are there."""
    if _skipped and os.environ.get("TALLYSTICK_REQUIRE_SERVICES") and not hasattr(session.config, "workerinput"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Says why such a run failed."""
    if _skipped and os.environ.get("TALLYSTICK_REQUIRE_SERVICES"):
        terminalreporter.write_line(f"{len(_skipped)} tests were skipped, and here none may be", red=True)
