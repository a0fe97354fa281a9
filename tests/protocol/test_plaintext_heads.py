"""Heads of plaintexts: malformed ones are refused by the member that is wrong."""

from __future__ import annotations

import orjson
import pytest

from tallystick.protocol.errors import BadMessage
from tallystick.protocol.link import Beat
from tallystick.protocol.plaintext_heads import RequestHead, join_request, load_response_head, split_request


@pytest.mark.parametrize("status", [0, 99, 600, 99_999, -200, 200.0, "200", True, None])
def test_a_response_head_carries_a_real_status(status: object) -> None:
    """A status that no HTTP server could send is refused when it is read."""
    with pytest.raises(BadMessage, match=r"^response\.status: expected a whole number from 100 to 599"):
        load_response_head(orjson.dumps({"status": status, "contentType": "text/plain"}))


@pytest.mark.parametrize(
    "content_type", ["text/plain\r\nSet-Cookie: a=b", "a\nb", "a\0b", "\x7f", "t\u00e9xt", "a" * 257, 5, None]
)
def test_a_content_type_cannot_break_out_of_its_header(content_type: object) -> None:
    """Line ends, control characters and other characters that a header cannot contain are refused at both ends."""
    with pytest.raises(BadMessage, match=r"^response\.contentType: expected"):
        load_response_head(orjson.dumps({"status": 200, "contentType": content_type}))
    with pytest.raises(BadMessage, match=r"^request\.contentType: expected"):
        split_request(orjson.dumps({"path": "/", "contentType": content_type}) + b"\n")


@pytest.mark.parametrize("log_head", ["0", "zz", "00" * 129, 1, {}])
def test_a_log_head_is_short_and_in_hex(log_head: object) -> None:
    """What is passed on of the match log is refused by its name if it is no text of hex digits, wherever it travels."""
    members = {"path": "/", "status": 200, "contentType": "a", "capacity": [], "logHead": log_head}
    with pytest.raises(BadMessage, match=r"^request\.logHead: expected"):
        split_request(orjson.dumps(members) + b"\n")
    with pytest.raises(BadMessage, match=r"^response\.logHead: expected"):
        load_response_head(orjson.dumps(members))
    with pytest.raises(BadMessage, match=r"^beat\.logHead: expected"):
        Beat.from_json(members)


def test_a_request_without_a_line_end_has_no_head() -> None:
    """A truncated head is not read as a request without a body."""
    with pytest.raises(BadMessage, match="expected a head line"):
        split_request(b'{"path":"/","contentType":"a"}')


@pytest.mark.parametrize("wanted", [True, False])
def test_a_request_says_whether_evidence_is_wanted(wanted: bool) -> None:
    """It is not wanted unless the head says so, in true or false."""
    head = RequestHead("/v1/chat/completions", evidence=wanted)
    assert split_request(join_request(head, b"body")) == (head, b"body")
    with pytest.raises(BadMessage, match=r"^request\.evidence: expected true or false, got '1'"):
        split_request(orjson.dumps({"path": "/", "contentType": "text/plain", "evidence": 1}) + b"\n")
