"""Hooks of the whole suite: if TALLYSTICK_REQUIRE_SERVICES is set, as in CI, a skipped test fails the run."""

from __future__ import annotations

import os

import pytest

_skipped: list[str] = []


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Records skipped tests."""
    if report.skipped and not hasattr(report, "wasxfail"):
        _skipped.append(report.nodeid)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fails a run that skipped tests although all services are available."""
    if _skipped and os.environ.get("TALLYSTICK_REQUIRE_SERVICES") and not hasattr(session.config, "workerinput"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Prints the reason of such a failure."""
    if _skipped and os.environ.get("TALLYSTICK_REQUIRE_SERVICES"):
        terminalreporter.write_line(f"{len(_skipped)} tests were skipped, but TALLYSTICK_REQUIRE_SERVICES allows none", red=True)
