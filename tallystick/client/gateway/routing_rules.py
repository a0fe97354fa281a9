"""Rules by which an alias tries a small model first, and a larger one if its answer is not good enough.

A rule is any object with the two methods of `RoutingRule`. The config names the built-in rule "small-model-first", or one of the
operator's as "package.module:name". Pure, except that such a rule is imported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pkgutil import resolve_name
from typing import Any, Protocol

from tallystick.protocol.errors import BadMessage
from tallystick.protocol.openai_wire import find_output_limit
from tallystick.protocol.routes import CHAT
from tallystick.protocol.wire import loads

SIMPLE_CHARACTERS = 4_000
SIMPLE_MESSAGES = 6
SIMPLE_OUTPUT_TOKENS = 1_024


class RoutingRule(Protocol):
    """Decides which of an alias's models answers. `request` and `answer` are OpenAI's JSON and must not be changed."""

    def order(self, request: Mapping[str, Any], models: Sequence[str]) -> Sequence[str]:
        """The models to try, first to last. `models` are the alias's, the smallest first."""
        ...

    def accepts(self, request: Mapping[str, Any], answer: Any) -> bool:
        """Whether the answer is good enough. If not, the next model is tried, and both answers are paid for."""
        ...


class SmallModelFirst:
    """The built-in rule.

    A completion is simple if it is text of at most SIMPLE_CHARACTERS in at most SIMPLE_MESSAGES, asks for at most
    SIMPLE_OUTPUT_TOKENS, and has no tools, JSON schema or reasoning effort. Simple completions go to the smallest model first.
    Others go to the largest first, then to smaller ones if it is not available, and every answer is accepted. A request that is
    no completion tries the models as they are listed, and every answer is accepted.

    The answer to a simple completion is not accepted if it is empty, filtered, refused, cut off although the request set no
    limit, or not the JSON that was asked for.
    """

    def order(self, request: Mapping[str, Any], models: Sequence[str]) -> Sequence[str]:
        """See RoutingRule."""
        return tuple(models) if is_simple(request) or not _is_completion(request) else tuple(reversed(models))

    def accepts(self, request: Mapping[str, Any], answer: Any) -> bool:
        """See RoutingRule."""
        if not is_simple(request):
            return True
        if isinstance(answer, Mapping) and answer.get("type") == "message":
            return _accepts_message(answer)
        choices = answer.get("choices") if isinstance(answer, Mapping) else None
        return isinstance(choices, list) and bool(choices) and all(_accepts_choice(request, choice) for choice in choices)


def _is_completion(request: Mapping[str, Any]) -> bool:
    return "messages" in request or "prompt" in request


def _output_limit(request: Mapping[str, Any]) -> int | None:
    """The most output tokens of each choice; None if there is no limit, or one that the request will be refused for."""
    try:
        return find_output_limit(CHAT, request)
    except BadMessage:
        return None


def is_simple(request: Mapping[str, Any]) -> bool:
    """Whether a request is a simple completion; see SmallModelFirst."""
    if not _is_completion(request):
        return False
    messages = request.get("messages", [{"content": request.get("prompt")}])
    if any(request.get(name) for name in ("tools", "functions", "reasoning_effort", "reasoning", "logprobs")):
        return False
    response_format = request.get("response_format")
    if isinstance(response_format, Mapping) and response_format.get("type") == "json_schema":
        return False
    if (_output_limit(request) or 0) > SIMPLE_OUTPUT_TOKENS:
        return False
    if not isinstance(messages, list) or len(messages) > SIMPLE_MESSAGES:
        return False
    texts = [message.get("content") if isinstance(message, Mapping) else None for message in messages]
    return all(isinstance(text, str) for text in texts) and sum(map(len, filter(None, texts))) <= SIMPLE_CHARACTERS


def _accepts_message(answer: Mapping[str, Any]) -> bool:
    """Judges an answer of Anthropic's Messages, whose requests always set a limit."""
    content = answer.get("content")
    blocks = [block for block in content if isinstance(block, Mapping)] if isinstance(content, list) else []
    shown = any(block.get("type") == "tool_use" or str(block.get("text") or "").strip() for block in blocks)
    return shown and answer.get("stop_reason") != "refusal"


def _accepts_choice(request: Mapping[str, Any], choice: Any) -> bool:
    if not isinstance(choice, Mapping):
        return False
    message = choice.get("message")
    if not isinstance(message, Mapping):
        message = {"content": choice.get("text")}
    text, finish_reason = message.get("content"), choice.get("finish_reason")
    limited = _output_limit(request) is not None
    if finish_reason == "content_filter" or message.get("refusal") or (finish_reason == "length" and not limited):
        return False
    if message.get("tool_calls"):
        return True
    return isinstance(text, str) and bool(text.strip()) and (not _asks_for_json(request) or _is_json(text))


def _asks_for_json(request: Mapping[str, Any]) -> bool:
    response_format = request.get("response_format")
    return isinstance(response_format, Mapping) and response_format.get("type") in ("json_object", "json_schema")


def _is_json(text: str) -> bool:
    try:
        loads(text, "answer")
    except BadMessage:
        return False
    return True


def load_rule(name: str) -> RoutingRule:
    """The rule that the config names. Raises BadMessage if it cannot be imported or is no rule."""
    if name == "small-model-first":
        return SmallModelFirst()
    try:
        resolved = resolve_name(name)
        rule = resolved() if isinstance(resolved, type) else resolved
    except Exception as error:  # an imported module may raise anything  # noqa: BLE001
        expected = 'expected "small-model-first" or a rule of yours, "package.module:name"'
        raise BadMessage(f"config: aliases: rule {name!r}: {expected}; {type(error).__name__}: {error}") from None
    if not (callable(getattr(rule, "order", None)) and callable(getattr(rule, "accepts", None))):
        raise BadMessage(f"config: aliases: rule {name!r}: expected an object with the methods order and accepts")
    return rule  # type: ignore[no-any-return]  # its methods were checked above
