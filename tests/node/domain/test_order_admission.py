from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from node.domain.admission_rules import AdmissionRules
from node.domain.order_admission import check_request
from tallystick.protocol.errors import BadSignature, Code, Fault, Refusal, Unavailable
from tallystick.protocol.plaintext_heads import join_request
from tallystick.protocol.sealing import commit_request
from tallystick.protocol.types import Amount, Hash, JobId
from tests.node.harness import CHAT, DOMAIN, LINK, NOW, OFFER, PROVIDER, Client, admission, make_asks, signer

BOOK = make_asks()
ASK = BOOK.current[0]


def refusal(**changes: Any) -> Code:
    """Returns the error code for an order with these changes."""
    placed = Client().order(ASK, **changes)
    with pytest.raises((Refusal, Unavailable)) as caught:
        admission(BOOK).verify(LINK, placed.job, placed.dispatch, NOW)
    return caught.value.code


def test_a_valid_order_is_admitted() -> None:
    """An order that the payer signed, the coordinator matched and this node offered is admitted."""
    placed = Client().order(ASK)
    made = admission(BOOK).verify(LINK, placed.job, placed.dispatch, NOW)
    assert (made.order, made.terms, made.offer, made.payer, made.max_cost) == (
        placed.order,
        placed.terms,
        OFFER,
        placed.order.message.payer,
        placed.terms.max_cost,
    )


@pytest.mark.parametrize(
    ("changes", "code"),
    [
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
def test_each_violation_has_its_code(changes: dict[str, Any], code: Code) -> None:
    """An order that does not fit this node, link, ask or time is refused with the matching code."""
    assert refusal(**changes) is code


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
    """The whole output limit, the first and last deadline, the shortest claim window and the whole fee are allowed."""
    placed = Client().order(ASK, **limit)
    assert admission(BOOK).verify(LINK, placed.job, placed.dispatch, NOW).order == placed.order


def test_a_late_order_names_the_delay() -> None:
    """The refusal states the difference in seconds, which reveals wrong clocks."""
    placed = Client().order(ASK, order_with={"deadline": NOW - 5})
    with pytest.raises(Refusal, match="passed 5 s ago"):
        admission(BOOK).verify(LINK, placed.job, placed.dispatch, NOW)


@pytest.mark.parametrize(
    ("order", "text"),
    [
        ({"deadline": NOW + 86_401}, "order.deadline: expected at most 86400 s ahead of this node's clock, got 86401 s"),
        ({"claim_by": NOW + 1_799}, "order.claimBy: expected at least 1800 s from now, got 1799 s"),
    ],
)
def test_a_wrong_time_is_named(order: dict[str, int], text: str) -> None:
    """The refusal names the member, its limit, and how far the order is from now."""
    placed = Client().order(ASK, order_with=order)
    with pytest.raises(Refusal) as caught:
        admission(BOOK).verify(LINK, placed.job, placed.dispatch, NOW)
    assert str(caught.value) == text


def test_a_providers_own_order_is_refused() -> None:
    """An order signed by the provider's own key is refused, since the contract settles no such tab."""
    placed = Client(PROVIDER).order(ASK)
    with pytest.raises(Refusal, match="other than the provider's"):
        admission(BOOK).verify(LINK, placed.job, placed.dispatch, NOW)


def test_signatures_must_match_their_signers() -> None:
    """An order with another account's signature is refused."""
    placed, other = Client().order(ASK), Client(signer("other payer")).order(ASK)
    candidate = placed.dispatch.candidate
    forged = replace(candidate, order=replace(candidate.order, signature=other.dispatch.candidate.order.signature))
    with pytest.raises(BadSignature):
        admission(BOOK).verify(LINK, placed.job, replace(placed.dispatch, candidate=forged), NOW)


def test_a_match_must_be_of_this_order() -> None:
    """A leaf that commits to another payer's order is refused, and so is one whose secret does not open its commitment."""
    placed, other = Client().order(ASK), Client(signer("other payer")).order(ASK)
    match = placed.dispatch.match
    for forged in (other.dispatch.match, replace(match, secret=b"\1" * 16), replace(match, order_hash=Hash(bytes(32)))):
        with pytest.raises(Refusal) as caught:
            admission(BOOK).verify(LINK, placed.job, replace(placed.dispatch, match=forged), NOW)
        assert (caught.value.code, caught.value.fault) == (Code.ORDER_MISDIRECTED, Fault.COORDINATOR)


def test_an_order_runs_once() -> None:
    """An order that was seen before is refused, and so is another order under the id of a running job."""
    client = Client()
    placed = client.order(ASK)
    again = client.order(ASK, job=placed.job)
    for dispatch in (placed.dispatch, again.dispatch):
        with pytest.raises(Refusal) as caught:
            admission(BOOK, placed).verify(LINK, placed.job, dispatch, NOW)
        assert caught.value.code is Code.ORDER_REPLAYED


def test_a_replaced_ask_is_valid_until_it_expires() -> None:
    """Orders that name the former ask of a model are accepted until that ask expires."""
    asks = make_asks()
    former = asks.current[0]
    later = NOW + 2_000
    assert asks.publish([OFFER], later)
    assert asks.current[0].digest != former.digest
    placed = Client().order(former, now=later)
    admission(asks).verify(LINK, placed.job, placed.dispatch, later)
    expired = Client().order(former, now=NOW + 3_600)
    with pytest.raises(Unavailable):
        admission(asks).verify(LINK, expired.job, expired.dispatch, NOW + 3_600)


def test_a_provider_may_refuse_any_fee() -> None:
    """A provider that accepts no fee refuses an order that allows one."""
    placed = Client().order(ASK)
    with pytest.raises(Refusal, match="maxFeeBps"):
        admission(BOOK, rules=AdmissionRules(max_fee_bps=0)).verify(LINK, placed.job, placed.dispatch, NOW)


def test_a_request_must_match_its_commitment() -> None:
    """A plaintext other than the committed one is refused."""
    placed = Client().order(ASK)
    plain = join_request(CHAT, placed.body)
    check_request(placed.terms, placed.key.commitment_key, plain, placed.body)
    with pytest.raises(Refusal, match="requestCommitment"):
        check_request(placed.terms, placed.key.commitment_key, plain + b" ", placed.body)


@given(size=st.integers(0, 10_000), output=st.integers(0, 1_024), shortfall=st.integers(1, 100))
@settings(deadline=None, max_examples=30)
def test_a_maximum_cost_below_the_worst_case_is_refused(size: int, output: int, shortfall: int) -> None:
    """A job whose maximum cost cannot pay for its bytes and ordered output is refused; one that exactly can is accepted."""
    body = b"x" * size
    placed = Client().order(ASK, body, output=output)
    plain = join_request(CHAT, body)
    check_request(placed.terms, placed.key.commitment_key, plain, body)
    less = replace(placed.terms, max_cost=Amount(max(0, placed.terms.max_cost - shortfall)))
    assert less.request_commitment == commit_request(placed.key.commitment_key, placed.job, plain)
    with pytest.raises(Refusal) as caught:
        check_request(less, placed.key.commitment_key, plain, body)
    assert caught.value.code is Code.COST_ABOVE_CAP


def test_an_order_of_another_deployment_is_refused() -> None:
    """An order signed for another deployment does not verify here."""
    placed = Client().order(ASK)
    other_link = replace(LINK, domain=replace(DOMAIN, chain_id=1))
    with pytest.raises(BadSignature):
        admission(BOOK).verify(other_link, placed.job, placed.dispatch, NOW)
