from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tallystick.client.config import Alias
from tallystick.client.gateway.aliases import AliasRouter, may_fall_back, order_models, weight_draw
from tallystick.client.upstream_settings import UpstreamTarget
from tallystick.protocol.errors import BadMessage, Code, Fault, Refusal, TallyError, Unavailable
from tallystick.protocol.wire import dumps, loads

BEST = Alias(name="best", models=("a", "b", "c"), weights=(1, 0, 3))


@given(st.floats(0, 1, exclude_max=True))
def test_every_draw_has_its_order(draw: float) -> None:
    """Each order has all models once: the drawn one first, the others as listed."""
    models = order_models(BEST, draw)
    assert models == (("a", "b", "c") if draw < 0.25 else ("c", "a", "b"))
    assert order_models(Alias(name="plain", models=("x", "y")), draw) == ("x", "y")


def test_shares() -> None:
    """Keys spread over the models by weight, and a key always gets the same model."""
    first = Counter(order_models(BEST, weight_draw(str(key)))[0] for key in range(4_000))
    assert first.keys() == {"a", "c"}
    assert 900 < first["a"] < 1_100
    assert weight_draw("k") == weight_draw("k")


def test_a_request_for_each_model() -> None:
    """Members other than the model stay; nothing is parsed if nothing is configured."""
    names, none = AliasRouter([BEST], {}), AliasRouter([], {})
    bodies = names.plan(b'{"model": "best", "seed": 7}', ["b", "d"], 0.5).bodies
    assert [loads(body, "body") for body in bodies] == [{"model": name, "seed": 7} for name in ("c", "a", "b", "d")]
    assert none.plan(b"not JSON", [], 0.5).bodies == [b"not JSON"]
    assert names.plan(b'{"model":  "other"}', [], 0.5).bodies == [b'{"model":  "other"}']
    with pytest.raises(BadMessage):
        names.plan(b"not JSON", [], 0.5)
    with pytest.raises(BadMessage):
        names.plan(b"[]", [], 0.5)


class _Reverse:
    """A rule that tries the last model first, and one that is not in the alias."""

    def order(self, _request: Mapping[str, Any], models: Sequence[str]) -> Sequence[str]:
        return ("secret", *reversed(models))

    def accepts(self, _request: Mapping[str, Any], _answer: Any) -> bool:
        return True


@pytest.mark.parametrize(
    ("model", "allowed", "tried"),
    [
        ("best", (), "cab"),
        ("best", ("best",), "cab"),
        ("best", ("best", "a"), "cab"),
        ("best", ("a", "b", "x"), "ab"),
        ("best", ("c",), "c"),
        ("best", ("x",), None),
        ("a", ("best",), None),
        ("a", ("a",), "a"),
        ("a", ("a", "best"), "a"),
        ("x", ("a",), None),
        ("x", (), "x"),
        (7, ("a",), None),
        (None, ("a",), None),
    ],
)
def test_what_a_key_may_use(model: object, allowed: tuple[str, ...], tried: str | None) -> None:
    """A key reaches what it names, and by other aliases the models that it names; a refusal lists the usable names."""
    router = AliasRouter([BEST], {})
    body = dumps({"model": model})
    if tried is None:
        with pytest.raises(Refusal, match="may use") as caught:
            router.plan(body, [], 0.5, allowed)
        assert caught.value.code is Code.UNKNOWN_MODEL
        assert all(name in str(caught.value) for name in (*allowed, *router.usable(allowed)))
    else:
        assert [loads(each, "body")["model"] for each in router.plan(body, [], 0.5, allowed).bodies] == list(tried)


def test_fallbacks_may_be_aliases() -> None:
    """An alias among the fallbacks stands for its models, and no model is tried twice."""
    router = AliasRouter([BEST, Alias(name="x", models=("y", "a"))], {})
    for model, fallbacks, tried in (("a", ["x", "best"], "aycb"), ("best", ["x", "z"], "cabyz"), ("q", ["x"], "qya")):
        bodies = router.plan(dumps({"model": model}), fallbacks, 0.5).bodies
        assert [loads(body, "body")["model"] for body in bodies] == list(tried)


def test_a_rule_for_a_limited_key() -> None:
    """A rule orders what the key may reach. It may name models beside the alias's only for callers of the whole alias."""
    router = AliasRouter([Alias(name="best", models=("a", "b", "c"), rule="r")], {"best": _Reverse()})
    for allowed, tried in (((), ["secret", "c", "b", "a"]), (("best",), ["secret", "c", "b", "a"]), (("a", "b"), ["b", "a"])):
        bodies = router.plan(b'{"model": "best"}', [], 0.5, allowed).bodies
        assert [loads(body, "body")["model"] for body in bodies] == tried


def test_a_key_without_aliases() -> None:
    """The models of a key hold without any alias, and for fallbacks."""
    router = AliasRouter([], {})
    assert router.plan(b'{"model":  "a"}', [], 0.5, ("a",)).bodies == [b'{"model":  "a"}']
    assert len(router.plan(b'{"model": "a"}', ["b"], 0.5, ("a", "b")).bodies) == 2
    for model, fallbacks in (("b", []), ("a", ["b"]), ("b", ["a"])):
        with pytest.raises(Refusal):
            router.plan(dumps({"model": model}), fallbacks, 0.5, ("a",))


def test_members_survive_another_models_name() -> None:
    """Lone surrogates and integers of any size reach each model as the caller wrote them."""
    body = rb'{"model":"best","seed":1000000000000000000000007,"prompt":"\ud83d"}'
    plan = AliasRouter([BEST], {}).plan(body, [], 0.5)
    assert plan.bodies[0] == body.replace(b"best", b"c")


@pytest.mark.parametrize(
    ("error", "may"),
    [
        (Refusal(Code.UNKNOWN_MODEL, ""), True),
        (Refusal(Code.PRICE_ABOVE_CAP, ""), True),
        (Refusal(Code.UNKNOWN_ROUTE, ""), True),
        (Unavailable(Code.NODE_BUSY, ""), True),
        (Unavailable(Code.NODE_BUSY, "", fault=Fault.CLIENT), False),
        (Refusal(Code.OVER_BUDGET, ""), False),
        (Refusal(Code.BAD_MESSAGE, ""), False),
        (Unavailable(Code.COORDINATOR_UNAVAILABLE, ""), False),
    ],
)
def test_errors_that_allow_a_fallback(error: TallyError, may: bool) -> None:
    """No fallback follows the client's own faults or errors of jobs that may have been billed."""
    assert may_fall_back(error) is may


@pytest.mark.parametrize("weights", [(1,), (0, 0), (-1, 2)])
def test_impossible_aliases_are_refused(weights: tuple[int, ...]) -> None:
    """Impossible aliases are refused when the config is read."""
    with pytest.raises(BadMessage, match="weights"):
        Alias(name="x", models=("a", "b"), weights=weights)
    with pytest.raises(BadMessage, match="models"):
        Alias(name="x", models=())


UPSTREAM = "upstream://cloud/a"
"""A member that is a model of an upstream."""


def test_upstreams_of_an_alias() -> None:
    """Only the members of an alias are models of upstreams; the request has the member's name."""
    router = AliasRouter([Alias(name="best", models=("a", UPSTREAM))], {})
    plan = router.plan(b'{"model": "best"}', ["b"], 0)
    assert [loads(body, "body")["model"] for body in plan.bodies] == ["a", UPSTREAM, "b"]
    assert plan.upstreams == {plan.bodies[1]: UpstreamTarget("cloud", "a")}
    market = plan.without_upstreams()
    assert (market.bodies, market.upstreams) == ([plan.bodies[0], plan.bodies[2]], {})
    for body, fallbacks, member in (
        (b'{"model": "upstream://cloud/a"}', [], "model"),
        (b'{"model": "a"}', [UPSTREAM], "fallbacks"),
    ):
        with pytest.raises(Refusal, match=f"{member}: {UPSTREAM}"):
            router.plan(body, fallbacks, 0)
    assert router.plan(b'{"model": "a"}', ["best"], 0).upstreams, "a fallback may be an alias"


@pytest.mark.parametrize(
    ("error", "may"),
    [
        (Unavailable(Code.COORDINATOR_UNAVAILABLE, "", fault=Fault.COORDINATOR), True),
        (Refusal(Code.INSUFFICIENT_FUNDS, ""), True),
        (Refusal(Code.UNSECURED, ""), True),
        (Refusal(Code.CONTEXT_LENGTH_EXCEEDED, ""), True),
        (Refusal(Code.NO_PROVIDER, ""), True),
        (Refusal(Code.OVER_BUDGET, ""), False),
        (Refusal(Code.COST_ABOVE_CAP, ""), False),
        (BadMessage(""), False),
    ],
)
def test_what_an_upstream_is_a_fallback_for(error: TallyError, may: bool) -> None:
    """It needs neither the coordinator nor a purse, but budgets and limits hold for it too."""
    assert may_fall_back(error, to_upstream=True) is may
    if error.code in (Code.COORDINATOR_UNAVAILABLE, Code.INSUFFICIENT_FUNDS, Code.UNSECURED):
        assert not may_fall_back(error)


@pytest.mark.parametrize("code", [Code.UPSTREAM_UNAVAILABLE, Code.CONTEXT_LENGTH_EXCEEDED, Code.UNSUPPORTED])
def test_another_model_may_do(code: Code) -> None:
    """Another model may have a longer context or what the request needs, or may not be the upstream's."""
    assert may_fall_back(Refusal(code, ""))


def test_forms() -> None:
    """An alias in a form stands for its models too, except for those of upstreams; all other bytes stay."""
    router = AliasRouter(
        [BEST, Alias(name="far", models=("upstream://hosted/m",)), Alias(name="x", models=("upstream://hosted/m", "y"))], {}
    )
    request = httpx.Request("POST", "http://x", data={"model": "MODEL"}, files={"file": ("a.wav", b"\0model")})
    kind, form = request.headers["content-type"], request.read()
    for model, fallbacks, allowed, tried in (
        ("best", [], (), "cab"),
        ("best", ["x", "q"], (), "cabyq"),
        ("best", [], ("a",), "a"),
        ("z", [], (), "z"),
        ("x", [], ("x",), "y"),
    ):
        plan = router.plan_form(kind, form.replace(b"MODEL", model.encode()), fallbacks, 0.5, allowed)
        assert plan.bodies == [form.replace(b"MODEL", name.encode()) for name in tried]
    for model, allowed in (("far", ()), ("best", ("z",)), ("a", ("best",)), ("upstream://hosted/m", ())):
        with pytest.raises(Refusal) as caught:
            router.plan_form(kind, form.replace(b"MODEL", model.encode()), [], 0.5, allowed)
        assert caught.value.code is Code.UNKNOWN_MODEL
    bare = form.replace(b'name="model"', b'name="other"')
    assert router.plan_form(kind, bare, [], 0.5).bodies == [bare]
