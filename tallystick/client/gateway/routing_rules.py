"""Rules by which an alias asks a small model first, and a larger one where that does not do. Pure, but for loading one by name.

A rule is any object with the two methods of `RoutingRule`; the config names the built-in "small-model-first", or one of yours as
"package.module:name".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pkgutil import resolve_name
from typing import Any, Protocol

from tallystick.protocol.errors import BadMessage
from tallystick.protocol.wire import loads

SIMPLE_CHARACTERS = 4_000
SIMPLE_MESSAGES = 6
SIMPLE_OUTPUT = 1_024


class RoutingRule(Protocol):
    """What an alias's models are asked by. `request` and `answer` are OpenAI's JSON; neither may be changed."""

    def order(self, request: Mapping[str, Any], models: Sequence[str]) -> Sequence[str]:
        """Which of the models to ask, first to last. `models` are the alias's, the smallest first."""
        ...

    def good(self, request: Mapping[str, Any], answer: Any) -> bool:
        """Whether this answer will do. If not, the next model is asked, and both answers are paid for."""
        ...


class SmallModelFirst:
    """The built-in rule.

    A completion is simple where it is text of at most SIMPLE_CHARACTERS in at most SIMPLE_MESSAGES, wants at most SIMPLE_OUTPUT
    tokens, and names no tools, no JSON schema and no reasoning effort. Simple ones go to the smallest model first; others to
    the largest, with the smaller ones, from large to small, for when that cannot be had, and whatever it answers will do. What is
    no completion goes to the models as they are listed, and its answers are not judged.

    An answer will not do where it is empty, was cut off at its length though the request set none, was filtered or refused, or
    is not the JSON that was asked for.
    """

    def order(self, request: Mapping[str, Any], models: Sequence[str]) -> Sequence[str]:
        """See RoutingRule."""
        return tuple(models) if is_simple(request) or not _is_completion(request) else tuple(reversed(models))

    def good(self, request: Mapping[str, Any], answer: Any) -> bool:
        """See RoutingRule."""
        if not is_simple(request):
            return True
        choices = answer.get("choices") if isinstance(answer, Mapping) else None
        return isinstance(choices, list) and bool(choices) and all(_will_do(request, choice) for choice in choices)


def _is_completion(request: Mapping[str, Any]) -> bool:
    return "messages" in request or "prompt" in request


def is_simple(request: Mapping[str, Any]) -> bool:
    """See SmallModelFirst."""
    if not _is_completion(request):
        return False
    messages = request.get("messages", [{"content": request.get("prompt")}])
    if any(request.get(name) for name in ("tools", "functions", "reasoning_effort", "reasoning", "logprobs")):
        return False
    wanted = request.get("response_format")
    if isinstance(wanted, Mapping) and wanted.get("type") == "json_schema":
        return False
    limit = request.get("max_completion_tokens", request.get("max_tokens"))
    if isinstance(limit, int) and limit > SIMPLE_OUTPUT:
        return False
    if not isinstance(messages, list) or len(messages) > SIMPLE_MESSAGES:
        return False
    texts = [message.get("content") if isinstance(message, Mapping) else None for message in messages]
    return all(isinstance(text, str) for text in texts) and sum(map(len, filter(None, texts))) <= SIMPLE_CHARACTERS


def _will_do(request: Mapping[str, Any], choice: Any) -> bool:
    if not isinstance(choice, Mapping):
        return False
    message = choice.get("message")
    said = message if isinstance(message, Mapping) else {"content": choice.get("text")}
    text, ending = said.get("content"), choice.get("finish_reason")
    limited = request.get("max_completion_tokens", request.get("max_tokens")) is not None
    if ending == "content_filter" or said.get("refusal") or (ending == "length" and not limited):
        return False
    if said.get("tool_calls"):
        return True
    return isinstance(text, str) and bool(text.strip()) and (not _wants_json(request) or _is_json(text))


def _wants_json(request: Mapping[str, Any]) -> bool:
    wanted = request.get("response_format")
    return isinstance(wanted, Mapping) and wanted.get("type") in ("json_object", "json_schema")


def _is_json(text: str) -> bool:
    try:
        loads(text, "answer")
    except BadMessage:
        return False
    return True


def load_rule(name: str) -> RoutingRule:
    """A rule by the name that the config gives. Raises BadMessage."""
    if name == "small-model-first":
        return SmallModelFirst()
    try:
        found = resolve_name(name)
        rule = found() if isinstance(found, type) else found
    except Exception as error:  # whatever somebody's module raises  # noqa: BLE001
        known = 'known is "small-model-first"; your own is "package.module:name"'
        raise BadMessage(f"config: aliases: rule {name!r}: {type(error).__name__}: {error}; {known}") from None
    if not (callable(getattr(rule, "order", None)) and callable(getattr(rule, "good", None))):
        raise BadMessage(f"config: aliases: rule {name!r}: expected an object with the methods order and good")
    return rule  # type: ignore[no-any-return]  # its methods were looked at
