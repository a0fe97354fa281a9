"""Parsers of untrusted bytes return or raise an error of ours. scripts/fuzz searches further, guided by coverage."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import fuzz

SEEDS = fuzz.seeds()


@st.composite
def _damaged(draw: st.DrawFn, seed: bytes) -> bytes:
    """A valid input with some bytes replaced, removed, repeated or inserted."""
    data = bytearray(seed)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        length = draw(st.integers(0, 8))
        data[at : at + length] = draw(st.binary(max_size=8) | st.just(bytes(data[at : at + length]) * 2))
    return bytes(data)


def test_every_target_has_seeds() -> None:
    """The seeds are valid inputs of all targets."""
    assert SEEDS.keys() == fuzz.TARGETS.keys()
    for name in ("submission", "dispatch", "frames", "events"):
        for seed in SEEDS[name]:
            fuzz.TARGETS[name](seed)


@pytest.mark.parametrize("name", fuzz.TARGETS)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_bytes_from_outside(name: str, data: st.DataObject) -> None:
    """No input raises anything but an error of ours."""
    some = data.draw(st.binary(max_size=200) | st.sampled_from(SEEDS[name]).flatmap(_damaged))
    fuzz.run(fuzz.TARGETS[name], some)
