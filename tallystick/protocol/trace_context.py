"""The trace context that a job may carry: which trace its spans belong to, and their parent. Pure.

A submission carries it as an option, and a node that takes TRACE frames gets it before the job. It is 25 bytes: trace id (16),
span id (8), flags (1). Nothing else of W3C Trace Context goes with a job: neither the vendors' `tracestate` nor baggage.
"""

from __future__ import annotations

from typing import NamedTuple

_TRACE, _SPAN = 16, 8
CONTEXT_BYTES = _TRACE + _SPAN + 1
_SAMPLED = 0x01


class TraceContext(NamedTuple):
    """A span by the ids of W3C Trace Context (Level 1, section 3.2.2). `sampled`: whether its trace is recorded."""

    trace_id: bytes
    span_id: bytes
    sampled: bool = True

    def pack(self) -> bytes:
        """The wire form."""
        return self.trace_id + self.span_id + bytes((_SAMPLED if self.sampled else 0,))

    @classmethod
    def unpack(cls, raw: bytes) -> TraceContext | None:
        """Reads the wire form; None for one that is not valid, such as ids of zeros, since no job fails because of its trace.

        Flags that are not known are ignored (section 4.2 of the specification).
        """
        if len(raw) != CONTEXT_BYTES or not any(raw[:_TRACE]) or not any(raw[_TRACE:-1]):
            return None
        return cls(raw[:_TRACE], raw[_TRACE:-1], bool(raw[-1] & _SAMPLED))

    @property
    def traceparent(self) -> str:
        """The value of the header of this name."""
        return f"00-{self.trace_id.hex()}-{self.span_id.hex()}-{_SAMPLED if self.sampled else 0:02x}"
