"""Traces of the whole market, in the processes that a user runs, at an OTLP backend."""

from __future__ import annotations

import signal
import subprocess
from typing import Any

import httpx

from tests.contracts.freshness import check_freshness
from tests.e2e.conftest import DEMO, clean_environment, read_trace
from tests.tracing.collector import Collector, collecting

CALLER, SPAN = "ab" * 16, "00f067aa0ba902b7"
TREE = {
    ("tallystick-gateway", "POST /v1/chat/completions", ""),
    ("tallystick-gateway", "chat", "POST /v1/chat/completions"),
    *(
        ("tallystick-gateway", step, "chat")
        for step in ("select providers", "submit", "wait for match", "attempt", "check receipt")
    ),
    ("tallystick-coordinator", "job", "chat"),
    *(("tallystick-coordinator", step, "job") for step in ("match", "attempt", "commit receipt")),
    ("tallystick-node", "serve job", "attempt"),
    *(("tallystick-node", step, "serve job") for step in ("admission", "wait for slot", "engine request", "receipt")),
}


def _tree(collector: Collector) -> set[tuple[str, str, str]]:
    """Service, name and parent's name of each span of the caller's trace. The model is left out of names."""
    spans = collector.traces().get(CALLER, [])
    names = {span.span_id: "chat" if span.name.startswith("chat ") else span.name for span in spans}
    return {(span.service, names[span.span_id], names.get(span.parent_id, "")) for span in spans}


def _ask(market: dict[str, Any]) -> None:
    body = {"model": market["model"], "stream": True, "messages": [{"role": "user", "content": "a prompt with s3cret"}]}
    headers = {"traceparent": f"00-{CALLER}-{SPAN}-01", "tracestate": "vendor=s3cret", "baggage": "user=s3cret"}
    with httpx.Client(base_url=market["gateway"], trust_env=False, timeout=120) as http:
        answer = http.post("/v1/chat/completions", json=body, headers=headers)
    assert answer.status_code == 200, answer.text


def test_a_job_is_one_trace_over_all_processes_if_the_user_shares_it() -> None:
    """From the caller's span to the request to the engine, by settings in the environment alone; without prompts or tracestate.

    A stop sends what waits.
    """
    check_freshness()
    with collecting() as collector:
        settings = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url, "TALLY_GATEWAY_TRACING_SHARE_TRACE_IDS": "true"}
        process = subprocess.Popen(DEMO, stdout=subprocess.PIPE, text=True, env=clean_environment() | settings)
        try:
            market = read_trace(process)
            _ask(market)
        finally:
            process.send_signal(signal.SIGTERM)
            assert process.wait(300) == 0
        assert _tree(collector) == TREE
        spans = collector.traces()[CALLER]
        (root,) = (span for span in spans if span.name == "POST /v1/chat/completions")
        assert root.parent_id == SPAN
        assert all(span.tracestate == "" for span in spans if span.service != "tallystick-gateway")
        content = "".join(str(span.attributes) for span in spans)
        assert "s3cret" not in content
        (node,) = (span for span in spans if span.name == "serve job")
        (job,) = (span for span in spans if span.name.startswith("chat "))
        assert node.attributes["tallystick.job.id"] == job.attributes["tallystick.job.id"]
        assert node.attributes["tallystick.cost"] == job.attributes["tallystick.cost"]
