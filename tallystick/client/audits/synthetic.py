"""Made-up requests in the shape of the user's own: same model, sampling, number and length of messages, tools and limits. Pure.

They show nobody anything of the user, so any referee may see them. Their text is drawn anew each time: from texts of the user's
choice, or from blocks that are public, which a provider that knows them can recognise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from tallystick.client.audits.planning import Random, draw
from tallystick.protocol.lenient_json import dump_lenient
from tallystick.protocol.routes import COMPLETIONS

SHAPE_MEMBERS: Final = frozenset(
    {
        *("model", "stream", "stream_options", "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k", "min_p"),
        *("seed", "presence_penalty", "frequency_penalty", "repetition_penalty", "n", "parallel_tool_calls", "reasoning_effort"),
    }
)
"""Members that are taken over as they are: they say nothing of the prompt. A seed is drawn anew."""
MAX_MESSAGES: Final = 64
MAX_TOOLS: Final = 32
MAX_CHARACTERS: Final = 1_000_000
"""Of all messages: as many as real requests get, so that hardly one is too long to be a made-up one."""
MIN_CHARACTERS: Final = 24
_SUBJECTS: Final = (
    *("a small bakery", "the night train", "our team", "a coastal town", "the old library", "a solar farm", "the harvest"),
    *("a hospital ward", "the river delta", "a chess club", "the customs office", "a software release", "the city council"),
    *("a wooden bridge", "the weather station", "a second-hand shop", "the tax return", "a marathon runner", "the museum"),
    *("a family budget", "the school garden", "a delivery route", "the phone contract", "a rented flat", "the spice market"),
)
_VERBS: Final = (
    *("changes", "depends on", "competes with", "learns from", "pays for", "prepares for", "is compared with", "replaces"),
    *("measures", "outlives", "explains", "slows down", "supports", "struggles with", "borrows from", "quietly avoids"),
)
_TIMES: Final = (
    *("in winter", "on weekdays", "after a long strike", "since last year", "before the deadline", "at short notice"),
    *("in most cases", "for the first time", "once a month", "during the holidays", "within a week", "by now"),
)
_ASKS: Final = (
    *("Explain in a few sentences why", "Write a short story in which", "List the main reasons why", "Summarise how"),
    *("Give me a plan for the case that", "Argue for and against the claim that", "Describe step by step what happens when"),
    *("What would you advise if", "Draft a friendly e-mail that says that", "Compare what it means when"),
)
_REMARKS: Final = ("Please keep it concise.", "Use plain words.", "Give one example.", "Number the points.", "Mention the costs.")
_SYSTEMS: Final = (
    *("You are a helpful assistant.", "Answer briefly and precisely.", "You are an editor who values clear language."),
    *("You help customers of a shop.", "You are a careful analyst."),
)
_TOOL_NAMES: Final = ("get_weather", "search_documents", "convert_currency", "list_events", "look_up_order", "send_reminder")


def make_up_request(path: str, like: Mapping[str, Any], random: Random, texts: Sequence[str] = ()) -> bytes:
    """The JSON body of a request to the same route as `like`, and in its shape. `texts`: paragraphs of the user's choice.

    `like`: a request, or its `request_shape`.
    """
    body = {name: value for name, value in like.items() if name in SHAPE_MEMBERS}
    if body.get("seed") is not None:
        body["seed"] = int.from_bytes(random(4), "big") >> 1
    if path == COMPLETIONS:
        body["prompt"] = _text(_length(like.get("prompt")), random, texts)
        return dump_lenient(body)
    messages = [message for message in _messages(like) if message.get("role") in _ROLES]
    share = min(1.0, MAX_CHARACTERS / max(1, sum(_length(message.get("content")) for message in messages)))
    body["messages"] = [_message(message, share, random, texts) for message in messages] or [
        {"role": "user", "content": _text(80, random, texts)}
    ]
    if body["messages"][-1]["role"] != "user":
        body["messages"].append({"role": "user", "content": _text(80, random, texts)})
    tools = like.get("tools")
    if isinstance(tools, list) and tools:
        body["tools"] = [_tool(number, random, texts) for number in range(min(len(tools), MAX_TOOLS))]
    return dump_lenient(body)


def request_shape(path: str, like: Mapping[str, Any]) -> dict[str, Any]:
    """What `make_up_request` needs of a request, which is short and has no word of it: each text is its number of characters."""
    shape = {name: value for name, value in like.items() if name in SHAPE_MEMBERS}
    if path == COMPLETIONS:
        return shape | {"prompt": _length(like.get("prompt"))}
    tools = like.get("tools")
    return shape | {
        "messages": [{"role": message.get("role"), "content": _length(message.get("content"))} for message in _messages(like)],
        "tools": [{}] * min(len(tools), MAX_TOOLS) if isinstance(tools, list) else [],
    }


def _messages(like: Mapping[str, Any]) -> list[dict[str, Any]]:
    messages = like.get("messages")
    return [message for message in messages if isinstance(message, dict)][-MAX_MESSAGES:] if isinstance(messages, list) else []


_ROLES: Final = ("system", "developer", "user", "assistant")


def _message(like: Mapping[str, Any], share: float, random: Random, texts: Sequence[str]) -> dict[str, Any]:
    role, length = like["role"], int(_length(like.get("content")) * share)
    if role in ("system", "developer") and not texts:
        return {"role": role, "content": _filled([_pick(_SYSTEMS, random)], length, random)}
    return {"role": role, "content": _text(length, random, texts)}


def _length(content: Any) -> int:
    """The characters of a text, or of the text parts of a content. A number is that of its characters."""
    if isinstance(content, int):
        return max(0, min(content, MAX_CHARACTERS))
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, dict) else part for part in content]
        return sum(len(part) for part in parts if isinstance(part, str))
    return len(content) if isinstance(content, str) else 0


def _text(length: int, random: Random, texts: Sequence[str]) -> str:
    """A request in words, of about so many characters."""
    if texts:
        return _passage(length, random, texts)
    return _filled([f"{_pick(_ASKS, random)} {_clause(random)}."], length, random)


def _passage(length: int, random: Random, texts: Sequence[str]) -> str:
    """Consecutive paragraphs from any place, cut at a word."""
    wanted = max(MIN_CHARACTERS, min(length, MAX_CHARACTERS))
    at, paragraphs, total = int(draw(random) * len(texts)), list[str](), 0
    while total < wanted:
        paragraphs.append(texts[at % len(texts)])
        total += len(paragraphs[-1]) + 1
        at += 1
    passage = "\n".join(paragraphs)
    return passage if len(passage) <= wanted else passage[:wanted].rpartition(" ")[0] or passage[:wanted]


def _filled(sentences: list[str], length: int, random: Random) -> str:
    """The sentences, and others after them, up to about so many characters."""
    wanted = max(MIN_CHARACTERS, min(length, MAX_CHARACTERS))
    total = len(sentences[0])
    while total < wanted:
        sentence = _pick(_REMARKS, random) if draw(random) < 0.2 else _sentence(random)
        sentences.append(sentence)
        total += len(sentence) + 1
    return " ".join(sentences)


def _sentence(random: Random) -> str:
    clause = _clause(random)
    return f"{clause[0].upper()}{clause[1:]}."


def _clause(random: Random) -> str:
    return f"{_pick(_SUBJECTS, random)} {_pick(_VERBS, random)} {_pick(_SUBJECTS, random)} {_pick(_TIMES, random)}"


def _pick(choices: Sequence[str], random: Random) -> str:
    return choices[int(draw(random) * len(choices))]


def _tool(number: int, random: Random, texts: Sequence[str]) -> dict[str, Any]:
    name = _TOOL_NAMES[number % len(_TOOL_NAMES)]
    parameters = {"type": "object", "properties": {"query": {"type": "string"}}, "required": ["query"]}
    name = name if number < len(_TOOL_NAMES) else f"{name}_{number // len(_TOOL_NAMES) + 1}"
    return {
        "type": "function",
        "function": {
            "name": name,
            "description": _text(60, random, texts) if texts else _sentence(random),
            "parameters": parameters,
        },
    }
