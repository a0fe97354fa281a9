from __future__ import annotations

import pytest

from tallystick.chain.log_span import UNLIMITED, LogSpan, suggested_width

FIRST, WIDTH = 0x5B8D80, 2_000


@pytest.mark.parametrize(
    ("message", "width"),
    [
        ("You can make eth_getLogs requests with up to a 500 block range", 500),
        ("up to a 10 block range. Based on your parameters, this block range should work: [0x5b8d80, 0x5b8d89]", 10),
        ("query returned more than 10000 results. Try with this block range [0x5B8D80, 0x5B8E7F].", 256),
        ("query exceeds max results 20000, retry with the range 6000000-6000999", 1_000),
        ("retry with this block range 6000000 to 6000099", 100),
        ("eth_getLogs is limited to a 1,000 range", 1_000),
        ("exceed maximum block range: 1024", 1_024),
        ("block range exceeds 1k", 1_000),
        ("Please limit the query to at most 1000 blocks", 1_000),
        ("requested too many blocks from 6000000 to 6001999, maximum is set to 128", 128),
        ("requested range of 1999 blocks is greater than the limit of 800", 800),
        ("max 10 blocks", 10),
        ("block range limit exceeded (100 blocks)", 100),
        ("query returned more than 10000 results", None),
        ("eth_getLogs is limited to a 10,000 range", None),
        ("limit exceeded", None),
        ("", None),
        ("block range is too wide (-32602)", None),
    ],
)
def test_the_range_that_a_refusal_names(message: str, width: int | None) -> None:
    """The width is read from a range that would do or from a number of blocks; numbers of other things and the refused range are
    not taken for one.
    """
    assert suggested_width(message, FIRST, WIDTH) == width


def test_a_refused_range_shrinks_to_one_block() -> None:
    """Without a number each refusal halves the range, down to one block."""
    span, widths, last = LogSpan(), list[int](), FIRST + WIDTH - 1
    for _ in range(13):
        last = FIRST + span.refuse(FIRST, last, "too many") - 1
        widths.append(span.limit)
    assert widths == [1_000, 500, 250, 125, 62, 31, 15, 7, 3, 1, 1, 1, 1]


def test_an_accepted_range_grows_again() -> None:
    """After enough accepted ranges of the full width the width doubles; shorter ranges say nothing."""
    span = LogSpan()
    assert span.limit == UNLIMITED
    span.accept(2_000)
    assert span.limit == UNLIMITED
    span.refuse(0, 1_999, "too many logs")
    for _ in range(100):
        span.accept(999)
    assert span.limit == 1_000
    for _ in range(16):
        assert span.limit == 1_000
        span.accept(1_000)
    assert span.limit == 2_000


def test_a_limit_that_was_named_is_kept_for_longer() -> None:
    """A number that the endpoint named is exceeded again only after hundreds of ranges."""
    span = LogSpan()
    assert span.refuse(0, 1_999, "limited to a 500 range") == 500
    for _ in range(511):
        span.accept(500)
    assert span.limit == 500
    span.accept(500)
    assert span.limit == 1_000
    assert span.refuse(0, 999, "limited to a 500 range") == 500
    for _ in range(1_000):
        span.accept(500)
    assert span.limit == 500, "each refusal makes it more patient"
