from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import pytest

from tallystick.protocol.errors import BadMessage
from tallystick.tracing.otlp import MAX_QUEUE, OtlpExport
from tallystick.tracing.settings import TracingSettings
from tests.tracing.collector import Collector, collecting


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """The SDK reads the process's environment too."""
    import os

    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)


def _open(endpoint: str, **settings: object) -> OtlpExport:
    return OtlpExport(TracingSettings(endpoint=endpoint, **settings), "tallystick-test", {}, trusts_parent=True)  # type: ignore[arg-type]


def test_spans_arrive_with_their_service_and_attributes() -> None:
    """Under /v1/traces of the endpoint, whether or not it ends with a slash and has a path."""
    for path in ("", "/", "/api/public/otel"):
        with collecting() as collector:
            export = _open(collector.url + path)
            span = export.tracer.start("outer", attributes={"text": "x", "number": 7, "flag": True})
            span.child("inner").end()
            span.end()
            export.shut_down()
            assert [target for target, _ in collector.requests] == [f"{path.rstrip('/')}/v1/traces"]
            (outer,) = collector.named("outer")
            assert (outer.service, outer.attributes) == ("tallystick-test", {"text": "x", "number": 7, "flag": True})
            assert collector.named("inner")[0].parent_id == outer.span_id
            assert export.counts.by_outcome() == {"exported": 2, "failed": 0, "dropped": 0}


def test_headers_of_a_file_are_sent(tmp_path: Path) -> None:
    """As Langfuse and hosted backends need them."""
    file = tmp_path / "headers"
    file.write_text("Authorization: Basic s3cret\n")
    file.chmod(0o600)
    with collecting() as collector:
        export = _open(collector.url, headers_file=file)
        export.tracer.start("span").end()
        export.shut_down()
        assert collector.requests[0][1]["authorization"] == "Basic s3cret"
    with pytest.raises(BadMessage, match="headers_file"):
        _open("http://127.0.0.1:9", headers_file=tmp_path / "none")


def test_the_environment_wins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Endpoint, headers, service name and sampler, as the SDK of OpenTelemetry reads them."""
    file = tmp_path / "headers"
    file.write_text("x-from: file\n")
    file.chmod(0o600)
    with collecting() as collector:
        environment = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url,
            "OTEL_EXPORTER_OTLP_HEADERS": "x-from=environment",
            "OTEL_SERVICE_NAME": "mine",
        }
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        export = OtlpExport(
            TracingSettings(endpoint="http://127.0.0.1:9", headers_file=file), "other", environment, trusts_parent=True
        )
        export.tracer.start("span").end()
        export.shut_down()
        assert collector.named("span")[0].service == "mine"
        assert collector.requests[0][1]["x-from"] == "environment"


def test_the_share_is_recorded() -> None:
    """None of them at 0."""
    with collecting() as collector:
        export = _open(collector.url, sample_ratio=0.0)
        for _ in range(50):
            export.tracer.start("span").end()
        export.shut_down()
        assert collector.spans == []


async def test_a_backend_that_hangs_stops_nobody(caplog: pytest.LogCaptureFixture) -> None:
    """Spans beyond the queue are dropped and counted at once. What was queued arrives when the backend answers again."""
    with collecting() as collector:
        collector.held.clear()
        export = _open(collector.url)
        for _ in range(MAX_QUEUE + 100):
            export.tracer.start("span").end()
        assert export.counts.dropped == 100
        assert "Queue full" not in caplog.text
        collector.held.set()
        await asyncio.to_thread(export.shut_down)
        counts = export.counts
        assert counts.exported + counts.failed == MAX_QUEUE
        assert counts.waiting == 0


@pytest.mark.parametrize("status", [401, 404, 503])
def test_what_a_backend_refuses_is_counted_and_no_secret_is_logged(
    status: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The library's warnings name the status, and neither the headers nor the spans."""
    file = tmp_path / "headers"
    file.write_text("Authorization: Basic s3cret\n")
    file.chmod(0o600)
    with collecting() as collector, caplog.at_level(logging.DEBUG):
        collector.status = status
        export = _open(collector.url, headers_file=file)
        export.tracer.start("span", attributes={"a": "s3cret"}).end()
        export.shut_down()
        assert export.counts.by_outcome() == {"exported": 0, "failed": 1, "dropped": 0}
    assert "s3cret" not in caplog.text


def test_a_backend_that_is_away_is_counted() -> None:
    """Nobody listens there."""
    with collecting() as collector:
        pass
    export = _open(collector.url)
    export.tracer.start("span").end()
    export.shut_down()
    assert export.counts.by_outcome() == {"exported": 0, "failed": 1, "dropped": 0}


def test_long_values_are_cut() -> None:
    """No span takes unbounded memory, whatever names a caller or a provider chooses."""
    collector: Collector
    with collecting() as collector:
        export = _open(collector.url)
        span = export.tracer.start("span", attributes={"long": "x" * 1_000_000})
        for number in range(1_000):
            span.event(f"event {number}")
            span.set(f"attribute {number}", number)
        span.end()
        export.shut_down()
        (arrived,) = collector.named("span")
        assert max(len(str(value)) for value in arrived.attributes.values()) <= 65_536
        assert len(arrived.events) <= 128
        assert len(arrived.attributes) <= 64


def test_text_that_is_no_unicode_loses_no_span() -> None:
    """A caller may name a model by a lone surrogate, as JSON allows. Other spans of the export arrive too."""
    with collecting() as collector:
        export = _open(collector.url)
        odd = export.tracer.start("chat \ud800", attributes={"model": "\udfff é"})
        odd.child("step \ud800", attributes={"a": "\ud800"}).end()
        odd.set("later", "\ud83d")
        odd.event("event \ud800", {"b": "\ud800"})
        odd.end()
        with export.tracer.serve("GET \ud800", [], [], {"path": "\ud800"}):
            export.tracer.start_of_job("job \ud800", bytes(range(16)), None, {"c": "\ud800"}, first=True).end()
        export.shut_down()
        assert sorted(span.name for span in collector.spans) == ["GET ?", "chat ?", "job ?", "step ?"]
        (chat,) = collector.named("chat")
        assert chat.attributes == {"model": "? é", "later": "?"}
