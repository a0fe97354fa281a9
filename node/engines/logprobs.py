"""Reads log-probabilities out of an engine's answer, and takes out of it what its caller did not ask for. Pure.

Everything else of the answer keeps its bytes. Forms: OpenAI's of chats, which llama.cpp has on both routes, with the ids in
members of their own; OpenAI's older one of completions, and vLLM's texts "token_id:N" in either.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from node.domain.answer_rows import AnswerRows, TokenReport
from node.domain.logprob_request import LogprobRequest
from tallystick.protocol.lenient_json import dump_lenient
from tallystick.protocol.openai_wire import choices_of

_MEMBER = re.compile(rb'"logprobs"\s*:\s*')
_STRING_OR_BRACKET = re.compile(rb'"(?:[^"\\]|\\.)*+"|[\[\]{}]', re.DOTALL)
_BLANK = b" \t\r\n"
_PREFIX = "token_id:"
_ID_MEMBERS = ("id", "token_id")
"""llama.cpp's and koboldcpp's name of the member, and another one in use."""
_REASONING = ("reasoning_content", "reasoning")
_TEXTS = ("content", *_REASONING, "refusal", "text")


REMOVED: Final = object()
"""Stands for the value of a member that was taken out."""

Changes = Sequence[tuple[Any, Any]]
"""The former and the new value of each member `logprobs`, in order."""


class UnreadableLogprobs(Exception):
    """Log-probabilities in a form without ids, or in none that is known."""


def take_logprobs(document: dict[str, Any], request: LogprobRequest, rows: AnswerRows) -> Changes:
    """Adds an answer's log-probabilities to `rows`, and takes what was added to its request out of the document.

    Returns what changed, for `rewrite`.
    """
    changes: list[tuple[Any, Any]] = []
    for choice in choices_of(document):
        if "logprobs" in choice:
            value = choice["logprobs"]
            changes.append((value, _stripped(choice, value, request)))
        else:
            value = None
        if not choice.get("index"):
            _collect(choice, value, rows)
    return changes


def is_changed(changes: Changes) -> bool:
    """Whether the document is another one than before."""
    return any(new is not old for old, new in changes)


def _stripped(choice: dict[str, Any], value: Any, request: LogprobRequest) -> Any:
    if request.strip:
        if request.null:
            choice["logprobs"] = None
            return None
        del choice["logprobs"]
        return REMOVED
    if request.top is not None and isinstance(value, dict):
        content = value.get("content")
        cut = [_cut_entry(entry, request.top) for entry in content] if isinstance(content, list) else content
        choice["logprobs"] = value | {"content": cut}
        return choice["logprobs"]
    return value


def _cut_entry(entry: Any, top: int) -> Any:
    best = entry.get("top_logprobs") if isinstance(entry, dict) else None
    return entry | {"top_logprobs": best[:top]} if isinstance(best, list) else entry


def rewrite(data: bytes, document: Mapping[str, Any], changes: Changes) -> bytes:
    """The bytes of the document's JSON after `take_logprobs`. All others stay as they were, if the members can be found."""
    if not is_changed(changes):
        return data
    places = [match for match in _MEMBER.finditer(data) if data[match.start() - 1 : match.start()] != b"\\"]
    if len(places) != len(changes):  # a member of this name in another place
        return dump_lenient(document)
    parts, at = [], 0
    for place, (old, new) in zip(places, changes, strict=True):
        if new is old:
            continue
        end = _value_end(data, place.end(), old)
        if new is REMOVED:
            start, end = _with_comma(data, place.start(), end)
            parts.append(data[at:start])
        else:
            parts += (data[at : place.end()], dump_lenient(new))
        at = end
    return b"".join((*parts, data[at:]))


def _value_end(data: bytes, start: int, value: Any) -> int:
    """Where the value that begins at `start` ends. Most engines write it as this library would, which is found out fast."""
    compact = dump_lenient(value)
    if data.startswith(compact, start):
        return start + len(compact)
    depth = 0
    for match in _STRING_OR_BRACKET.finditer(data, start):
        mark = data[match.start()]
        depth += (mark in b"[{") - (mark in b"]}")
        if depth <= 0:
            return match.end()
    return len(data)


def _with_comma(data: bytes, start: int, end: int) -> tuple[int, int]:
    """The span of a member with the comma before it; of a first member, with the comma after it."""
    before = data[:start].rstrip(_BLANK)
    if before.endswith(b","):
        return len(before) - 1, end
    after = end
    while after < len(data) and data[after] in _BLANK:
        after += 1
    if data[after : after + 1] == b",":
        after += 1
        while after < len(data) and data[after] in _BLANK:
            after += 1
        return start, after
    return start, end


def _collect(choice: Mapping[str, Any], value: Any, rows: AnswerRows) -> None:
    part = choice.get("delta") or choice.get("message") or choice
    members = part if isinstance(part, dict) else {}
    text = "".join(members[name] for name in _TEXTS if isinstance(members.get(name), str))
    marks = bool(members.get("tool_calls")) or any(members.get(name) for name in _REASONING)
    try:
        reports = [] if value is None else list(read_reports(value))
    except UnreadableLogprobs:
        rows.give_up()
        return
    rows.add(reports, text.encode(errors="replace"), marks=marks)


def read_reports(value: Any) -> Iterator[TokenReport]:
    """The tokens of one member `logprobs`. Raises UnreadableLogprobs."""
    if not isinstance(value, dict):
        raise UnreadableLogprobs
    entries = value.get("content")
    if isinstance(entries, list):
        yield from map(_read_entry, entries)
    elif isinstance(value.get("tokens"), list):
        yield from _read_older_form(value)
    elif entries is not None:
        raise UnreadableLogprobs


def _read_entry(entry: Any) -> TokenReport:
    token, logprob = _read_id(entry), _read_logprob(entry)
    best = entry.get("top_logprobs")
    logprobs = [(_read_id(other), _read_logprob(other)) for other in best] if isinstance(best, list) else []
    return TokenReport(token, logprobs or [(token, logprob)], _read_text(entry))


def _read_text(entry: Mapping[str, Any]) -> bytes | None:
    """The bytes of a token's text; None if the engine does not tell them."""
    text, name = entry.get("bytes"), entry.get("token")
    if not isinstance(text, list) or (isinstance(name, str) and name.startswith(_PREFIX)):
        return None
    try:
        return bytes(text)
    except (TypeError, ValueError):  # not numbers, or no bytes
        return None


def _read_older_form(value: Mapping[str, Any]) -> Iterator[TokenReport]:
    tokens, own, best = value["tokens"], value.get("token_logprobs"), value.get("top_logprobs")
    if not isinstance(own, list) or not isinstance(best, list) or not len(tokens) == len(own) == len(best):
        raise UnreadableLogprobs
    for text, logprob, others in zip(tokens, own, best, strict=True):
        token = _read_text_id(text)
        listed = others.items() if isinstance(others, dict) else ()
        logprobs = [(_read_text_id(other), _check_logprob(number)) for other, number in listed]
        yield TokenReport(token, logprobs or [(token, _check_logprob(logprob))], None)


def _read_id(entry: Any) -> int:
    if not isinstance(entry, dict):
        raise UnreadableLogprobs
    for name in _ID_MEMBERS:
        token = entry.get(name)
        if type(token) is int:  # and no bool
            return token
    return _read_text_id(entry.get("token"))


def _read_text_id(text: Any) -> int:
    digits = text.removeprefix(_PREFIX) if isinstance(text, str) and text.startswith(_PREFIX) else ""
    if not (digits.isascii() and digits.isdigit() and len(digits) < 12):
        raise UnreadableLogprobs
    return int(digits)


def _read_logprob(entry: Mapping[str, Any]) -> float:
    return _check_logprob(entry.get("logprob"))


def _check_logprob(number: Any) -> float:
    if type(number) is float:
        return number
    if isinstance(number, bool) or not isinstance(number, int | float):
        raise UnreadableLogprobs
    return float(number)
