"""Tags of a request's prefixes: keyed hashes by which a later request that begins alike is recognised. Pure.

A conversation sends its beginning again with every turn. Each prefix at which an earlier request may have ended has a tag: system
prompt and tools, then each turn. A plain prompt has one at four lengths an octave. Only what an engine reads is hashed, so a
client may write the same message in another form: as a text or a list with one text, with or without a mark for the cache.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from tallystick.client.openai.requests import ApiRequest
from tallystick.protocol.errors import BadMessage
from tallystick.protocol.lenient_json import dump_lenient
from tallystick.protocol.routes import EMBEDDINGS

TAG_BYTES: Final = 16
MAX_TAGS: Final = 32
"""Tags of one request: those of its longest prefixes."""
MAX_MESSAGES: Final = 4_096
"""Messages of a request beyond which it has no tags, because it would take long to read them all."""
MIN_SHARED_BYTES: Final = 1_024
"""Bytes of system prompt and tools, about 250 tokens, below which they have no tag of their own."""
MIN_SHARED_PERCENT: Final = 50
"""Percent of a request that its system prompt and tools must be, so that they decide where a new conversation begins."""
FIRST_LENGTH: Final = 256
"""Characters of the shortest prefix of a plain prompt that has a tag."""

_TEXT_PARTS = frozenset({"text", "input_text", "output_text"})
_UNREAD_PARTS = frozenset({"thinking", "redacted_thinking", "reasoning"})
"""Parts and items that clients, or the templates of engines, leave out of later turns."""
_UNREAD_MEMBERS = frozenset({"cache_control", "id", "status", "annotations", "logprobs", "reasoning_content", "reasoning"})
"""Members that no engine reads again, or that a client moves or adds between two turns."""
_SHARED_MEMBERS = ("tools", "functions", "system", "instructions")
"""Members that many conversations have in common, beside the system prompt."""
_PLAIN_MEMBERS = frozenset({"role", "content", "name"})
"""Members of a message that is read as it is if they are texts, as those of most messages are."""
_MAX_DEPTH = 12
_ANSWERS = frozenset({"function_call", "custom_tool_call", "reasoning"})
"""Types of items that a model writes; those of messages have the role `assistant`."""


@dataclass(frozen=True, slots=True)
class PrefixTag:
    """The tag of one prefix. `percent`: the share of the request's text that it covers. `shared`: it covers system prompt and
    tools alone, which many conversations have in common.
    """

    tag: bytes
    percent: int
    shared: bool = False


def derive_tags(key: bytes, request: ApiRequest, name: str | None = None) -> tuple[PrefixTag, ...]:
    """The tags of a request's prefixes, longest first; none if it belongs to no conversation.

    `key`: up to 64 secret bytes, without which nobody can tell whether a tag is that of a guessed text. `name`: what the caller
    calls the conversation, else its `prompt_cache_key`. Conversations of different names share nothing, and a request shares at
    least the name with the others of its name.
    """
    body = request.json
    if body is None or request.head.path == EMBEDDINGS:
        return ()
    try:
        return _derive(key, request, body, name)
    except BadMessage:  # nested too deeply to be written again; the engine judges it
        return ()


def _derive(key: bytes, request: ApiRequest, body: Mapping[str, Any], name: str | None) -> tuple[PrefixTag, ...]:
    named = body.get("prompt_cache_key") if name is None else name
    named = named if isinstance(named, str) else None
    state, whole, messages = hashlib.blake2b(digest_size=TAG_BYTES, key=key), 0, _messages(body)
    opened = 0 if messages is None else _count_opening(messages)
    shared = messages is not None and (opened > 0 or any(map(body.get, _SHARED_MEMBERS)))
    _add(state, dump_lenient([request.head.path, request.summary.model, named]))
    tagged = [(state.copy().digest(), 0)]
    for part, ends in _parts(body, messages, opened, shared=shared):
        whole += len(part)
        _add(state, part)
        if ends:
            tagged.append((state.copy().digest(), whole))
    return tuple(_longest_first(tagged, whole, named=named is not None, shared=shared))


def _longest_first(tagged: Sequence[tuple[bytes, int]], whole: int, *, named: bool, shared: bool) -> Iterator[PrefixTag]:
    """`tagged`: tags and the bytes that they cover, of which the first covers the name alone. `shared`: the second one is that of
    the system prompt and the tools.
    """
    root, prefixes = tagged[0], tagged[1:]
    head = prefixes[:1] if shared else []
    for tag, size in reversed(prefixes[len(head) :][-MAX_TAGS + 2 :]):
        yield PrefixTag(tag, 100 * size // max(whole, 1))
    for tag, size in head:
        if size >= MIN_SHARED_BYTES and 100 * size >= MIN_SHARED_PERCENT * whole:
            yield PrefixTag(tag, 100 * size // whole, shared=True)
    if named:
        yield PrefixTag(root[0], 100)


def _add(state: hashlib.blake2b, part: bytes) -> None:
    """Adds a part, framed by its length."""
    state.update(len(part).to_bytes(8, "big"))
    state.update(part)


def _parts(body: Mapping[str, Any], messages: Sequence[Any] | None, opened: int, *, shared: bool) -> Iterator[tuple[bytes, bool]]:
    """The parts of a request in the order in which an engine reads them, and whether an earlier request may have ended there.

    `opened`: how many of the messages are the system prompt. `shared`: whether there is a system prompt, or tools.
    """
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1:
        prompt = prompt[0]
    if isinstance(prompt, str):
        yield from _sliced(prompt)
        return
    if isinstance(prompt, list) and all(isinstance(token, int) for token in prompt):
        yield from _sliced("".join(map(chr, _as_code_points(prompt))))
        return
    if messages is None:
        return
    if shared:
        tools = [_read(tool) for name in ("tools", "functions") for tool in _listed(body.get(name))]
        system = [_read(body.get(member)) for member in ("system", "instructions")]
        yield dump_lenient([tools, system, [_read(message) for message in messages[:opened]]]), True
    for message in messages[opened:]:
        if not _is_unread(message):
            yield dump_lenient(_read(message)), not _is_answer(message)


def _as_code_points(tokens: Sequence[int]) -> Iterator[int]:
    """Token ids as characters, of which each stands for one id: all ids that a tokenizer has are below 2^20."""
    return (min(max(token, 0), 0xFFFFF) for token in tokens)


def _sliced(prompt: str) -> Iterator[tuple[bytes, bool]]:
    begin, end = 0, FIRST_LENGTH
    while end <= len(prompt):
        yield prompt[begin:end].encode("utf-8", "surrogatepass"), True
        begin, end = end, end + (1 << (end.bit_length() - 3))
    yield prompt[begin:].encode("utf-8", "surrogatepass"), False


def _messages(body: Mapping[str, Any]) -> Sequence[Any] | None:
    messages = body.get("messages", body.get("input"))
    if isinstance(messages, str):
        return [{"role": "user", "content": messages}]
    if not isinstance(messages, list) or len(messages) > MAX_MESSAGES:
        return None
    return messages if all(isinstance(message, dict) for message in messages) else None


def _listed(value: object) -> Sequence[Any]:
    return value if isinstance(value, list) else ()


def _count_opening(messages: Sequence[Any]) -> int:
    """How many messages the system prompt has that begins them."""
    for number, message in enumerate(messages):
        if message.get("role") not in ("system", "developer"):
            return number
    return len(messages)


def _is_answer(message: Mapping[str, Any]) -> bool:
    return message.get("role") == "assistant" or _kind(message) in _ANSWERS


def _is_unread(part: object) -> bool:
    return isinstance(part, dict) and _kind(part) in _UNREAD_PARTS


def _kind(part: Mapping[str, Any]) -> str:
    kind = part.get("type")
    return kind if isinstance(kind, str) else ""


def _read(value: Any, depth: int = _MAX_DEPTH) -> Any:
    """What an engine reads of a message, a part or a tool, in one form: of equal values for equal prompts."""
    if not depth:
        return value
    if isinstance(value, list):
        items = [_read(item, depth - 1) for item in value if not _is_unread(item)]
        return items[0] if len(items) == 1 and isinstance(items[0], str) else items
    if not isinstance(value, dict):
        return value
    if value.keys() <= _PLAIN_MEMBERS and all(type(member) is str for member in value.values()):
        return value
    if _kind(value) in _TEXT_PARTS and isinstance(value.get("text"), str):
        return value["text"]
    members = {name: member for name, member in value.items() if name not in _UNREAD_MEMBERS and member not in (None, [])}
    if members.get("type") == "message":
        del members["type"]
    if "content" in members:
        members["content"] = _read(members["content"], depth - 1)
    return members
