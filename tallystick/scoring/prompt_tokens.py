"""The tokens of a prompt by vLLM and SGLang: from their tokenizer's endpoint, or from a chat that says what it read.

Sources: vLLM, "OpenAI-Compatible Server" (tokenizer API, `return_token_ids`); SGLang, `return_prompt_token_ids` of its chats.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tallystick.protocol.errors import BadMessage
from tallystick.protocol.routes import CHAT
from tallystick.scoring.engine_api import EngineApi, NoSuchRoute
from tallystick.scoring.scorer import find_list, read_tokens

_TOKENIZER_MEMBERS = frozenset(
    {"messages", "tools", "tool_choice", "parallel_tool_calls", "chat_template", "chat_template_kwargs", "add_generation_prompt"}
)
"""Members of a chat that the tokenizer's endpoint honours, and those that do not change the prompt."""


async def tokenize(api: EngineApi, model: str, text: str, *, special: bool) -> tuple[int, ...]:
    """The tokens of a text, with the special tokens that begin a prompt or without. Raises as EngineApi.post."""
    tokens = read_tokens(await api.post("/tokenize", {"model": model, "prompt": text, "add_special_tokens": special}))
    if not tokens:
        raise BadMessage("score request: expected a text of at least one token")
    return tokens


async def read_prompt(api: EngineApi, model: str, prompt: Mapping[str, Any]) -> tuple[int, ...]:
    """The tokens of the prompt of a chat or a completion. Raises as EngineApi.post."""
    text = prompt.get("prompt")
    if isinstance(text, list | tuple):
        return tuple(text)
    if isinstance(text, str):
        return await tokenize(api, model, text, special=True)
    if prompt.keys() <= _TOKENIZER_MEMBERS:
        try:
            return _found(read_tokens(await api.post("/tokenize", {"add_generation_prompt": True, **prompt, "model": model})))
        except (NoSuchRoute, BadMessage):  # an older engine, which tokenizes texts only
            pass
    return await _ask_chat(api, model, prompt)


async def read_completion(api: EngineApi, model: str, completion: tuple[int, ...] | str) -> tuple[int, ...]:
    """The tokens of an answer. Raises as EngineApi.post."""
    return await tokenize(api, model, completion, special=False) if isinstance(completion, str) else completion


async def _ask_chat(api: EngineApi, model: str, prompt: Mapping[str, Any]) -> tuple[int, ...]:
    """Lets the engine chat for one token, and say which tokens it read."""
    body = {**prompt, "model": model, "max_tokens": 1, "return_token_ids": True, "return_prompt_token_ids": True}
    document = await api.post(CHAT, body)
    if isinstance(document.get("prompt_token_ids"), list):
        return _found(read_tokens(document, "prompt_token_ids"))
    choices = find_list(document, "choices")
    return _found(read_tokens(choices[0] if choices and isinstance(choices[0], dict) else {}, "prompt_token_ids"))


def _found(tokens: tuple[int, ...]) -> tuple[int, ...]:
    if not tokens:
        raise NoSuchRoute
    return tokens
