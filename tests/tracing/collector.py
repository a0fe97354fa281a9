"""An OTLP backend in this process, which decodes what it gets, and shows it as trees."""

from __future__ import annotations

import contextlib
import gzip
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

Value = str | bool | int | float | list[Any]


@dataclass(slots=True)
class CollectedSpan:
    """A span as it came."""

    service: str
    name: str
    trace_id: str
    span_id: str
    parent_id: str
    kind: int
    failed: bool
    attributes: dict[str, Value]
    events: list[str]
    links: list[tuple[str, str]]
    tracestate: str
    start: int
    end: int


@dataclass
class Collector:
    """See the module's docstring. `status`: what it answers. While `held` is not set, it answers nothing."""

    url: str = ""
    status: int = 200
    held: threading.Event = field(default_factory=threading.Event)
    spans: list[CollectedSpan] = field(default_factory=list)
    requests: list[tuple[str, dict[str, str]]] = field(default_factory=list)

    def named(self, name: str, service: str = "") -> list[CollectedSpan]:
        """The spans of a name, or whose name begins with it and a blank."""
        return [
            span
            for span in list(self.spans)
            if (span.name == name or span.name.startswith(f"{name} ")) and service in ("", span.service)
        ]

    def traces(self) -> dict[str, list[CollectedSpan]]:
        """The spans by their trace."""
        traces: dict[str, list[CollectedSpan]] = {}
        for span in list(self.spans):
            traces.setdefault(span.trace_id, []).append(span)
        return traces

    def tree(self, trace_id: str) -> str:
        """A trace as text: one span a line, below its parent."""
        spans = sorted(self.traces()[trace_id], key=lambda span: span.start)
        known = {span.span_id for span in spans}
        lines: list[str] = []

        def add(span: CollectedSpan, depth: int) -> None:
            events = f" [{', '.join(span.events)}]" if span.events else ""
            failed = " FAILED" if span.failed else ""
            milliseconds = (span.end - span.start) / 1e6
            lines.append(f"{'  ' * depth}{span.service}: {span.name} {milliseconds:.1f} ms{events}{failed}")
            for child in spans:
                if child.parent_id == span.span_id:
                    add(child, depth + 1)

        for span in spans:
            if span.parent_id not in known:
                add(span, 0)
        return "\n".join(lines)

    def take(self, body: bytes) -> None:
        """Decodes a request."""
        request = ExportTraceServiceRequest.FromString(body)
        for resource in request.resource_spans:
            service = str(_attributes(resource.resource.attributes).get("service.name"))
            for scope in resource.scope_spans:
                self.spans += [_read(service, span) for span in scope.spans]


def _value(value: Any) -> Any:
    kind = value.WhichOneof("value")
    return [_value(item) for item in value.array_value.values] if kind == "array_value" else getattr(value, kind)


def _attributes(attributes: Any) -> dict[str, Value]:
    return {attribute.key: _value(attribute.value) for attribute in attributes}


def _read(service: str, span: Any) -> CollectedSpan:
    return CollectedSpan(
        service,
        span.name,
        span.trace_id.hex(),
        span.span_id.hex(),
        span.parent_span_id.hex(),
        span.kind,
        span.status.code == 2,
        _attributes(span.attributes),
        [event.name for event in span.events],
        [(link.trace_id.hex(), link.span_id.hex()) for link in span.links],
        span.trace_state,
        span.start_time_unix_nano,
        span.end_time_unix_nano,
    )


@contextlib.contextmanager
def collecting() -> Iterator[Collector]:
    """A collector that listens on a free port of loopback."""
    collector = Collector()
    collector.held.set()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            collector.held.wait(120)
            headers = {name.lower(): value for name, value in self.headers.items()}
            collector.requests.append((self.path, headers))
            if collector.status == 200:
                collector.take(gzip.decompress(body) if headers.get("content-encoding") == "gzip" else body)
            self.send_response(collector.status)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the name of the base class
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    collector.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield collector
    finally:
        collector.held.set()
        server.shutdown()
        server.server_close()
