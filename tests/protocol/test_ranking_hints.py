"""Ranking hints: what a submission says of its sealed request."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tallystick.protocol.criteria import SORTS
from tallystick.protocol.errors import BadMessage
from tallystick.protocol.options import IGNORABLE
from tallystick.protocol.ranking_hints import MAX_HINTS, NO_HINTS, RankingHints
from tallystick.protocol.requirements import NO_REQUIREMENTS, Requirements
from tallystick.protocol.types import Amount
from tallystick.protocol.weights import MAX_WEIGHT, Weights
from tallystick.protocol.wire import SUBMISSION_OPTIONS, dumps
from tests.protocol.strategies import addresses

counts = st.integers(0, (1 << 32) - 1)
amounts = st.integers(0, MAX_WEIGHT).map(Amount)


@given(st.builds(RankingHints, counts, st.sampled_from(SORTS), st.builds(Weights, amounts, amounts, amounts), addresses, counts))
def test_the_coordinator_reads_what_the_client_writes(hints: RankingHints) -> None:
    """Every member survives, in few bytes."""
    assert RankingHints.from_json(hints.to_json()) == hints
    assert len(dumps(hints.to_json())) <= MAX_HINTS


@pytest.mark.parametrize("value", [b"", b"{", b"[]", b'{"sort": "beauty"}', b"\xff"])
def test_malformed_hints_refuse_a_submission(value: bytes) -> None:
    """Bytes that are no hints are the client's fault, and the error names them."""
    (option,) = [option for option in SUBMISSION_OPTIONS if option.field == "hints"]
    with pytest.raises(BadMessage, match=r"submission\.hints"):
        option.read(value, "submission.hints")
    assert option.number >= IGNORABLE, "an older coordinator ranks without them"


def test_requirements_survive_as_they_are() -> None:
    """Those that require nothing are told apart from none; members of a later release are ignored."""
    for require in (None, NO_REQUIREMENTS, Requirements(region=("eu",), precision=("bf16",), context_tokens=9)):
        hints = RankingHints(require=require, needs=("tools",))
        assert RankingHints.from_json(hints.to_json()) == hints
    read = RankingHints.from_json({"require": {"region": ["eu"], "later": 1}, "needs": ["tools"]})
    assert read == RankingHints(require=Requirements(region=("eu",)), needs=("tools",))
    assert read.likely == Requirements(region=("eu",), features=("tools",))
    assert RankingHints(needs=("tools",)).likely is None


def test_hints_that_say_nothing_are_empty() -> None:
    """A plain request has no members; those that a later release adds are ignored."""
    assert NO_HINTS.to_json() == {}
    assert RankingHints.from_json({"later": [1]}) == NO_HINTS


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        ([], "submission.hints: expected a JSON object"),
        ({"sort": "beauty"}, "submission.hints.sort: expected one of price, latency, throughput, speed, got 'beauty'"),
        ({"sort": 1}, "submission.hints.sort"),
        ({"likelyTokens": -1}, "submission.hints.likelyTokens"),
        ({"cachedTokens": 1 << 32}, "submission.hints.cachedTokens"),
        ({"holder": "0x1"}, "submission.hints.holder"),
        ({"holder": 1}, "submission.hints.holder"),
        ({"weights": {"speed": "1"}}, "submission.hints.weights.speed"),
        ({"weights": {"first_token": 1}}, "unknown weights: first_token"),
        ({"require": []}, "submission.hints.require: expected a JSON object"),
        ({"require": {"region": 1}}, "submission.hints.require.region"),
        ({"require": {"contextTokens": -1}}, "submission.hints.require.contextTokens"),
        ({"needs": "tools"}, "submission.hints.needs: expected a list"),
        ({"needs": [1]}, "submission.hints.needs"),
    ],
)
def test_a_malformed_hint_is_named(raw: Any, text: str) -> None:
    """An error names the member."""
    with pytest.raises(BadMessage) as caught:
        RankingHints.from_json(raw)
    assert text in str(caught.value)
