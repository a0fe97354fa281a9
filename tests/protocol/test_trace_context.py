from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tallystick.protocol.trace_context import CONTEXT_BYTES, TraceContext

TRACE, SPAN = bytes(range(1, 17)), bytes(range(1, 9))


@given(st.binary(min_size=16, max_size=16).filter(any), st.binary(min_size=8, max_size=8).filter(any), st.booleans())
def test_a_context_survives_the_journey(trace: bytes, span: bytes, sampled: bool) -> None:
    """Ids and the flag come back, from exactly 25 bytes."""
    context = TraceContext(trace, span, sampled)
    assert len(context.pack()) == CONTEXT_BYTES == 25
    assert TraceContext.unpack(context.pack()) == context


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        TRACE + SPAN,
        TRACE + SPAN + b"\1\1",
        bytes(16) + SPAN + b"\1",
        TRACE + bytes(8) + b"\1",
        bytes(25),
        bytes(255),
        b"00-" + b"ab" * 27,
    ],
)
def test_what_is_not_valid_is_no_context(raw: bytes) -> None:
    """Wrong lengths and ids of zeros are ignored, without an error."""
    assert TraceContext.unpack(raw) is None


@pytest.mark.parametrize(("flags", "sampled"), [(0x00, False), (0x01, True), (0x02, False), (0xFF, True), (0xFE, False)])
def test_only_the_sampled_flag_is_read(flags: int, sampled: bool) -> None:
    """Flags of later specifications are ignored, and not passed on."""
    context = TraceContext.unpack(TRACE + SPAN + bytes((flags,)))
    assert context == TraceContext(TRACE, SPAN, sampled)
    assert context.pack()[-1] == int(sampled)


def test_the_header_has_the_form_of_the_specification() -> None:
    """Version 00, and lower-case hex."""
    assert TraceContext(b"\xab" * 16, b"\xcd" * 8).traceparent == f"00-{'ab' * 16}-{'cd' * 8}-01"
    assert TraceContext(b"\xab" * 16, b"\xcd" * 8, sampled=False).traceparent.endswith("-00")
