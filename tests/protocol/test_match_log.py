"""Leaves and matches: one encoding each, commitments that open to one order, and draws that the coordinator cannot choose."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tallystick.protocol.criteria import Reason
from tallystick.protocol.eip712 import Domain, Signer
from tallystick.protocol.errors import BadMessage
from tallystick.protocol.log_leaves import RestartLeaf
from tallystick.protocol.match_log import Match, MatchLeaf, Verdict, commit, draw_of, load_leaf
from tallystick.protocol.types import Address, Hash, JobId
from tests.builders import build_match, build_order, build_terms

DOMAIN = Domain(31_337, Address("0x" + "5f" * 20))
PAYER, PROVIDER = Signer(b"\x01" * 32), Signer(b"\x02" * 32)
TERMS = build_terms()
ORDER = PAYER.sign(build_order(PAYER.address, PROVIDER.address, 1, terms_hash=TERMS.struct_hash()), DOMAIN)
MATCH = build_match(ORDER, TERMS, 7)
LEAF = MATCH.decision


def check(match: Match) -> None:
    """The check of the payer and the node."""
    match.check(TERMS.job, ORDER.digest, PROVIDER.address, PAYER.address)


def test_a_match_survives_the_journey() -> None:
    """The wire form is the index, the secret, the order and the leaf, in this order."""
    data = MATCH.dumps()
    assert Match.loads(data) == MATCH
    assert Match.loads(data).decision == LEAF
    assert data == (7).to_bytes(8, "big") + bytes(16) + ORDER.digest + MATCH.leaf
    check(MATCH)
    assert LEAF.to_json()["considered"][0]["outcome"] == "got the job"


def test_a_restart_survives_the_journey() -> None:
    """A restart is a leaf of ten bytes."""
    leaf = RestartLeaf(1_700_000_000)
    assert (load_leaf(leaf.dumps()), len(leaf.dumps()), leaf.epoch_at(5)) == (leaf, 10, 5)
    with pytest.raises(BadMessage, match="got that of a restart"):
        Match.loads(MATCH.dumps()[:56] + leaf.dumps())


@pytest.mark.parametrize(
    "outcome", [*[v for v in Verdict if v is not Verdict.CHOSEN], Reason.BUSY, Reason.FAILED, Reason.ASK_GONE]
)
def test_outcomes_and_missing_facts_survive_the_journey(outcome: Verdict | Reason) -> None:
    """Each outcome has its number, and an ask that was not listed has no facts."""
    other = LEAF.considered[0]._replace(outcome=outcome, facts=None, place=1)
    leaf = replace(LEAF, considered=(*LEAF.considered, other))
    assert load_leaf(leaf.dumps()) == leaf


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        (replace(MATCH, order_hash=Hash(bytes(32))), "match.orderHash"),
        (replace(MATCH, secret=b"\1" * 16), "commitment to the matched order"),
        (replace(MATCH, decision=replace(LEAF, job=JobId(b"\1" * 16))), "match.job"),
        (replace(MATCH, index=0), "match.index"),
        (build_match(ORDER, TERMS, 7, provider=PAYER.address), "match.provider"),
        (build_match(ORDER, TERMS, 7, commitment=Hash(bytes(32))), "commitment to the matched order"),
    ],
)
def test_a_match_of_another_order_is_refused(changed: Match, text: str) -> None:
    """Job, order, provider, payer and number of a match must be those of the order."""
    with pytest.raises(BadMessage, match=text):
        check(changed)


def test_a_commitment_opens_to_one_order() -> None:
    """Another payer, order, job or secret gives another commitment."""
    secret, other = bytes(16), Hash(b"\1" * 32)
    values = {
        commit(secret, PAYER.address, ORDER.digest, TERMS.job),
        commit(b"\1" * 16, PAYER.address, ORDER.digest, TERMS.job),
        commit(secret, PROVIDER.address, ORDER.digest, TERMS.job),
        commit(secret, PAYER.address, other, TERMS.job),
        commit(secret, PAYER.address, ORDER.digest, JobId(b"\1" * 16)),
    }
    assert len(values) == 5


def test_a_draw_depends_on_job_and_attempt_alone() -> None:
    """Draws are spread over 0 to 1, and are the same for everybody."""
    draws = {draw_of(JobId(number.to_bytes(16, "big")), attempt) for number in range(50) for attempt in range(2)}
    assert len(draws) == 100
    assert all(0 <= draw < 1 for draw in draws)
    assert 0.3 < sum(draws) / 100 < 0.7
    assert draw_of(JobId(bytes(16)), 0) == 0.35266439938855854


@given(st.binary(max_size=300))
def test_bytes_that_are_no_leaf_are_refused(data: bytes) -> None:
    """Arbitrary bytes are a leaf that encodes to the same bytes, or BadMessage."""
    try:
        leaf = load_leaf(data)
    except BadMessage:
        return
    assert leaf.dumps() == data


@given(st.integers(0, len(MATCH.dumps()) - 1), st.integers(1, 255))
def test_a_changed_byte_never_passes_unseen(place: int, flip: int) -> None:
    """A match with any byte changed is refused, fails its check, or has another leaf hash or index."""
    data = bytearray(MATCH.dumps())
    data[place] ^= flip
    try:
        match = Match.loads(bytes(data))
        check(match)
    except BadMessage:
        return
    assert (match.index, match.leaf_hash) != (MATCH.index, MATCH.leaf_hash)


def test_facts_beyond_their_fields_count_as_the_largest_value() -> None:
    """A time, a count or a speed that does not fit changes no other fact of the leaf."""
    facts = LEAF.considered[0].facts
    assert facts is not None
    huge: dict[str, Any] = {"valid_from": 1 << 40, "valid_until": 1 << 33, "free": 1 << 17, "slots": 65_536, "queue": 99_999}
    huge |= {"first_token_ms": 1 << 32, "tokens_per_second": 1 << 50}
    fields: dict[str, Any] = {**dict.fromkeys(huge, (1 << 32) - 1), **dict.fromkeys(("free", "slots", "queue"), (1 << 16) - 1)}
    for names in (*((name,) for name in huge), tuple(huge)):
        entry = LEAF.considered[0]._replace(facts=facts._replace(**{name: huge[name] for name in names}))
        read = load_leaf(replace(LEAF, considered=(entry, *LEAF.considered[1:])).dumps())
        assert isinstance(read, MatchLeaf)
        assert read.considered[0].facts == facts._replace(**{name: fields[name] for name in names})


@pytest.mark.parametrize(
    "leaf",
    [
        replace(LEAF, draw=float("nan")),
        replace(LEAF, draw=1.5),
        replace(LEAF, considered=LEAF.considered * 2),
        replace(LEAF, considered=(LEAF.considered[0]._replace(outcome=Verdict.UNPAID),)),
        replace(LEAF, considered=LEAF.considered * 65),
    ],
)
def test_leaves_that_decide_nothing_are_refused(leaf: MatchLeaf) -> None:
    """A leaf has one chosen candidate, at most 64 of them, and numbers that can be compared."""
    with pytest.raises(BadMessage):
        load_leaf(leaf.dumps())


def test_cut_off_bytes_are_refused() -> None:
    """Every beginning of a match is refused."""
    data = MATCH.dumps()
    for size in range(len(data)):
        with pytest.raises(BadMessage):
            Match.loads(data[:size])
