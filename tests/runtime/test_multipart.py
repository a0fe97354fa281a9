"""Fields of multipart forms are read and replaced without changing anything else."""

from __future__ import annotations

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tallystick.protocol.errors import BadMessage
from tallystick.runtime.multipart import add_field, read_field, replace_field

KIND = "multipart/form-data; boundary=b"
FORM = (
    b'--b\r\nContent-Disposition: form-data; name="file"; filename="model"\r\nContent-Type: audio/wav\r\n\r\nBY\r\n--TES\r\n'
    b'--b\r\ncontent-disposition: form-data; name="model"\r\n\r\nwhisper-1\r\n--b--\r\n'
)


def test_a_field_is_read_and_replaced() -> None:
    """A field is found by its name, unlike a file of that name; the rest of the form stays unchanged."""
    assert read_field(KIND, FORM, "model") == "whisper-1"
    assert read_field(KIND, FORM, "stream") is None
    assert replace_field(KIND, FORM, "model", "org/other") == FORM.replace(b"whisper-1", b"org/other")


@pytest.mark.parametrize(
    ("kind", "body", "says"),
    [
        ("application/json", FORM, "boundary"),
        ("multipart/form-data", FORM, "boundary"),
        (KIND, b"", "cut off"),
        (KIND, FORM[:-8], "cut off"),
        (KIND, b"nonsense", "expected a multipart form"),
        (KIND, FORM.replace(b"whisper-1", b"\xff"), "expected UTF-8"),
        (KIND, FORM.replace(b'"file"; filename="model"', b'"model"'), "expected one field, got 2"),
        (KIND, b"--b\r\nA: 1\r\n\r\n\r\n" * 1_001 + b"--b--\r\n", "parts"),
    ],
)
def test_bodies_that_are_no_form(kind: str, body: bytes, says: str) -> None:
    """A body that is not a form is refused by name."""
    with pytest.raises(BadMessage, match=says):
        read_field(kind, body, "model")


def test_a_field_that_is_not_there_is_not_replaced() -> None:
    """Replacing a missing field is refused, since the form would not contain it."""
    with pytest.raises(BadMessage, match="missing"):
        replace_field(KIND, FORM, "voice", "x")


@given(st.binary(max_size=200), st.text(min_size=1, max_size=50), st.text(min_size=1, max_size=50))
def test_as_a_client_writes_it(content: bytes, model: str, other: str) -> None:
    """A form written by httpx is read, also after a replacement, with any bytes beside the field."""
    request = httpx.Request("POST", "http://x", data={"model": model}, files={"file": ("a.wav", content)})
    kind, body = request.headers["content-type"], request.read()
    assert read_field(kind, body, "model") == model
    changed = replace_field(kind, body, "model", other)
    assert read_field(kind, changed, "model") == other
    assert changed.count(content) >= 1
    assert len(changed) - len(body) == len(other.encode()) - len(model.encode())


@given(
    st.lists(st.sampled_from([b"--b", b"\r\n", b"--", b"b", b"x", b'Content-Disposition: form-data; name="model"', b"\r\n\r\n"]))
)
def test_pieces_of_forms(parts: list[bytes]) -> None:
    """Any combination of a form's parts is a form or is refused."""
    body = b"".join(parts)
    try:
        value = read_field(KIND, body, "model")
    except BadMessage:
        return
    if value:
        assert value.encode() in body


@given(st.binary(max_size=200), st.text(min_size=1, max_size=50))
def test_a_field_is_added(content: bytes, model: str) -> None:
    """A form without the field gets it, and keeps its other bytes."""
    request = httpx.Request("POST", "http://x", files={"file": ("a.wav", content)}, data={"language": "en"})
    kind, body = request.headers["content-type"], request.read()
    assert read_field(kind, body, "model") is None
    added = add_field(kind, body, "model", model)
    assert (read_field(kind, added, "model"), read_field(kind, added, "language")) == (model, "en")
    assert added.endswith(body)
    with pytest.raises(BadMessage, match="boundary"):
        add_field("application/json", body, "model", model)
