from __future__ import annotations

import pytest

from node.engines.addresses import base_addresses, uses_proxy
from tallystick.protocol.routes import CHAT

HOST = "https://engine.example"


@pytest.mark.parametrize(
    ("url", "chat", "metrics"),
    [
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000/v1/chat/completions", "http://127.0.0.1:8000/metrics"),
        ("http://127.0.0.1:8000/v1/", "http://127.0.0.1:8000/v1/chat/completions", "http://127.0.0.1:8000/metrics"),
        (f"{HOST}/api/v1", f"{HOST}/api/v1/chat/completions", f"{HOST}/api/metrics"),
        (f"{HOST}/api", f"{HOST}/api/v1/chat/completions", f"{HOST}/api/metrics"),
        (f"{HOST}/v1/openai", f"{HOST}/v1/openai/chat/completions", f"{HOST}/metrics"),
        (f"{HOST}/api/paas/v4/", f"{HOST}/api/paas/v4/chat/completions", f"{HOST}/api/paas/metrics"),
        (f"{HOST}/api/v3", f"{HOST}/api/v3/chat/completions", f"{HOST}/api/metrics"),
        (f"{HOST}/v1beta/openai/", f"{HOST}/v1beta/openai/chat/completions", f"{HOST}/metrics"),
        (
            f"{HOST}/v1beta1/projects/p/locations/l/endpoints/openapi",
            f"{HOST}/v1beta1/projects/p/locations/l/endpoints/openapi/chat/completions",
            f"{HOST}/metrics",
        ),
        (
            f"{HOST}/openai/v1?api-version=x",
            f"{HOST}/openai/v1/chat/completions?api-version=x",
            f"{HOST}/openai/metrics?api-version=x",
        ),
        (f"{HOST}/v1/chat/completions", f"{HOST}/v1/chat/completions", f"{HOST}/metrics"),
        (f"{HOST}/v1/models/", f"{HOST}/v1/chat/completions", f"{HOST}/metrics"),
    ],
)
def test_a_base_url_is_meant_as_the_sdks_mean_it(url: str, chat: str, metrics: str) -> None:
    """A version in the path, wherever it stands, means that the URL is complete."""
    base = base_addresses(url)[0]
    assert (base.route(CHAT), base.endpoint("/metrics")) == (chat, metrics)


def test_a_url_without_a_version_may_be_complete() -> None:
    """Such a URL is tried with /v1 first, and then as it is."""
    assert [base.route(CHAT) for base in base_addresses(f"{HOST}/inference/")] == [
        f"{HOST}/inference/v1/chat/completions",
        f"{HOST}/inference/chat/completions",
    ]


def test_proxies_are_for_other_machines() -> None:
    """An engine on this machine is never asked through a proxy."""
    assert uses_proxy(HOST)
    assert not any(map(uses_proxy, ("http://127.0.0.1:1/v1", "http://localhost:1", "http://[::1]:1")))
