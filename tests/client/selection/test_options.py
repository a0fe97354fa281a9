"""Choice of providers: the options of a request, and the reason why an ask is suitable or not."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any, cast

import pytest

from tallystick.client.config import ApiKey, ClientConfig
from tallystick.client.openai.requests import summarise
from tallystick.client.selection import options
from tallystick.client.selection.options import (
    HEADER,
    Demands,
    GatewayOptions,
    ProviderCriteria,
    demand_for,
    demand_of,
    explain_asks,
    read_options,
)
from tallystick.protocol.criteria import Demand
from tallystick.protocol.errors import BadMessage, Fault, Refusal, TallyError
from tallystick.protocol.messages import Spec
from tallystick.protocol.requirements import Requirements
from tallystick.protocol.types import Amount
from tallystick.protocol.weights import Weights
from tests.coordinator.harness import MODEL, START, make_ask, person, unchecked

ANN, BOB = person("ann").address, person("bob").address


def test_a_request_narrows_the_config() -> None:
    """Order and preferences come from the request if it names them; exclusions add up; limits are never relaxed."""
    config = ClientConfig(
        max_input_price=Amount(5),
        require=Requirements(region=("eu",)),
        min_reputation=50,
        sort="latency",
        prefer=(ANN,),
        exclude=(ANN,),
    )
    plain = demand_of(config, "m", "/v1/rerank", {})
    assert (plain.max_input_price, plain.min_reputation, plain.sort, plain.prefer) == (5, 50, "latency", (ANN,))
    assert (plain.require, plain.exclude, plain.route, plain.ranked) == (config.require, frozenset({ANN}), "/v1/rerank", True)
    wants = ProviderCriteria(
        max_input_price=9,
        max_output_price=9,
        exclude=[BOB],
        require=Requirements(features=("tools",)),
        min_reputation=10,
        sort="price",
        prefer=(),
    )
    narrowed = demand_of(config, "m", "/v1/chat/completions", wants)
    assert (narrowed.max_input_price, narrowed.max_output_price) == (5, 9), "a request pays no more than the config allows"
    assert (narrowed.min_reputation, narrowed.exclude) == (50, frozenset({ANN, BOB}))
    assert narrowed.require == Requirements(region=("eu",), features=("tools",))
    assert (narrowed.route, narrowed.ranked) == ("/v1/chat/completions", False)
    with pytest.raises(Refusal, match="expected one of eu, got us"):
        demand_of(config, "m", "/v1/chat/completions", {"require": Requirements(region=("us",))})
    with pytest.raises(BadMessage, match="sort"):
        demand_of(config, "m", "/v1/chat/completions", {"sort": "beauty"})


def test_the_header() -> None:
    """Dollars are text, a single name is a list of one, and every option is optional."""
    assert read_options(None) == ({}, GatewayOptions())
    options, extras = read_options(
        '{"max_cost": "0.5", "max_output_price": "2", "pin": "0xaa", "prefer": ["0xbb"], "sort": "latency",'
        ' "require": {"region": "eu"}, "min_reputation": 90, "min_stake": "2", "label": "research",'
        ' "fallbacks": "other", "cache": true}'
    )
    assert extras == GatewayOptions(("other",), cache=True)
    assert options == {
        "max_cost": 500_000,
        "label": "research",
        "max_output_price": 2_000_000,
        "pin": ("0xaa",),
        "prefer": ("0xbb",),
        "sort": "latency",
        "require": Requirements(region=("eu",)),
        "min_reputation": 90,
        "min_stake": 2_000_000,
    }


@pytest.mark.parametrize(
    ("header", "says"),
    [
        ("{", "not JSON"),
        ("[]", "expected a JSON object"),
        ('{"maxcost": "1"}', "unknown options: maxcost; known options: max_cost"),
        ('{"max_cost": 1}', "expected dollars as text"),
        ('{"max_cost": "a lot"}', "expected a decimal number with at most 6 places"),
        ('{"pin": 5}', "pin: expected a list"),
        ('{"require": {"mood": []}}', r"require: unknown members"),
        ('{"min_reputation": 101}', "min_reputation"),
        ('{"cache": "yes"}', "cache: expected true or false"),
    ],
)
def test_invalid_headers(header: str, says: str) -> None:
    """The error names the invalid member."""
    with pytest.raises(BadMessage, match=says) as caught:
        read_options(header)
    assert HEADER in str(caught.value)


def test_why_each_ask_will_do_or_not() -> None:
    """The reasons are the coordinator's and this client's own; suitable asks come first."""
    demand = demand_of(ClientConfig(), MODEL, "/v1/chat/completions", {"require": Requirements(region=("eu",))})
    asks = [make_ask(person(name), spec=Spec(region=region)) for name, region in (("ann", "us"), ("bob", "eu"), ("cid", "eu"))]
    listed: list[dict[str, Any]] = [{"ask": unchecked(ask).to_json(), "free": 1, "reputation": 99} for ask in asks]
    listed[1]["why"] = "no free slot now"
    explanations = explain_asks(listed, demand, {person("dan").address: "a dishonest receipt"}, START)
    assert [(entry.ask.provider, entry.reason) for entry in explanations] == [
        (person("cid").address, ""),
        (ANN, "it is not in a region asked for"),
        (BOB, "no free slot now"),
    ]
    assert [entry.reason for entry in explain_asks(listed[2:], demand, {person("cid").address: "dishonest"}, START)] == [
        "dishonest"
    ]
    with pytest.raises(BadMessage) as caught:
        explain_asks([{"ask": {}}], demand, {}, START)
    assert caught.value.fault is Fault.COORDINATOR


def test_weights_are_dollars() -> None:
    """Weights come from the request if it names them, else from the config; they are dollars as text in a header."""
    options, _ = read_options('{"weights": {"first_token": "0.001", "loss": "0.5"}, "sort": "speed"}')
    assert options == {"weights": Weights(Amount(1_000), Amount(0), Amount(500_000)), "sort": "speed"}
    config = ClientConfig(weights=Weights(speed=Amount(7)))
    assert demand_of(config, "m", "/v1/chat/completions", {}).weights == Weights(speed=Amount(7))
    demand = demand_of(config, "m", "/v1/chat/completions", cast("ProviderCriteria", options))
    assert (demand.weights, demand.sort) == (options["weights"], "throughput")
    assert Demand.from_json(demand.to_json(ANN)) == replace(demand, limit=Demand("m").limit)
    spelled: Any = {"weights": {"speed": "0.25"}}
    assert demand_of(config, "m", "/v1/chat/completions", spelled).weights == Weights(speed=Amount(250_000))


@pytest.mark.parametrize(
    ("weights", "text"),
    [
        ({"first_token": 0.001}, "weights.first_token: expected dollars as text"),
        ({"first_token": "-1"}, "weights.first_token: expected a decimal number"),
        ({"speed": "1e9"}, "weights.speed: expected a decimal number"),
        ({"speed": "1000001"}, "weights.speed: expected 0 to 1000000 dollars, got 1000001"),
        ({"price": "1"}, "unknown weights: price; known weights: first_token, speed, loss"),
        ("0.1", "weights: expected a JSON object"),
        (["0.1"], "weights: expected a JSON object"),
    ],
)
def test_a_wrong_weight_is_named(weights: Any, text: str) -> None:
    """An error says which weight is wrong and what was expected."""
    with pytest.raises(BadMessage) as caught:
        read_options(json.dumps({"weights": weights}))
    assert text in str(caught.value)


def test_the_size_of_a_request_is_told_in_powers_of_two() -> None:
    """A coordinator learns the likely input and the most output of a request, each as the next power of two."""
    words = {"model": "m", "messages": [{"role": "user", "content": "word " * 1_000}], "max_tokens": 9}
    demand = demand_for(Demand("m"), summarise("/v1/chat/completions", json.dumps(words).encode()))
    assert (demand.likely_tokens, demand.max_output) == (2_048, 16)
    del words["max_tokens"]
    assert demand_for(Demand("m"), summarise("/v1/chat/completions", json.dumps(words).encode())).max_output is None


def test_the_terms_of_a_score_are_decimal_text() -> None:
    """An explanation has the coordinator's terms; an entry with anything else in their place is malformed."""
    entry = {"ask": make_ask(person("ann")).to_json(), "score": {"price": "0.5", "total": "0.75", "other": 1}, "measured": True}
    (explained,) = explain_asks([entry | {"expected": {"inputTokens": 8, "outputTokens": 4}}], Demand(MODEL), {}, START)
    assert (explained.score, explained.expected, explained.measured) == ({"price": "0.5", "total": "0.75"}, (8, 4), True)
    bad: tuple[Any, ...] = ({"price": 1}, {"price": "1e9"}, {"price": "9" * 80}, {"price": "\u001b[0m"}, [])
    for odd in bad:
        with pytest.raises(BadMessage):
            explain_asks([entry | {"score": odd}], Demand(MODEL), {}, START)


NUMBERS: tuple[Any, ...] = (-1, 1 << 64, 10**400, 1e308, 1.5, True)
TEXTS: tuple[Any, ...] = ("9" * 5_000, "\u0663", "-1", "", "x" * 70_000)
ODD = (*NUMBERS, *TEXTS, None, [], {}, [[]], [None])


@pytest.mark.parametrize(
    "name", ["max_cost", "max_input_price", "min_stake", "min_reputation", "pin", "require", "sort", "weights", "cache"]
)
def test_odd_options_are_refused_in_words_and_never_crash(name: str) -> None:
    """Any header value is a valid demand, or is refused with the option's name."""
    for odd in ODD:
        try:
            options, _ = read_options(json.dumps({name: odd}))
            choice = {key: value for key, value in options.items() if key != "max_cost"}
            demand_of(ClientConfig(), "m", "/v1/chat/completions", cast("ProviderCriteria", choice)).to_json(ANN)
        except TallyError as error:
            assert name in str(error) or HEADER in str(error), odd  # noqa: PT017 - both ends are right


@pytest.mark.parametrize("header", ["[" * 100_000, '{"require":' * 2_000, "\xff", "null", "7", '{"max_cost": 1', ""])
def test_a_header_that_is_no_options_is_refused(header: str) -> None:
    """A header without valid options, also a too deeply nested one, is refused."""
    with pytest.raises(BadMessage, match=HEADER):
        read_options(header)


def test_one_bad_ask_hides_no_other() -> None:
    """An invalid or oversized text is left out of the explanation."""
    good = unchecked(make_ask(person("ann"))).to_json()
    fat = unchecked(make_ask(person("bob"), spec=Spec(revision="r" * 20_000))).to_json()
    listed: list[dict[str, Any]] = [{"ask": fat}, {"ask": None}, {}, {"ask": good, "free": -1}, {"ask": good, "why": "w" * 9_000}]
    (explanation,) = explain_asks(listed, Demand(MODEL), {}, START)
    assert (explanation.ask.provider, len(explanation.reason)) == (ANN, 500)


def test_kept_demands_equal_those_built_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests without criteria share a demand if they need the same; criteria are never shared; only so many are kept."""
    config = ClientConfig(min_reputation=7)
    demands = Demands(config)
    long = "word " * 5_000
    bodies: list[dict[str, Any]] = [
        {"model": "m", "messages": []},
        {"model": "other", "messages": []},
        {"model": "m", "messages": [{"role": "user", "content": long}]},
        {"model": "m", "messages": [{"role": "user", "content": long}], "truncation": "auto"},
        {"model": "m", "messages": [], "max_tokens": 9},
        {"model": "m", "messages": [], "max_tokens": 9, "n": 2},
        {"model": "m", "messages": [], "tools": [{"type": "function"}]},
        {"model": "m", "messages": [], "tools": [{"type": "function"}], "tool_choice": "required"},
        {"model": "m", "messages": [{"role": "user", "content": long}], "max_tokens": 5_000},
    ]
    built: list[Demand] = []
    for route in ("/v1/chat/completions", "/v1/messages"):
        for body in bodies:
            summary = summarise(route, json.dumps(body).encode())
            expected = demand_for(demand_of(config, summary.model, route, {}), summary)
            assert demands.of(summary, route, {}) == expected
            assert demands.of(summary, route, {}) is demands.of(summary, route, {})
            narrowed = demands.of(summary, route, {"min_reputation": 9})
            assert (narrowed.min_reputation, expected.min_reputation) == (9, 7)
            built.append(expected)
    assert len(set(built)) > len(bodies)
    monkeypatch.setattr(options, "MAX_DEMANDS", 3)
    for number in range(10):
        summary = summarise("/v1/chat/completions", json.dumps({"model": f"m{number}"}).encode())
        demands.of(summary, "/v1/chat/completions", {})
    assert len(demands._kept) <= 3


def test_a_least_integrity_is_narrowed_and_never_relaxed() -> None:
    """In the config, in an API key and in the header alike; only providers of the market can meet it."""
    config = ClientConfig(min_integrity=40)
    for wanted, expected in ((10, 40), (60, 60)):
        narrowed = demand_of(config, "m", "/v1/chat/completions", ProviderCriteria(min_integrity=wanted))
        assert narrowed.min_integrity == expected
    asked, _ = read_options('{"min_integrity": 60}')
    assert asked == {"min_integrity": 60}
    assert options.market_criteria(config, asked) == ("min_integrity",)
    key = ApiKey(label="research", secret="a key of sixteen", min_integrity=90)
    assert options.restrict_to_key(key, asked)["min_integrity"] == 90
    for odd in ('{"min_integrity": 101}', '{"min_integrity": "x"}', '{"min_integrity": 1.5}'):
        with pytest.raises(BadMessage, match="min_integrity"):
            read_options(odd)
    with pytest.raises(BadMessage, match="min_integrity: expected 0 to 100 percent, got 101"):
        ClientConfig(min_integrity=101)


def test_integrity_is_explained_with_its_audits() -> None:
    """A coordinator that tells nonsense is named; one that counts no audits is understood."""
    entry = {"ask": unchecked(make_ask(person("ann"))).to_json()}
    (explained,) = explain_asks([entry | {"integrity": 88.2, "audits": 50}], Demand(MODEL), {}, START)
    assert (explained.integrity, explained.audits) == (88.2, 50)
    (unknown,) = explain_asks([entry], Demand(MODEL), {}, START)
    assert (unknown.integrity, unknown.audits) == (None, 0)
    for odd in ("x", True, -1, 100.5, [1]):
        with pytest.raises(BadMessage, match=r"explain\.integrity"):
            explain_asks([entry | {"integrity": odd}], Demand(MODEL), {}, START)
