from __future__ import annotations

import ast
import asyncio
import subprocess
import sys
from collections.abc import Mapping

import pytest

from tallystick.protocol.errors import BadMessage
from tallystick.tracing import export as export_module
from tallystick.tracing.export import exporting
from tallystick.tracing.settings import TracingSettings
from tests.tracing.collector import collecting

_OFF = """
import asyncio, sys
from tallystick.tracing.export import application_tracer, exporting
from tallystick.tracing.settings import TracingSettings
import {module}

async def run():
    async with exporting(TracingSettings(), "test", environment={}) as export:
        assert export is None

asyncio.run(run())
print(sorted(name for name in sys.modules if name.startswith(("opentelemetry", "tallystick.tracing"))))
assert application_tracer() is None
"""
_MISSING = """
import asyncio, sys
for name in ("opentelemetry", "opentelemetry.sdk", "opentelemetry.context"):
    sys.modules[name] = None
from tallystick.tracing.export import exporting
from tallystick.tracing.settings import TracingSettings

async def run():
    async with exporting(TracingSettings(endpoint="http://127.0.0.1:9"), "test", environment={}):
        pass

asyncio.run(run())
"""


@pytest.mark.parametrize(
    "module", ["tallystick.client.sdk.sync", "tallystick.client.gateway.app", "node.service.daemon", "coordinator.app"]
)
def test_nothing_of_opentelemetry_is_loaded_while_it_is_off(module: str) -> None:
    """By any of the four sides; FastAPI, which the coordinator uses, loads its interface, which records nothing."""
    ran = subprocess.run([sys.executable, "-c", _OFF.replace("{module}", module)], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    loaded = set(ast.literal_eval(ran.stdout))
    own = {name for name in loaded if name.startswith("tallystick.tracing.")}
    assert "tallystick.tracing.export" in own
    assert not own & {"tallystick.tracing.application", "tallystick.tracing.otlp"}
    others = loaded - own - {"tallystick.tracing"}
    assert not others or module == "coordinator.app"
    assert not any(name.startswith(("opentelemetry.sdk", "opentelemetry.exporter", "opentelemetry.proto")) for name in others)


def test_a_missing_extra_is_an_error_with_the_command_that_installs_it() -> None:
    """Only if tracing is on."""
    ran = subprocess.run([sys.executable, "-c", _MISSING], capture_output=True, text=True, check=False)
    assert ran.returncode == 1
    assert (
        "BadMessage: config: tracing: OpenTelemetry is not installed; install it with: pip install 'tallystick[tracing]'"
        in ran.stderr
    )


async def test_what_waits_is_sent_at_the_end_of_the_block() -> None:
    """Without waiting for the next batch."""
    with collecting() as collector:
        async with exporting(TracingSettings(endpoint=collector.url), "test", environment={}) as export:
            assert export is not None
            export.tracer.start("last").end()
        assert [span.name for span in collector.spans] == ["last"]


class _Stuck:
    """An export whose end takes for ever, until it is released."""

    def __init__(self) -> None:
        self.began, self.release = asyncio.Event(), asyncio.Event()
        self._loop = asyncio.get_running_loop()

    tracer = None
    counts = None

    def shut_down(self) -> None:
        self._loop.call_soon_threadsafe(self.began.set)
        asyncio.run_coroutine_threadsafe(self.release.wait(), self._loop).result()


async def test_a_backend_that_takes_nothing_holds_up_no_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    """The block ends after `flush_seconds`, and what was not sent is lost."""
    stuck = _Stuck()

    def open_stuck(_settings: TracingSettings, _service: str, _environment: Mapping[str, str], *, trusts_parent: bool) -> _Stuck:
        return stuck

    monkeypatch.setattr(export_module, "_open", open_stuck)
    async with exporting(TracingSettings(endpoint="http://127.0.0.1:9", flush_seconds=0.05), "test", environment={}):
        pass
    await stuck.began.wait()
    stuck.release.set()


async def test_variables_that_cannot_be_used_are_refused_at_the_start() -> None:
    """Instead of traces that go nowhere."""
    with pytest.raises(BadMessage, match="http/protobuf"):
        async with exporting(
            TracingSettings(endpoint="http://127.0.0.1:9"), "test", environment={"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}
        ):
            pass
