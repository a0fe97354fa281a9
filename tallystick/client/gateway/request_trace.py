"""The span of a request to the gateway, which continues its caller's trace (W3C Trace Context). Baggage is not read."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from starlette.types import Message, Scope, Send

from tallystick.client.gateway.request_headers import headers_of
from tallystick.runtime.access_log import CLIENT_GONE, record, recorded
from tallystick.runtime.http_direct import DirectRequest
from tallystick.tracing.spans import OUTCOME, Tracer, Value


@contextlib.contextmanager
def served_request(tracer: Tracer, scope: Scope, send: Send) -> Iterator[Send]:
    """Records a request while the block lasts, in which its span is the current one. Yields the `send` for its answer.

    The request's line in the log gets the trace's id.
    """
    headers, route = headers_of(scope), scope["path"]
    attributes: dict[str, Value] = {
        "http.request.method": scope["method"],
        "url.path": route,
        "url.scheme": scope.get("scheme", "http"),
    }
    name = f"{scope['method']} {route}"
    observed = send if isinstance(send, DirectRequest) else _Observed(send)
    with tracer.serve(name, headers.all("traceparent"), headers.all("tracestate"), attributes) as span:
        record(trace_id=span.context.trace_id.hex())
        try:
            yield observed
        finally:
            status, fields = observed.status, recorded()
            span.set("http.response.status_code", status)
            outcome = str(fields.get("outcome", ""))
            if outcome:
                span.set(OUTCOME, outcome)
            if status >= 400:
                span.fail(outcome or str(status))


class _Observed:
    """An ASGI `send` that notes the status of the answer."""

    def __init__(self, send: Send) -> None:
        self._send, self.status = send, CLIENT_GONE

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        await self._send(message)
