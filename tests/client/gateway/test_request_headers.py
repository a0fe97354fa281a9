"""Headers as ASGI has them: the first of several with one name counts, and all of them can be listed."""

from __future__ import annotations

from typing import Any

from tallystick.client.gateway.request_headers import headers_of


def test_the_first_of_several_counts() -> None:
    """An absent header differs from an empty one; values are Latin-1."""
    raw = [(b"host", b"a"), (b"x-empty", b""), (b"host", b"b"), (b"x-name", b"\xe9")]
    scope: dict[str, Any] = {"type": "http", "headers": iter(raw)}
    headers = headers_of(scope)
    assert (headers.get("host"), headers.all("host"), headers.find("host")) == ("a", ["a", "b"], "a")
    assert (headers.get("x-empty", "default"), headers.find("x-empty"), headers.all("x-empty")) == ("", "", [""])
    assert (headers.get("absent"), headers.get("absent", "default"), headers.find("absent"), headers.all("absent")) == (
        "",
        "default",
        None,
        [],
    )
    assert headers.get("x-name") == "\xe9"
    assert "host" in headers
    assert "absent" not in headers
    assert b"host" not in headers
    assert headers_of(scope) is headers, "read once"
