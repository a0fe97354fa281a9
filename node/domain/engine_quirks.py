"""What engines need beside a route's own members, because they read them under other names. Pure."""

from __future__ import annotations

from typing import Any

from tallystick.protocol.routes import RESPONSES

LLAMA_CPP = "llama.cpp"


def adapt(path: str, members: dict[str, Any], engine: str) -> None:
    """Adds the members to a request of this route. `engine`: the engine of the ask.

    llama.cpp turns a request for Responses into a chat completion and leaves `text.format` out, but reads `response_format`.
    Source: llama.cpp, tools/server (conversion of responses).
    """
    if path != RESPONSES or engine != LLAMA_CPP or "response_format" in members:
        return
    text = members.get("text")
    wanted = text.get("format") if isinstance(text, dict) else None
    if not isinstance(wanted, dict) or wanted.get("type") not in ("json_schema", "json_object"):
        return
    described = {name: value for name, value in wanted.items() if name != "type"}
    members["response_format"] = {"type": wanted["type"]} | ({"json_schema": described} if described else {})
