"""The rule that sends simple requests to small models, and the answers after which a larger model is tried."""

from __future__ import annotations

from typing import Any

import pytest

from tallystick.client.config import Alias
from tallystick.client.gateway.aliases import AliasRouter
from tallystick.client.gateway.routing_rules import SIMPLE_CHARACTERS, SIMPLE_MESSAGES, SmallModelFirst, is_simple, load_rule
from tallystick.protocol.errors import BadMessage
from tallystick.protocol.wire import dumps, loads

MODELS = ("small", "middle", "large")
RULE = SmallModelFirst()


def _asks(text: Any = "hi", **more: Any) -> dict[str, Any]:
    return {"model": "thrifty", "messages": [{"role": "user", "content": text}]} | more


@pytest.mark.parametrize(
    ("request_", "simple"),
    [
        (_asks(), True),
        (_asks(max_tokens=1_024), True),
        (_asks(max_tokens=1_024.0), True),
        (_asks(max_tokens=-1), True),
        (_asks(max_tokens="x"), True),
        (_asks(max_tokens=1_025.0), False),
        (_asks(max_completion_tokens=-1, max_tokens=1_025), False),
        (_asks("x" * SIMPLE_CHARACTERS), True),
        ({"prompt": "hi"}, True),
        (_asks(response_format={"type": "json_object"}), True),
        (_asks("x" * (SIMPLE_CHARACTERS + 1)), False),
        (_asks(max_tokens=1_025), False),
        (_asks(max_completion_tokens=5_000), False),
        (_asks(tools=[{}]), False),
        (_asks(reasoning_effort="high"), False),
        (_asks(response_format={"type": "json_schema"}), False),
        (_asks([{"type": "image_url"}]), False),
        (_asks(messages=[{"role": "user", "content": "hi"}] * (SIMPLE_MESSAGES + 1)), False),
        (_asks(messages="nonsense"), False),
        ({"prompt": ["a", "b"]}, False),
        ({"input": "what is no completion"}, False),
    ],
)
def test_what_is_simple(request_: dict[str, Any], simple: bool) -> None:
    """Simple requests go to the smallest model first, others to the largest."""
    assert is_simple(request_) is simple
    assert RULE.order(request_, MODELS) == (MODELS if simple or "input" in request_ else MODELS[::-1])


def _says(text: Any = "yes", ending: str = "stop", **more: Any) -> dict[str, Any]:
    return {"choices": [{"message": {"content": text} | more, "finish_reason": ending}]}


def _message(*content: dict[str, Any], ending: str = "end_turn") -> dict[str, Any]:
    return {"type": "message", "content": list(content), "stop_reason": ending}


@pytest.mark.parametrize(
    ("request_", "answer", "good"),
    [
        (_asks(), _says(), True),
        (_asks(), {"choices": [{"text": "yes", "finish_reason": "stop"}]}, True),
        (_asks(), _says(None, tool_calls=[{}]), True),
        (_asks(max_tokens=5), _says(ending="length"), True),
        (_asks(max_tokens=5.0), _says(ending="length"), True),
        (_asks(max_tokens=-1), _says(ending="length"), False),
        (_asks(response_format={"type": "json_object"}), _says('{"a": 1}'), True),
        (_asks(), _says(ending="length"), False),
        (_asks(), _says(ending="content_filter"), False),
        (_asks(), _says(refusal="no"), False),
        (_asks(), _says(" \n"), False),
        (_asks(), _says(None), False),
        (_asks(response_format={"type": "json_object"}), _says("sorry"), False),
        (_asks(), {"choices": []}, False),
        (_asks(), {"choices": [5]}, False),
        (_asks(), [], False),
        (_asks(tools=[{}]), _says(ending="length"), True),
        ({"input": "hi"}, {"object": "response"}, True),
        (_asks(max_tokens=5), _message({"type": "text", "text": "yes"}), True),
        (_asks(max_tokens=5), _message({"type": "text", "text": "yes"}, ending="max_tokens"), True),
        (_asks(max_tokens=5), _message({"type": "thinking", "thinking": "hm"}, {"type": "tool_use"}), True),
        (_asks(max_tokens=5), _message({"type": "thinking", "thinking": "hm"}), False),
        (_asks(max_tokens=5), _message({"type": "text", "text": " "}), False),
        (_asks(max_tokens=5), _message({"type": "text", "text": "no"}, ending="refusal"), False),
        (_asks(max_tokens=5), _message(), False),
        (_asks(max_tokens=5), {"type": "message"}, False),
    ],
)
def test_accepted_answers(request_: dict[str, Any], answer: Any, good: bool) -> None:
    """Empty, cut off, filtered, refused and wrongly formatted answers are not accepted."""
    assert RULE.accepts(request_, answer) is good


class Broken:
    """A rule that raises or returns nonsense."""

    def order(self, _request: Any, models: Any) -> Any:
        """Returns no model, or raises."""
        return [] if len(models) > 1 else 1 / 0

    def accepts(self, _request: Any, answer: Any) -> bool:
        """Raises an error."""
        return bool(answer["no such member"])


def test_a_failing_rule_fails_no_request() -> None:
    """If a rule fails, the models are tried as listed, and every answer is accepted."""
    for models in (MODELS, MODELS[:1]):
        plan = AliasRouter([Alias(name="thrifty", models=models, rule="x")], {"thrifty": Broken()}).plan(dumps(_asks()), (), 0)
        assert [loads(body, "body")["model"] for body in plan.bodies] == list(models)
        assert plan.accepts({})


class ReversedModels:
    """A custom rule."""

    def order(self, _request: Any, models: Any) -> Any:
        """Returns the models in reverse order."""
        return models[::-1]

    def accepts(self, _request: Any, answer: Any) -> bool:
        """Accepts an answer that says that it is acceptable."""
        return bool(answer["good"])


def test_custom_rules() -> None:
    """Custom rules are loaded by name, as a class or an object; anything else is refused when the gateway starts."""
    assert isinstance(load_rule("small-model-first"), SmallModelFirst)
    rule = load_rule(f"{__name__}:ReversedModels") if "." in __name__ else ReversedModels()
    router = AliasRouter([Alias(name="thrifty", models=MODELS, rule="x")], {"thrifty": rule})
    plan = router.plan(dumps(_asks()), ["other"], 0.5)
    assert [loads(body, "body")["model"] for body in plan.bodies] == ["large", "middle", "small", "other"]
    assert [plan.accepts({"good": good}) for good in (True, False)] == [True, False]
    for name, message in (
        ("no.such.module:rule", "ModuleNotFoundError"),
        ("json:nothing", "AttributeError"),
        ("json:dumps", "order"),
    ):
        with pytest.raises(BadMessage, match=message):
            load_rule(name)
    with pytest.raises(BadMessage, match="got both"):
        Alias(name="x", models=MODELS, weights=(1, 1, 1), rule="small-model-first")
