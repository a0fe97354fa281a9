"""Opens and closes the export of traces. OpenTelemetry is imported here, and only if tracing is on."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import threading
from collections.abc import AsyncIterator, Mapping
from typing import Protocol

import structlog

from tallystick.protocol.errors import BadMessage
from tallystick.tracing.settings import TracingSettings, check_environment, is_on
from tallystick.tracing.spans import Tracer

log = structlog.get_logger()
INSTALL = "pip install 'tallystick[tracing]'"


class SpanExport(Protocol):
    """An open export (otlp.OtlpExport)."""

    @property
    def tracer(self) -> Tracer:
        """What begins spans."""
        ...

    @property
    def counts(self) -> SpanCounts:
        """What became of the spans."""
        ...

    def shut_down(self) -> None:
        """Sends what waits. Blocks."""
        ...


class SpanCounts(Protocol):
    """What became of the spans that ended."""

    def by_outcome(self) -> Mapping[str, int]:
        """The totals: exported, failed (sent in vain) and dropped (the queue was full)."""
        ...


@contextlib.asynccontextmanager
async def exporting(
    settings: TracingSettings, service: str, *, environment: Mapping[str, str] = os.environ, trusts_parent: bool = True
) -> AsyncIterator[SpanExport | None]:
    """The export of a process while the block lasts; None if tracing is off. Its end waits `flush_seconds` for the backend.

    `environment`: its OTEL_ variables win over the settings. `trusts_parent`: see otlp.make_sampler. Raises BadMessage for
    settings that cannot be used, and if OpenTelemetry is not installed.
    """
    if not is_on(settings, environment):
        yield None
        return
    export = _open(settings, service, environment, trusts_parent=trusts_parent)
    log.info("traces are exported", service=service)
    try:
        yield export
    finally:
        if not await _finished(export, settings.flush_seconds):
            log.warning("traces not exported at the stop: the backend did not take them in time", seconds=settings.flush_seconds)


def _open(settings: TracingSettings, service: str, environment: Mapping[str, str], *, trusts_parent: bool) -> SpanExport:
    check_environment(environment)
    try:
        from tallystick.tracing.otlp import OtlpExport  # noqa: PLC0415 - an optional extra, loaded only if it is used
    except ImportError as error:
        if error.name is None or not error.name.startswith(("opentelemetry", "requests", "google")):
            raise
        raise BadMessage(f"config: tracing: OpenTelemetry is not installed; install it with: {INSTALL}") from None
    return OtlpExport(settings, service, environment, trusts_parent=trusts_parent)


async def _finished(export: SpanExport, seconds: float) -> bool:
    """Whether the export ended in time. Its thread keeps no process alive."""
    loop, ended = asyncio.get_running_loop(), asyncio.Event()

    def shut_down() -> None:
        try:
            export.shut_down()
        finally:
            with contextlib.suppress(RuntimeError):  # the loop may be closed by now
                loop.call_soon_threadsafe(ended.set)

    threading.Thread(target=shut_down, name="last traces", daemon=True).start()
    try:
        async with asyncio.timeout(seconds):
            await ended.wait()
    except TimeoutError:
        return False
    return True


def application_tracer() -> Tracer | None:
    """The tracer of an application that has set up OpenTelemetry itself; None for any other."""
    if "opentelemetry.trace" not in sys.modules:
        return None
    from tallystick.tracing.application import application_tracer as of_application  # noqa: PLC0415 - see above

    return of_application()
