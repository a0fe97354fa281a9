"""Translates the system prompt, the turns and the content blocks of Anthropic's Messages into chat messages. Pure.

Turns of one role that follow each other are one turn, as Anthropic's API has it. The results of tools become messages of the role
"tool", before the text that stands beside them; images in them follow in a message of the user, because such messages have text
only. Source: Anthropic's API reference, "Create a Message".
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from tallystick.client.dialects.messages_errors import untranslatable
from tallystick.protocol.errors import BadMessage
from tallystick.protocol.lenient_json import dump_lenient

_SEPARATOR: Final = "\n\n"
"""What stands between two blocks of text of one prompt."""
_BILLING: Final = "x-anthropic-billing-header:"
"""Begins a block that Claude Code adds for Anthropic's accounting. It is no prompt, and would change the prompt's beginning with
each request, so that no engine could use its cache.
"""
_Part = dict[str, Any]


def translate_turns(system: object, messages: object) -> list[dict[str, Any]]:
    """The chat messages of a request. Raises BadMessage, which names the member."""
    chat: list[dict[str, Any]] = []
    prompt = _system_text(system, "system") if system is not None else ""
    if prompt:
        chat.append({"role": "system", "content": prompt})
    if not isinstance(messages, list) or not messages:
        raise BadMessage("messages: expected at least one message")
    for role, blocks in _merge_turns(messages):
        chat += _user_messages(blocks) if role == "user" else [_assistant_message(blocks)]
    return chat


def _merge_turns(messages: list[Any]) -> Iterator[tuple[str, list[tuple[str, dict[str, Any]]]]]:
    """Each turn's role, user or assistant, and its blocks with the name of the member where each stands.

    A system message between the turns becomes a part of the user's turn, because many chat templates allow none there.
    """
    last: tuple[str, list[tuple[str, dict[str, Any]]]] | None = None
    for number, message in enumerate(messages):
        member = f"messages[{number}]"
        role = message.get("role") if isinstance(message, dict) else None
        if role not in ("user", "assistant", "system"):
            raise BadMessage(f"{member}.role: expected user or assistant, got {role!r:.60}")
        blocks = list(blocks_of(message.get("content"), f"{member}.content"))
        if role == "system":
            role, blocks = "user", [(member, _reminder(message["content"], f"{member}.content"))]
        if last is not None and last[0] == role:
            last[1].extend(blocks)
            continue
        if last is not None:
            yield last
        last = (role, blocks)
    if last is not None:
        yield last


def _reminder(content: object, member: str) -> _Part:
    return {"type": "text", "text": f"<system-reminder>\n{_system_text(content, member)}\n</system-reminder>"}


def blocks_of(content: object, member: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The blocks of a content, each with the name of the member where it stands. A text is one block. Raises BadMessage."""
    if isinstance(content, str):
        yield member, {"type": "text", "text": content}
        return
    if not isinstance(content, list):
        raise BadMessage(f"{member}: expected a text or a list of blocks")
    for number, block in enumerate(content):
        if not isinstance(block, dict):
            raise BadMessage(f"{member}[{number}]: expected an object")
        yield f"{member}[{number}]", block


def _system_text(system: object, member: str) -> str:
    texts = [_text_of(block, name) for name, block in blocks_of(system, member)]
    return _SEPARATOR.join(text for text in texts if text and not text.startswith(_BILLING))


def _text_of(block: dict[str, Any], member: str) -> str:
    if block.get("type") != "text":
        raise _untranslatable_block(block, member)
    text = block.get("text")
    if not isinstance(text, str):
        raise BadMessage(f"{member}.text: expected a text")
    return text


def _untranslatable_block(block: dict[str, Any], member: str) -> BadMessage:
    return untranslatable(member, f"a block of the type {str(block.get('type'))[:60]!r}", "send its text instead")


# The user's turns


def _user_messages(blocks: list[tuple[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """The results of tools, then the images in them and whatever else the user says."""
    results: list[dict[str, Any]] = []
    parts: list[_Part] = []
    for member, block in blocks:
        if block.get("type") == "tool_result":
            result, images = _tool_result(block, member)
            results.append(result)
            parts += images
    for member, block in blocks:
        if block.get("type") != "tool_result":
            parts += _user_parts(block, member)
    if parts or not results:
        results.append({"role": "user", "content": _joined(parts)})
    return results


def _joined(parts: list[_Part]) -> str | list[_Part]:
    """Text alone as one text, which every engine and every chat template can read."""
    texts = [part["text"] for part in parts if part["type"] == "text"]
    return _SEPARATOR.join(text for text in texts if text) if len(texts) == len(parts) else parts


def _tool_result(block: dict[str, Any], member: str) -> tuple[dict[str, Any], list[_Part]]:
    """A tool's result as a message of the role "tool", and its images as parts for a message of the user."""
    call = block.get("tool_use_id")
    if not isinstance(call, str):
        raise BadMessage(f"{member}.tool_use_id: expected the id of a tool_use block")
    content = block.get("content")
    parts = [
        part
        for name, inner in blocks_of("" if content is None else content, f"{member}.content")
        for part in _user_parts(inner, name)
    ]
    texts = [part["text"] for part in parts if part["type"] == "text"]
    images = [part for part in parts if part["type"] != "text"]
    text = _SEPARATOR.join(text for text in texts if text)
    if images:
        note = f"Images in the result of the tool call {call}:"
        text = text or "The result is in the images that follow."
        images.insert(0, {"type": "text", "text": note})
    if block.get("is_error") is True and not text.lower().startswith("error"):
        text = f"Error: {text}"
    return {"role": "tool", "tool_call_id": call, "content": text}, images


def _user_parts(block: dict[str, Any], member: str) -> list[_Part]:
    kind = block.get("type")
    if kind == "text":
        return [{"type": "text", "text": _text_of(block, member)}]
    if kind == "image":
        return [{"type": "image_url", "image_url": {"url": _image_url(block.get("source"), f"{member}.source")}}]
    if kind in ("document", "search_result"):
        _refuse_citations(block, member)
        return _document_parts(block, member)
    if kind == "tool_reference":
        return [{"type": "text", "text": str(block.get("tool_name", ""))}]
    raise _untranslatable_block(block, member)


def _image_url(source: object, member: str) -> str:
    kind = source.get("type") if isinstance(source, dict) else None
    if isinstance(source, dict) and kind == "url" and isinstance(source.get("url"), str):
        return str(source["url"])
    if isinstance(source, dict) and kind == "base64":
        media, data = source.get("media_type"), source.get("data")
        if isinstance(media, str) and isinstance(data, str):
            return f"data:{media};base64,{data}"
        raise BadMessage(f"{member}: expected media_type and data")
    value = f"an image of the type {str(kind)[:60]!r}"
    raise untranslatable(f"{member}.type", value, "expected base64 or url: files at Anthropic are not available here")


def _refuse_citations(block: dict[str, Any], member: str) -> None:
    citations = block.get("citations")
    if isinstance(citations, dict) and citations.get("enabled"):
        raise untranslatable(f"{member}.citations", "enabled", "leave them out")


def _document_parts(block: dict[str, Any], member: str) -> list[_Part]:
    """A document or search result of text, with its title and where it is from, as text."""
    source = block.get("source")
    if block["type"] == "search_result":
        inner: object = block.get("content")
        heading = [block.get("title"), source]
        name = f"{member}.content"
    else:
        kind = source.get("type") if isinstance(source, dict) else None
        if not isinstance(source, dict) or kind not in ("text", "content"):
            value = f"a document of the type {str(kind)[:60]!r}"
            raise untranslatable(f"{member}.source.type", value, "send its text, or its pages as images")
        inner = source.get("data") if kind == "text" else source.get("content")
        heading = [block.get("title"), block.get("context")]
        name = f"{member}.source.{'data' if kind == 'text' else 'content'}"
    parts = [{"type": "text", "text": "\n".join(line for line in heading if isinstance(line, str) and line)}]
    parts += [part for where, nested in blocks_of(inner, name) for part in _user_parts(nested, where)]
    return [part for part in parts if part.get("text") != ""]


# The assistant's turns


def _assistant_message(blocks: list[tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    """Text, reasoning and calls of one turn. Reasoning that only Anthropic's models can read (redacted) is left out."""
    texts: list[str] = []
    reasoning: list[str] = []
    calls: list[dict[str, Any]] = []
    for member, block in blocks:
        kind = block.get("type")
        if kind == "tool_use":
            calls.append(_tool_call(block, member))
        elif kind == "thinking" and isinstance(block.get("thinking"), str):
            reasoning.append(block["thinking"])
        elif kind != "redacted_thinking":
            texts.append(_text_of(block, member))
    message: dict[str, Any] = {"role": "assistant", "content": "".join(texts) or ("" if not calls else None)}
    if any(reasoning):
        message["reasoning_content"] = _SEPARATOR.join(text for text in reasoning if text)
    return message | ({"tool_calls": calls} if calls else {})


def _tool_call(block: dict[str, Any], member: str) -> dict[str, Any]:
    call, name, arguments = block.get("id"), block.get("name"), block.get("input")
    if not isinstance(call, str) or not isinstance(name, str):
        raise BadMessage(f"{member}: expected an id and the name of a tool")
    if not isinstance(arguments, dict):
        raise BadMessage(f"{member}.input: expected an object")
    return {"id": call, "type": "function", "function": {"name": name, "arguments": dump_lenient(arguments).decode()}}
