"""OpenAI's JSON: how much output a request may ask for, and what an answer says. Pure.

The client and the node read the same documents by these functions, so that both count choices, tokens and text alike.
Members that are not read here pass through untouched. Source: OpenAI's API reference, and engines' deviations from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from tallystick.protocol.engine_errors import FAILED_FINISH, NO_FINISHES, error_status, has_error
from tallystick.protocol.errors import BadMessage
from tallystick.protocol.lenient_json import load_lenient
from tallystick.protocol.routes import CHAT, COMPLETIONS, EMBEDDINGS, MESSAGES, RESPONSES, SCORES
from tallystick.protocol.sse import MalformedAnswer
from tallystick.protocol.usage_reports import ReportedUsage, find_usage

MAX_CHOICES: Final = 1_024
"""The most choices that one request may ask for."""
MAX_COUNT: Final = (1 << 31) - 1
"""The largest number that a count in a request may be."""
OUTPUT_LIMITS: Final[Mapping[str, tuple[str, ...]]] = {
    CHAT: ("max_completion_tokens", "max_tokens", "n_predict"),
    COMPLETIONS: ("max_tokens", "n_predict"),
    RESPONSES: ("max_output_tokens",),
    MESSAGES: ("max_tokens",),
}
"""The members that limit the output tokens of each choice, by route. The first one that sets a limit decides.

`n_predict` is llama.cpp's, which takes it on OpenAI's routes too.
"""
UNLIMITED: Final = frozenset({-1, -2})
"""Values of those members that engines take for no limit: llama.cpp and Ollama both, LM Studio and Jan -1."""
TEXT_PARTS: Final = frozenset({"text", "refusal", "input_text", "output_text"})
"""Types of content parts whose tokens are bounded by their bytes; images, audio and files are not among them."""
TEXT_MEMBERS: Final = ("content", "reasoning_content", "reasoning", "refusal", "text")
"""Members of a message, a delta or a choice that hold generated text."""

_ABSENT: Final = object()
_SILENT = frozenset({"role", "index", "type", "id", "name"})
"""Members of a message or a delta that are no output by themselves."""
_PREAMBLE = frozenset(
    {
        "response.created",
        "response.queued",
        "response.in_progress",
        "message_start",
        "message_delta",
        "ping",
        "content_block_stop",
    }
)
"""Events of responses and messages that show a user nothing."""
_OPENING = (".added", "content_block_start")
"""Events that begin an item or a block, and show a user something only if they have text."""
_LAST_EVENTS = frozenset({"response.completed", "response.incomplete", "message_stop"})
"""The events with which responses and messages end. A stream without them was cut off."""
_FINISH = {"response.completed": "stop", "response.incomplete": "length", "completed": "stop", "incomplete": "length"}
_FAILED = frozenset({"error", "response.failed", "failed", "response.cancelled", "cancelled", "canceled"})
LENGTHS = frozenset({"length", "max_tokens", "max_length", "model_length", "max_output_tokens", "max_new_tokens"})
"""Finish reasons that stand for "length"."""


# Requests


def read_count(request: Mapping[str, Any], name: str, least: int = 0) -> int | None:
    """A whole number in a request, which may be written as 20.0; None if it is absent or null.

    Raises BadMessage, whose text quotes nothing of the request.
    """
    value = request.get(name)
    if value is None:
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= MAX_COUNT:
        raise BadMessage(f"{name}: expected a whole number from {least} to {MAX_COUNT}")
    return value


def read_output_limit(request: Mapping[str, Any], name: str) -> int | None:
    """The value of a member in OUTPUT_LIMITS; None if it sets no limit. Raises BadMessage as `read_count`."""
    value = request.get(name)
    if isinstance(value, int | float) and value in UNLIMITED:
        return None
    return read_count(request, name)


def find_output_limit(path: str, request: Mapping[str, Any]) -> int | None:
    """The most output tokens of each choice; None if the request sets no limit. Raises BadMessage for any invalid limit."""
    limits = [read_output_limit(request, name) for name in OUTPUT_LIMITS.get(path, ())]
    return next((limit for limit in limits if limit is not None), None)


def count_choices(path: str, request: Mapping[str, Any]) -> int:
    """How many choices an engine generates for a request: the larger of `n` and `best_of`, for each prompt.

    Raises BadMessage for more than MAX_CHOICES.
    """
    choices = max(read_count(request, "n", 1) or 1, read_count(request, "best_of", 1) or 1) * _count_prompts(path, request)
    if choices > MAX_CHOICES:
        raise BadMessage(f"n, best_of and prompt: expected at most {MAX_CHOICES} choices in all, got {choices}")
    return choices


def _count_prompts(path: str, request: Mapping[str, Any]) -> int:
    """The prompts of a completion request: a list of texts or of token lists is several, a list of tokens is one."""
    prompt = request.get("prompt")
    if path != COMPLETIONS or not isinstance(prompt, list) or not prompt or not isinstance(prompt[0], str | list):
        return 1
    return len(prompt)


def bounds_input(path: str, request: Mapping[str, Any]) -> bool:
    """Whether the bytes of a JSON request bound its input tokens: it has text only, and names no earlier response.

    Not so for other media, which may stand there by their URL alone, nor for stored conversations.
    """
    if path == EMBEDDINGS:
        return True
    if path not in (*OUTPUT_LIMITS, SCORES) or request.get("previous_response_id") or request.get("conversation"):
        return False
    messages = request.get("messages", request.get("input"))
    contents = [m.get("content") for m in messages if isinstance(m, dict)] if isinstance(messages, list) else []
    parts = [part for content in contents if isinstance(content, list) for part in content if isinstance(part, dict)]
    return all(part.get("type") in TEXT_PARTS for part in parts)


# Answers


class EngineError(MalformedAnswer):
    """An error that an engine reports in an answer. `document`: the engine's own words, which must travel sealed only.

    `blamed_status`: the HTTP status that it stands for, if it is not a failure of the engine; see `error_status`.
    """

    def __init__(self, document: dict[str, Any]) -> None:
        super().__init__("expected an answer, got an error")
        self.document, self.blamed_status = document, error_status(document)


class AnswerDocument(NamedTuple):
    """One JSON document of an answer: the whole answer, or the data of one event of its stream.

    `members`: the parsed document. `has_output`: whether a user would see anything of it. `text_bytes`: bytes of generated text.
    `finish_reason`: "" if the document has a text that stands for none. `usage_only`: whether it is the extra event that reports
    usage and has no choices. `is_last`: whether it is the event that ends a stream of responses or messages.
    """

    members: dict[str, Any]
    has_output: bool
    text_bytes: int
    finish_reason: str | None
    usage: ReportedUsage | None
    usage_only: bool = False
    is_last: bool = False


def read_completion(data: bytes) -> AnswerDocument:
    """Reads a document of a chat, completion or embeddings answer.

    Raises MalformedAnswer, and EngineError for an error object or a finish reason that says that the engine failed.
    """
    document = _load_object(data)
    text_bytes, has_output, finish_reason = 0, False, None
    for choice in choices_of(document):
        if choice.get("error"):  # OpenRouter's form
            raise EngineError({"error": choice["error"], "answer": document})
        choice_bytes, choice_output = _measure_choice(choice)
        text_bytes, has_output = text_bytes + choice_bytes, has_output or choice_output
        if isinstance(choice.get("finish_reason"), str):
            finish_reason = _merge_finish(finish_reason, choice["finish_reason"], document)
    usage = find_usage(document)
    usage_only = usage is not None and document.get("choices") == []
    return AnswerDocument(document, has_output, text_bytes, finish_reason, usage, usage_only)


def read_other_answer(data: bytes) -> AnswerDocument:
    """Reads a document of any other route's answer: responses and messages, whole or as events, images, ranks and others.

    Documents of unknown kinds count as output. Raises as `read_completion`. Sources: OpenAI's and Anthropic's API references.
    """
    document = _load_object(data)
    inner = document.get("response")
    response = inner if isinstance(inner, dict) else document
    kind = str(document.get("type") or document.get("status") or "")
    if kind in _FAILED or (inner is response and response.get("status") in _FAILED):
        raise EngineError(document)
    delta = document.get("delta")
    outputs = (delta, document.get("output"), document.get("content_block"), document.get("content"))
    output = next((part for part in outputs if part is not None), None)
    text_bytes = 0 if kind == "message_delta" else _count_text_bytes(output)
    has_output = kind not in _PREAMBLE and not (kind.endswith(_OPENING) and not text_bytes)
    holder = delta if isinstance(delta, dict) and kind == "message_delta" else response
    stop_reason, finish_reason = holder.get("stop_reason"), _FINISH.get(kind)
    if isinstance(stop_reason, str):
        finish_reason = _merge_finish(finish_reason, stop_reason, document)
    is_last = kind in _LAST_EVENTS
    return AnswerDocument(document, has_output, text_bytes, finish_reason, find_usage(document), is_last=is_last)


def _merge_finish(earlier: str | None, reason: str, document: dict[str, Any]) -> str:
    """The finish reason of several choices: "length" if one has it. Raises EngineError for one that reports a failure."""
    reason = reason.strip()
    if FAILED_FINISH.search(reason):
        raise EngineError({"error": {"message": f"the engine stopped: {reason}"}, "answer": document})
    if reason.lower() in NO_FINISHES:
        return earlier or ""
    return "length" if earlier == "length" or reason.lower() in LENGTHS else reason


def choices_of(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The choices of an answer's document that are objects; none if it has no list of them."""
    choices = document.get("choices")
    return [choice for choice in choices if isinstance(choice, dict)] if isinstance(choices, list) else []


def delta_text(document: Mapping[str, Any]) -> str:
    """The text that one event of a stream adds to the first choice of a chat, a completion or a response.

    Tool calls and reasoning are not part of it.
    """
    if document.get("type") == "response.output_text.delta":
        return _text_or_empty(document.get("delta"))
    return "".join(_choice_delta(choice) for choice in choices_of(document) if choice.get("index", 0) == 0)


def completion_text(document: object) -> str | None:
    """The text of the first choice of an answer that was not streamed; None if the document is no completion."""
    choices = choices_of(document) if isinstance(document, dict) else []
    if not choices:
        return None
    choice = choices[0]
    message = choice.get("message", choice)
    if not isinstance(message, dict):
        return None
    text = message.get("content" if "message" in choice else "text", _ABSENT)
    return None if text is _ABSENT else "" if text is None else str(text)


def _choice_delta(choice: Mapping[str, Any]) -> str:
    delta = choice.get("delta")
    return _text_or_empty(delta.get("content") if isinstance(delta, dict) else choice.get("text"))


def _text_or_empty(value: object) -> str:
    return value if isinstance(value, str) else ""


def _load_object(data: bytes) -> dict[str, Any]:
    try:
        document = load_lenient(data)
    except ValueError:
        raise MalformedAnswer("expected JSON") from None
    if not isinstance(document, dict):
        raise MalformedAnswer("expected a JSON object")
    if has_error(document):
        raise EngineError(document)
    return document


def _measure_choice(choice: Mapping[str, Any]) -> tuple[int, bool]:
    """Bytes of generated text in one choice, and whether it has any output at all."""
    text = choice.get("text")
    text_bytes, has_output = (len(text.encode(errors="replace")), True) if isinstance(text, str) and text else (0, False)
    message = choice.get("delta") or choice.get("message") or {}
    if isinstance(message, dict):
        for name, value in message.items():
            if value and name not in _SILENT:
                has_output = True
                text_bytes += len(value) if isinstance(value, str) and value.isascii() else _count_text_bytes(value)
    return text_bytes, has_output


def _count_text_bytes(value: Any, depth: int = 8) -> int:
    """Bytes of all strings in a member of a delta: contents, names and arguments of tools, reasoning."""
    if isinstance(value, str):
        return len(value.encode(errors="replace"))
    if isinstance(value, dict):
        value = [inner for name, inner in value.items() if name not in {"id", "type", "index"}]
    if isinstance(value, list) and depth:
        return sum(_count_text_bytes(inner, depth - 1) for inner in value)
    return 0
