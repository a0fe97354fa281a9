from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tallystick.protocol.errors import BadMessage
from tallystick.protocol.merkle import inclusion_ranges, leaf_hash
from tallystick.protocol.token_evidence import (
    MAX_MILLINATS,
    MAX_TOKEN_ID,
    TOP,
    EvidenceBuilder,
    EvidenceRow,
    evidence_root,
    leaf,
    pack_evidence,
    pack_report,
    unpack_evidence,
)
from tallystick.protocol.types import ZERO_HASH

tokens = st.integers(0, MAX_TOKEN_ID)
reports = st.dictionaries(tokens, st.floats(-100, 0), max_size=8).map(lambda found: list(found.items()))
rows = st.builds(EvidenceRow.of, tokens, reports)
GOLDEN = EvidenceRow.of(300, [(300, -0.25), (7, -1.5), (200_000, -70.0)])


@given(st.lists(rows, max_size=20))
def test_rows_survive_packing(answer: list[EvidenceRow]) -> None:
    """Packed rows are read as they were written."""
    assert unpack_evidence(pack_evidence(answer)) == tuple(answer)


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    """Bytes from outside are refused by name, or are the one encoding of what is read."""
    try:
        answer = unpack_evidence(data)
    except BadMessage:
        return
    assert pack_evidence(answer) == data


def test_encoding_of_a_row() -> None:
    """A golden vector."""
    assert GOLDEN.pack().hex() == "ac0203ac0200fa0705dcc09a0cffff"
    assert leaf(1, GOLDEN) == bytes.fromhex("00000001") + GOLDEN.pack()


def test_a_token_takes_at_most_forty_bytes() -> None:
    """The size that clients and nodes pay for, with a vocabulary of 200,000 tokens."""
    draws = random.Random(1)
    answer = [
        EvidenceRow.of(draws.randrange(200_000), [(draws.randrange(200_000), -draws.random() * 20) for _ in range(TOP)])
        for _ in range(1_000)
    ]
    assert len(pack_evidence(answer)) <= 31 * len(answer)


def test_the_best_five_are_kept_in_order() -> None:
    """Whatever order an engine reports."""
    row = EvidenceRow.of(1, [(n, -float(n)) for n in (6, 3, 2, 5, 4, 1)])
    assert row.top == tuple((n, 1_000 * n) for n in range(1, 6))
    assert EvidenceRow.of(1, [(9, -1.0), (2, -1.0)]).top == ((2, 1_000), (9, 1_000))


def test_numbers_of_engines_are_rounded_into_range() -> None:
    """A tiny positive logarithm is rounding; minus infinity is the smallest probability."""
    assert EvidenceRow.of(1, [(1, 1e-6), (2, float("-inf"))]).top == ((1, 0), (2, MAX_MILLINATS))


@pytest.mark.parametrize("logprob", [0.5, float("nan"), float("inf")])
def test_impossible_probabilities_are_refused(logprob: float) -> None:
    """No engine means these."""
    with pytest.raises(BadMessage, match="log-probability of at most 0"):
        EvidenceRow.of(1, [(1, logprob)])


@pytest.mark.parametrize(
    ("token", "top"),
    [
        (-1, ()),
        (MAX_TOKEN_ID + 1, ()),
        (1, ((-1, 0),)),
        (1, ((1, -1),)),
        (1, ((1, MAX_MILLINATS + 1),)),
        (1, ((1, 5), (2, 4))),
        (1, ((2, 5), (1, 5))),
        (1, ((1, 5), (1, 6))),
        (1, tuple((n, n) for n in range(TOP + 1))),
    ],
)
def test_rows_have_one_form(token: int, top: tuple[tuple[int, int], ...]) -> None:
    """Numbers out of range, a wrong order and doubles are refused."""
    with pytest.raises(BadMessage, match="evidence"):
        EvidenceRow(token, top)


@pytest.mark.parametrize("wrong", ["ac02", "ac", "ac8000", "ac02ff", "ffffffff7f00", "80", "010101", "01010100"])
def test_cut_and_padded_bytes_are_refused(wrong: str) -> None:
    """Each of these is a row with a byte too few or too many."""
    with pytest.raises(BadMessage, match="evidence"):
        unpack_evidence(bytes.fromhex(wrong))


def test_the_root_commits_to_each_row_and_its_position() -> None:
    """Any change, exchange or omission of rows changes the root; no rows have no root."""
    first, second, third = (EvidenceRow.of(n, [(n, -0.5)]) for n in range(3))
    roots = {
        evidence_root(answer)
        for answer in ([first], [first, second], [second, first], [first, second, third], [first, third, second], [first, first])
    }
    assert len(roots) == 6
    assert evidence_root([]) == ZERO_HASH
    assert evidence_root([first]) == leaf_hash(leaf(0, first))
    assert len(inclusion_ranges(1, 3)) == 2


@given(tokens, st.lists(st.tuples(tokens, st.floats(-100, 0.001)), max_size=8))
def test_a_report_is_packed_as_its_row(token: int, logprobs: list[tuple[int, float]]) -> None:
    """The short way gives the same bytes, also for tokens that are named twice and numbers that were rounded up."""
    assert pack_report(token, logprobs) == EvidenceRow.of(token, logprobs).pack()


@pytest.mark.parametrize(
    ("token", "logprobs"),
    [(-1, []), (MAX_TOKEN_ID + 1, []), (1, [(-1, -0.5)]), (1, [(1, 0.002)]), (1, [(1, float("nan"))]), (1, [(1, float("inf"))])],
)
def test_a_report_that_is_no_row(token: int, logprobs: list[tuple[int, float]]) -> None:
    """Numbers out of range are refused the short way as well."""
    for pack in (pack_report, lambda *report: EvidenceRow.of(*report).pack()):
        with pytest.raises(BadMessage, match=r"^evidence: expected a"):
            pack(token, logprobs)


def test_a_builder_has_the_root_of_its_rows() -> None:
    """At every length, and no root without rows."""
    builder = EvidenceBuilder()
    assert (builder.root, bytes(builder.packed), builder.count) == (ZERO_HASH, b"", 0)
    for number in range(1, 20):
        builder.add(number, [(number, -0.5), (7 * number, -1.5)])
        answer = unpack_evidence(bytes(builder.packed))
        assert (builder.count, builder.root) == (number, evidence_root(answer))
        assert answer[-1] == EvidenceRow.of(number, [(number, -0.5), (7 * number, -1.5)])
