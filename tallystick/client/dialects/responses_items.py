"""Translates the items of a request to OpenAI's Responses into chat messages, and its tools into functions. Pure.

Items that follow each other and belong to one turn of the assistant (reasoning, text, calls) become one message. Instructions and
system or developer messages that stand at the beginning become one system message, because many chat templates have one only.
Source: OpenAI's API reference, "Create a model response".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from tallystick.protocol.errors import BadMessage
from tallystick.protocol.lenient_json import dump_lenient

_SEPARATOR: Final = "\n\n"
_TEXTS: Final = ("input_text", "output_text", "text", "summary_text", "reasoning_text")
_ROLES: Final = {"user": "user", "assistant": "assistant", "system": "system", "developer": "system"}
_Message = dict[str, Any]


def untranslatable(member: str, value: str, advice: str) -> BadMessage:
    """The error for a member that a chat completion cannot express. `value`: what it says; `advice`: what to do instead."""
    reason = "cannot be translated to a chat completion, and no provider of this model serves /v1/responses itself"
    return BadMessage(f"{member}: {value} {reason}; {advice}")


def list_items(given: object, member: str = "input") -> list[dict[str, Any]]:
    """The items of an input, of which a text is one message of the user. Raises BadMessage."""
    if isinstance(given, str):
        return [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": given}]}]
    if not isinstance(given, list):
        raise BadMessage(f"{member}: expected a text or a list of items")
    for number, item in enumerate(given):
        if not isinstance(item, dict):
            raise BadMessage(f"{member}[{number}]: expected an object")
    return given


def translate_items(instructions: object, given: object) -> list[_Message]:
    """The chat messages of a request. Raises BadMessage, which names the member."""
    chat: list[_Message] = []
    if instructions is not None:
        if isinstance(instructions, str):
            _add(chat, {"role": "system", "content": instructions} if instructions else None)
        else:
            _add_items(chat, list_items(instructions, "instructions"), "instructions")
    items = list_items(given)
    if not items:
        raise BadMessage("input: expected at least one item")
    _add_items(chat, items, "input")
    return [_without_empty(message) for message in chat]


def _add_items(chat: list[_Message], items: list[dict[str, Any]], name: str) -> None:
    media: list[dict[str, Any]] = []
    """What tools returned besides text. It follows their results, because messages of tools have text only."""
    for number, item in enumerate(items):
        member = f"{name}[{number}]"
        kind = item.get("type", "message" if "role" in item else None)
        translate = _ITEMS.get(str(kind))
        if translate is None:
            raise untranslatable(f"{member}.type", f"an item of the type {str(kind)[:60]!r}", "leave it out, or send its text")
        if media and kind != "function_call_output":
            chat.append({"role": "user", "content": media})
            media = []
        _add(chat, translate(item, member))
        if kind == "function_call_output" and isinstance(output := item.get("output"), list):
            parts = [_part(part, f"{member}.output[{at}]") for at, part in enumerate(output)]
            media = media + [part for part in parts if part["type"] != "text"]
    if media:
        chat.append({"role": "user", "content": media})


def _add(chat: list[_Message], message: _Message | None) -> None:
    """Adds a message, or what it says to the last one if both are the same turn."""
    if message is None:
        return
    last = chat[-1] if chat else None
    if last is None or last["role"] != message["role"] or message["role"] not in ("system", "assistant"):
        chat.append(message)
    elif message["role"] == "system":
        last["content"] = _SEPARATOR.join((last["content"], message["content"]))
    elif _is_later_turn(last, message):
        chat.append(message)
    else:
        for name, value in message.items():
            last[name] = last[name] + value if name in ("reasoning_content", "content", "tool_calls") and name in last else value


def _is_later_turn(last: _Message, message: _Message) -> bool:
    """Whether an assistant's message begins another turn: it has text or reasoning after calls, or text after text."""
    after_calls = "tool_calls" in last and "tool_calls" not in message
    return after_calls or ("content" in last and ("content" in message or "reasoning_content" in message))


def _without_empty(message: _Message) -> _Message:
    """A message of the assistant has content, which may be null beside calls."""
    if message["role"] == "assistant" and "content" not in message:
        return message | {"content": None if "tool_calls" in message else ""}
    return message


def _message(item: Mapping[str, Any], member: str) -> _Message | None:
    role = _ROLES.get(str(item.get("role")))
    if role is None:
        expected = ", ".join(_ROLES)
        raise BadMessage(f"{member}.role: expected one of {expected}, got {str(item.get('role'))[:60]!r}")
    if role == "user":
        return {"role": role, "content": _content(item.get("content"), f"{member}.content")}
    text = _text(item.get("content"), f"{member}.content")
    return {"role": role, "content": text} if text else None


def _content(content: object, member: str) -> str | list[dict[str, Any]]:
    """A user's content: a text if it is one text, otherwise parts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise BadMessage(f"{member}: expected a text or a list of parts")
    parts = [_part(part, f"{member}[{number}]") for number, part in enumerate(content)]
    return parts[0]["text"] if len(parts) == 1 and parts[0]["type"] == "text" else parts


def _part(part: object, member: str) -> dict[str, Any]:
    if not isinstance(part, dict):
        raise BadMessage(f"{member}: expected an object")
    kind = part.get("type")
    if kind in _TEXTS:
        return {"type": "text", "text": _text_of(part, "text", member)}
    if kind == "refusal":
        return {"type": "text", "text": _text_of(part, "refusal", member)}
    if kind == "input_image":
        return _image(part, member)
    if kind == "input_audio" and isinstance(part.get("input_audio"), dict):
        return {"type": "input_audio", "input_audio": part["input_audio"]}
    if kind == "input_file" and isinstance(part.get("file_data"), str):
        return {"type": "file", "file": {name: part[name] for name in ("filename", "file_data") if part.get(name) is not None}}
    if kind == "input_file":
        raise untranslatable(member, "a file by its id or URL", "send its bytes as file_data")
    if kind in ("image_url", "file"):  # parts of chat completions, which some clients mix in
        return part
    raise untranslatable(f"{member}.type", f"a part of the type {str(kind)[:60]!r}", "send its text instead")


def _image(part: Mapping[str, Any], member: str) -> dict[str, Any]:
    url = part.get("image_url")
    if not isinstance(url, str) or not url:
        raise untranslatable(member, "an image by its file_id", "send it as image_url, a URL or a data: URL")
    detail = {"detail": part["detail"]} if isinstance(part.get("detail"), str) else {}
    return {"type": "image_url", "image_url": {"url": url} | detail}


def _text_of(part: Mapping[str, Any], name: str, member: str) -> str:
    text = part.get(name)
    if not isinstance(text, str):
        raise BadMessage(f"{member}.{name}: expected a text")
    return text


def _text(content: object, member: str) -> str:
    """The text of content that can have nothing else: of the assistant, of the system, or of a tool."""
    translated = _content(content, member)
    if isinstance(translated, str):
        return translated
    other = next((number for number, part in enumerate(translated) if part["type"] != "text"), None)
    if other is not None:
        raise untranslatable(f"{member}[{other}]", "content other than text of this role", "send it in a message of the user")
    return "".join(part["text"] for part in translated)


def _reasoning(item: Mapping[str, Any], _member: str) -> _Message | None:
    """Reasoning goes back to engines that want it between calls. What only its maker can read (encrypted) is left out."""
    texts = [
        part["text"]
        for name in ("content", "summary")
        for part in (item.get(name) if isinstance(item.get(name), list) else ()) or ()
        if isinstance(part, dict) and isinstance(part.get("text"), str) and part["text"]
    ]
    return {"role": "assistant", "reasoning_content": _SEPARATOR.join(texts)} if texts else None


def _call(item: Mapping[str, Any], member: str) -> _Message:
    for name in ("call_id", "name"):
        if not isinstance(item.get(name), str) or not item[name]:
            raise BadMessage(f"{member}.{name}: expected a text that is not empty")
    arguments = item.get("arguments", "{}")
    if not isinstance(arguments, str):
        arguments = dump_lenient(arguments).decode()
    function = {"name": item["name"], "arguments": arguments}
    return {"role": "assistant", "tool_calls": [{"id": item["call_id"], "type": "function", "function": function}]}


def _call_output(item: Mapping[str, Any], member: str) -> _Message:
    if not isinstance(item.get("call_id"), str):
        raise BadMessage(f"{member}.call_id: expected a text")
    output = item.get("output")
    if isinstance(output, list):
        parts = [_part(part, f"{member}.output[{number}]") for number, part in enumerate(output)]
        text = "".join(part["text"] for part in parts if part["type"] == "text")
    else:
        text = output if isinstance(output, str) else dump_lenient(output).decode()
    return {"role": "tool", "tool_call_id": item["call_id"], "content": text}


def _reference(item: Mapping[str, Any], member: str) -> _Message:
    refusal = BadMessage(f"{member}.id: this gateway has no item {str(item.get('id'))[:80]!r}; send the item itself")
    refusal.param = member
    raise refusal


_ITEMS: Final[Mapping[str, Callable[[Mapping[str, Any], str], _Message | None]]] = {
    "message": _message,
    "reasoning": _reasoning,
    "function_call": _call,
    "function_call_output": _call_output,
    "item_reference": _reference,
}


# Tools


def translate_tools(request: Mapping[str, Any]) -> dict[str, Any]:
    """The members `tools`, `tool_choice` and `parallel_tool_calls`. Raises BadMessage, which names the tool."""
    tools = request.get("tools")
    if tools is not None and not isinstance(tools, list):
        raise BadMessage("tools: expected a list")
    functions = [_tool(tool, f"tools[{number}]") for number, tool in enumerate(tools or ())]
    choice, allowed = _choice(request.get("tool_choice"))
    if allowed is not None:
        functions = [function for function in functions if function["function"]["name"] in allowed]
    if not functions:
        return {}
    chat: dict[str, Any] = {"tools": functions}
    if choice is not None:
        chat["tool_choice"] = choice
    if isinstance(request.get("parallel_tool_calls"), bool):
        chat["parallel_tool_calls"] = request["parallel_tool_calls"]
    return chat


def _tool(tool: object, member: str) -> dict[str, Any]:
    if not isinstance(tool, dict):
        raise BadMessage(f"{member}: expected an object")
    kind = tool.get("type")
    if kind != "function":
        value = f"the tool {str(kind)[:60]!r}, which runs on OpenAI's servers or is defined by them,"
        raise untranslatable(f"{member}.type", value, "describe a function of your own, or leave it out")
    described = tool["function"] if isinstance(tool.get("function"), dict) else tool
    if not isinstance(described.get("name"), str) or not described["name"]:
        raise BadMessage(f"{member}.name: expected the name of the function")
    names = ("name", "description", "parameters", "strict")
    return {"type": "function", "function": {name: described[name] for name in names if described.get(name) is not None}}


def _choice(choice: object) -> tuple[object, frozenset[str] | None]:
    """The choice of a tool, and the names of the functions that may be called; None for all of them."""
    if choice is None or choice in ("auto", "none", "required"):
        return choice, None
    kind = choice.get("type") if isinstance(choice, dict) else None
    if isinstance(choice, dict) and kind == "function":
        described = choice["function"] if isinstance(choice.get("function"), dict) else choice
        if isinstance(described.get("name"), str):
            return {"type": "function", "function": {"name": described["name"]}}, None
        raise BadMessage("tool_choice.name: expected the name of a function")
    if isinstance(choice, dict) and kind == "allowed_tools":
        tools = choice.get("tools")
        names = [tool.get("name") for tool in tools if isinstance(tool, dict)] if isinstance(tools, list) else []
        if choice.get("mode") not in ("auto", "required"):
            raise BadMessage("tool_choice.mode: expected auto or required")
        return choice["mode"], frozenset(name for name in names if isinstance(name, str))
    raise untranslatable("tool_choice", f"the choice {str(kind or choice)[:60]!r}", "expected auto, none, required or a function")
