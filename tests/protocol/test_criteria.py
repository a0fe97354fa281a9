"""A client's demand: the predicates that the coordinator and the client share, and its JSON."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tallystick.protocol.criteria import (
    DEFAULT_LIMIT,
    MAX_CANDIDATES,
    SORTS,
    Demand,
    Facts,
    Reason,
    context_refusal,
    is_batch_only,
)
from tallystick.protocol.errors import BadMessage, Code, Refusal
from tallystick.protocol.messages import Spec
from tallystick.protocol.requirements import Requirements
from tallystick.protocol.types import Amount
from tallystick.protocol.weights import Weights
from tests.coordinator.harness import MODEL, START, make_ask, person
from tests.protocol.strategies import addresses

ANN, BOB, PAYER = (person(name).address for name in ("ann", "bob", "payer"))
ASK = make_ask(person("ann")).message


@pytest.mark.parametrize(
    ("reason", "criteria", "facts"),
    [
        (Reason.MODEL, {"model": "another"}, {}),
        (Reason.NOT_PINNED, {"pin": frozenset({BOB})}, {}),
        (Reason.EXCLUDED, {"exclude": frozenset({ANN})}, {}),
        (Reason.ROUTE, {"route": "/v1/rerank"}, {}),
        (Reason.REGION, {"require": Requirements(region=("eu",))}, {}),
        (Reason.CONTEXT, {"require": Requirements(context_tokens=8_193)}, {}),
        (Reason.TOO_LONG, {"input_tokens": 8_193}, {}),
        (Reason.STAKE, {"min_stake": 8}, {"stake": 7}),
        (Reason.INPUT_PRICE, {"max_input_price": 999_999}, {}),
        (Reason.OUTPUT_PRICE, {"max_output_price": 1_999_999}, {}),
        (Reason.ASK_EXPIRED, {}, {"now": 1 << 40}),
        (Reason.BUSY, {}, {"free": 0}),
        (Reason.REPUTATION, {"min_reputation": 90}, {"reputation": 89.9}),
    ],
)
def test_each_criterion_has_its_reason(reason: Reason, criteria: dict[str, Any], facts: dict[str, Any]) -> None:
    """An ask that misses one criterion is refused for that criterion."""
    demand = replace(Demand(MODEL), **criteria)
    assert demand.objection(ASK, replace(Facts(START), **facts)) is reason


def test_asks_for_batch_jobs_alone() -> None:
    """They are offered to batch jobs, as all others are, and to no interactive one."""
    ask = replace(ASK, spec=Spec(features=("tools", "batch_only")))
    assert is_batch_only(ask)
    assert not is_batch_only(ASK)
    assert Demand(MODEL).objection(ask, Facts(START)) is Reason.BATCH_ONLY
    assert Demand(MODEL, batch=True).objection(ask, Facts(START)) is None
    assert Demand(MODEL, batch=True).objection(ASK, Facts(START)) is None


def test_unknown_facts_exclude_nobody() -> None:
    """If stake, reputation and load are unknown, an ask is accepted."""
    assert Demand(MODEL, min_stake=8, min_reputation=90).objection(ASK, Facts(START)) is None


def test_bounds_are_inclusive() -> None:
    """An ask that meets each criterion exactly is accepted."""
    demand = Demand(MODEL, 1_000_000, 2_000_000, pin=frozenset({ANN}), min_reputation=90, min_stake=8)
    ask = replace(ASK, valid_from=START, valid_until=START + 1)
    assert demand.objection(ask, Facts(START, stake=8, free=1, reputation=90)) is None


def test_a_route_is_served_by_the_asks_that_list_it() -> None:
    """Routes beyond the standard ones are features of an ask."""
    ask = replace(ASK, spec=Spec(features=("/v1/rerank",)))
    assert Demand(MODEL, route="/v1/rerank").objection(ask, Facts(START)) is None


@pytest.mark.parametrize(
    ("features", "reason"),
    [((), None), (("tools",), None), (("vision", "tools"), None), (("tools", "-Vision"), Reason.UNSUPPORTED)],
)
def test_unknown_is_not_no(features: tuple[str, ...], reason: Reason | None) -> None:
    """An ask that does not declare what a request needs may have it; one that declares its absence is left out."""
    ask = replace(ASK, spec=Spec(features=features))
    demand = Demand(MODEL, needs=Requirements(features=("vision", "tools")), essential=("vision",))
    assert demand.objection(ask, Facts(START)) is reason
    assert replace(demand, essential=()).objection(ask, Facts(START)) is None


def test_a_standard_route_whose_absence_is_declared() -> None:
    """Every ask sells the standard routes, except for those that it says it does not serve."""
    ask = replace(ASK, spec=Spec(features=("tools", "-/v1/embeddings")))
    assert Demand(MODEL, route="/v1/embeddings").objection(ask, Facts(START)) is Reason.ROUTE
    assert Demand(MODEL, route="/v1/chat/completions").objection(ask, Facts(START)) is None
    assert Demand(MODEL, route="/v1/embeddings").objection(ASK, Facts(START)) is None


def test_an_unknown_context_refuses_nothing() -> None:
    """A context of 0 tokens is one that the provider does not know; the exact length fits."""
    for context in (0, 100):
        assert Demand(MODEL, input_tokens=100).objection(replace(ASK, context_tokens=context), Facts(START)) is None


def test_the_strict_demand_requires_what_the_request_needs() -> None:
    """Asks that declare everything meet it; a demand without needs has none."""
    assert Demand(MODEL).strict is None
    demand = Demand(
        MODEL, require=Requirements(features=("logprobs",), context_tokens=9), needs=Requirements(features=("tools",))
    )
    strict = demand.strict
    assert strict is not None
    assert strict.require == Requirements(features=("logprobs", "tools"), context_tokens=9)
    assert strict.needs == Requirements()


def test_the_refusal_of_a_long_request_is_openais() -> None:
    """Clients recognise it by its code and words."""
    refusal = context_refusal("m", 8_192, 9_000)
    error = refusal.as_json()["error"]
    assert (refusal.status, error["code"], error["type"]) == (400, "context_length_exceeded", "invalid_request_error")
    assert error["param"] == "messages"
    assert str(error["message"]).startswith("This model's maximum context length is 8192 tokens")
    assert "9000" in str(error["message"])


prices = st.none() | st.integers(0, 10**18)
few_addresses = st.frozensets(addresses, max_size=3)
requirements = st.builds(
    Requirements, region=st.lists(st.text(max_size=4), max_size=2).map(tuple), context_tokens=st.integers(0, 9)
)


@given(
    st.builds(
        Demand,
        st.text(max_size=9),
        prices,
        prices,
        few_addresses,
        few_addresses,
        st.none() | st.just("/v1/rerank"),
        requirements,
        st.integers(0, 100),
        st.integers(0, 10**18),
        st.sampled_from(SORTS),
        limit=st.integers(1, MAX_CANDIDATES),
        needs=requirements,
        essential=st.lists(st.text(max_size=4), max_size=2).map(tuple),
        input_tokens=st.integers(0, 1 << 31),
        batch=st.booleans(),
    )
)
def test_the_coordinator_reads_what_the_client_writes(demand: Demand) -> None:
    """JSON keeps every criterion."""
    assert Demand.from_json(demand.to_json(PAYER)) == demand


def test_a_demand_without_criteria_is_short() -> None:
    """Members without a restriction are left out, and the limit has a default on the wire."""
    assert Demand(MODEL).to_json(PAYER) == {"model": MODEL, "payer": PAYER, "limit": MAX_CANDIDATES}
    assert Demand.from_json({"model": MODEL, "payer": PAYER}) == Demand(MODEL, limit=DEFAULT_LIMIT)


def test_preferences_stay_with_the_client() -> None:
    """The client applies the order of preferred providers itself."""
    demand = Demand(MODEL, prefer=(BOB,))
    assert demand.ranked
    assert demand.to_json(PAYER) == Demand(MODEL).to_json(PAYER)
    assert not Demand(MODEL, sort="latency").ranked
    assert not Demand(MODEL).ranked


def test_every_criterion_is_on_the_wire() -> None:
    """JSON contains every field except the preferences and the payer, whom the coordinator looks up."""
    values: dict[str, Any] = {
        "max_input_price": 1,
        "max_output_price": 1,
        "pin": frozenset({ANN}),
        "exclude": frozenset({ANN}),
        "route": "/v1/rerank",
        "require": Requirements(region=("eu",)),
        "min_reputation": 1,
        "min_stake": 1,
        "sort": "latency",
        "needs": Requirements(features=("tools",)),
        "essential": ("tools",),
        "input_tokens": 1,
        "likely_tokens": 1,
        "max_output": 1,
        "weights": Weights(Amount(1), Amount(2), Amount(3)),
        "concurrent": 1,
        "min_integrity": 1,
        "batch": True,
    }
    assert values.keys() == {field.name for field in fields(Demand)} - {"model", "limit", "prefer", "payer"}
    whole = replace(Demand(MODEL), **values)
    assert Demand.from_json(whole.to_json(PAYER)) == whole


@pytest.mark.parametrize(("member", "value"), [("limit", 0), ("limit", MAX_CANDIDATES + 1), ("sort", "beauty")])
def test_a_demand_that_makes_no_sense(member: str, value: Any) -> None:
    """The error names the invalid member."""
    with pytest.raises(BadMessage, match=member):
        Demand.from_json({"model": MODEL, member: value})


def test_a_route_that_cannot_exist() -> None:
    """An impossible route is refused as unknown."""
    with pytest.raises(Refusal) as caught:
        Demand.from_json({"model": MODEL, "route": "rerank"})
    assert caught.value.code is Code.UNKNOWN_ROUTE
