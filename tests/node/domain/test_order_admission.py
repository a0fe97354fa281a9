from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from node.domain.order_admission import AdmissionRules, check_request
from tallystick.protocol.errors import BadSignature, Code, Refusal, Unavailable
from tallystick.protocol.sealing import commit_request
from tallystick.protocol.types import Amount, Hash, JobId
from tallystick.protocol.wire import join_request
from tests.node.harness import CHAT, DOMAIN, HOUSE, NOW, OFFER, PROVIDER, Client, admission, ask_book, signer

BOOK = ask_book()
ASK = BOOK.current[0]


def refusal(**spoilt: Any) -> Code:
    """Why an order that is spoilt like this is refused."""
    placed = Client().order(ASK, **spoilt)
    with pytest.raises((Refusal, Unavailable)) as caught:
        admission(BOOK).verify(HOUSE, placed.job, placed.dispatch, NOW)
    return caught.value.code


def test_an_honest_order_is_admitted() -> None:
    """What the payer signed, the coordinator matched and this node offered comes out as one admitted job."""
    placed = Client().order(ASK)
    made = admission(BOOK).verify(HOUSE, placed.job, placed.dispatch, NOW)
    assert (made.order, made.terms, made.offer, made.payer, made.max_cost) == (
        placed.order,
        placed.terms,
        OFFER,
        placed.order.message.payer,
        placed.terms.max_cost,
    )


@pytest.mark.parametrize(
    ("spoilt", "code"),
    [
        ({"matched_by": signer("another coordinator")}, Code.ORDER_MISDIRECTED),
        ({"match_with": {"job": JobId(bytes(16))}}, Code.ORDER_MISDIRECTED),
        ({"match_with": {"provider": signer("another").address}}, Code.ORDER_MISDIRECTED),
        ({"match_with": {"order_hash": Hash(bytes(32))}}, Code.ORDER_MISDIRECTED),
        ({"order_with": {"provider": signer("another").address}}, Code.ORDER_MISDIRECTED),
        (
            {"order_with": {"provider": signer("another").address}, "match_with": {"provider": PROVIDER.address}},
            Code.ORDER_MISDIRECTED,
        ),
        ({"coordinator": signer("another coordinator")}, Code.ORDER_MISDIRECTED),
        ({"order_with": {"coordinator": signer("another coordinator").address}}, Code.ORDER_MISDIRECTED),
        ({"order_with": {"terms_hash": Hash(bytes(32))}}, Code.ORDER_TERMS),
        ({"terms_with": {"job": JobId(bytes(16))}}, Code.ORDER_TERMS),
        ({"terms_with": {"ask": Hash(bytes(32))}}, Code.ORDER_TERMS),
        ({"terms_with": {"model": "another"}}, Code.UNKNOWN_MODEL),
        ({"terms_with": {"input_price": 99_999}}, Code.ORDER_TERMS),
        ({"terms_with": {"cached_input_price": 0}}, Code.ORDER_TERMS),
        ({"terms_with": {"output_price": 400_001}}, Code.ORDER_TERMS),
        ({"terms_with": {"max_output_tokens": 1_025}}, Code.ORDER_TERMS),
        ({"order_with": {"deadline": NOW}}, Code.ORDER_EXPIRED),
        ({"order_with": {"deadline": NOW + 86_401}}, Code.ORDER_TERMS),
        ({"order_with": {"deadline": (1 << 64) - 1}}, Code.ORDER_TERMS),
        ({"order_with": {"claim_by": NOW + 1_799}}, Code.ORDER_TERMS),
        ({"order_with": {"max_fee_bps": 1_001}}, Code.ORDER_TERMS),
    ],
)
def test_each_spoilt_part_has_its_refusal(spoilt: dict[str, Any], code: Code) -> None:
    """Whatever does not fit this node, this link, this ask or this hour is refused, with the reason."""
    assert refusal(**spoilt) is code


@pytest.mark.parametrize(
    "limit",
    [
        {"terms_with": {"max_output_tokens": 1_024}},
        {"order_with": {"deadline": NOW + 1}},
        {"order_with": {"deadline": NOW + 86_400}},
        {"order_with": {"claim_by": NOW + 1_800}},
        {"order_with": {"max_fee_bps": 1_000}},
    ],
)
def test_the_limits_themselves_are_allowed(limit: dict[str, Any]) -> None:
    """All the output that the ask sells, the first and the last deadline, the shortest time to claim and the whole fee."""
    placed = Client().order(ASK, **limit)
    assert admission(BOOK).verify(HOUSE, placed.job, placed.dispatch, NOW).order == placed.order


def test_an_order_that_came_too_late_says_by_how_much() -> None:
    """Clocks differ: the refusal names the seconds, so that its reader can tell whose clock is wrong."""
    placed = Client().order(ASK, order_with={"deadline": NOW - 5})
    with pytest.raises(Refusal, match="passed 5 s ago"):
        admission(BOOK).verify(HOUSE, placed.job, placed.dispatch, NOW)


def test_a_provider_does_not_work_for_itself() -> None:
    """An order by the provider's own key is refused, since the contract pays no such tab."""
    placed = Client(PROVIDER).order(ASK)
    with pytest.raises(Refusal, match="other than the provider's"):
        admission(BOOK).verify(HOUSE, placed.job, placed.dispatch, NOW)


def test_signatures_must_be_of_who_they_name() -> None:
    """A match or an order whose signature is another's is refused as such."""
    placed, other = Client().order(ASK), Client(signer("other payer")).order(ASK)
    forged_match = replace(placed.dispatch, match=replace(placed.dispatch.match, signature=other.dispatch.match.signature))
    candidate = placed.dispatch.candidate
    forged = replace(candidate, order=replace(candidate.order, signature=other.dispatch.candidate.order.signature))
    for dispatch in (forged_match, replace(placed.dispatch, candidate=forged)):
        with pytest.raises(BadSignature):
            admission(BOOK).verify(HOUSE, placed.job, dispatch, NOW)


def test_an_order_runs_once() -> None:
    """An order that was seen before is refused, and so is another one under a job id that is running."""
    client = Client()
    placed = client.order(ASK)
    again = client.order(ASK, job=placed.job)
    for dispatch in (placed.dispatch, again.dispatch):
        with pytest.raises(Refusal) as caught:
            admission(BOOK, placed).verify(HOUSE, placed.job, dispatch, NOW)
        assert caught.value.code is Code.ORDER_REPLAYED


def test_an_ask_that_was_replaced_is_good_until_it_expires() -> None:
    """Orders on the former ask of a model are taken after its renewal, but not after its expiry."""
    book = ask_book()
    former = book.current[0]
    later = NOW + 2_000
    assert book.publish([OFFER], later)
    assert book.current[0].digest != former.digest
    placed = Client().order(former, now=later)
    admission(book).verify(HOUSE, placed.job, placed.dispatch, later)
    expired = Client().order(former, now=NOW + 3_600)
    with pytest.raises(Unavailable):
        admission(book).verify(HOUSE, expired.job, expired.dispatch, NOW + 3_600)


def test_rules_are_the_providers() -> None:
    """A provider that bears no fee refuses an order that allows one."""
    placed = Client().order(ASK)
    with pytest.raises(Refusal, match="maxFeeBps"):
        admission(BOOK, rules=AdmissionRules(max_fee_bps=0)).verify(HOUSE, placed.job, placed.dispatch, NOW)


def test_a_request_is_the_one_that_was_committed_to() -> None:
    """A plaintext other than the committed one is refused."""
    placed = Client().order(ASK)
    plain = join_request(CHAT, placed.body)
    check_request(placed.terms, placed.key.commitment_key, plain, placed.body)
    with pytest.raises(Refusal, match="requestCommitment"):
        check_request(placed.terms, placed.key.commitment_key, plain + b" ", placed.body)


@given(size=st.integers(0, 10_000), output=st.integers(0, 1_024), shortfall=st.integers(1, 100))
@settings(deadline=None, max_examples=30)
def test_a_cap_below_the_worst_case_is_refused(size: int, output: int, shortfall: int) -> None:
    """A job whose cap can't pay for its bytes and its ordered output is refused; one that can exactly is taken."""
    body = b"x" * size
    placed = Client().order(ASK, body, output=output)
    plain = join_request(CHAT, body)
    check_request(placed.terms, placed.key.commitment_key, plain, body)
    less = replace(placed.terms, max_cost=Amount(max(0, placed.terms.max_cost - shortfall)))
    assert less.request_commitment == commit_request(placed.key.commitment_key, placed.job, plain)
    with pytest.raises(Refusal) as caught:
        check_request(less, placed.key.commitment_key, plain, body)
    assert caught.value.code is Code.COST_ABOVE_CAP


def test_another_chain_is_another_market() -> None:
    """An order signed for another deployment does not verify here."""
    placed = Client().order(ASK)
    house = replace(HOUSE, domain=replace(DOMAIN, chain_id=1))
    with pytest.raises(BadSignature):
        admission(BOOK).verify(house, placed.job, placed.dispatch, NOW)
