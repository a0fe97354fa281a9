"""What a request needs of the provider that answers it, as far as its JSON shows. Pure.

Features: tools, a JSON schema, log-probabilities, images, audio, video, files, embeddings. Size: the fewest tokens that its text
can be, by which a request is refused that no context holds, and the tokens that it is likely to be, by which a larger context is
preferred.
Sources: the API references of OpenAI (chat, completions, responses, embeddings) and Anthropic (messages); vLLM's, SGLang's and
llama.cpp's extensions of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from tallystick.protocol.features import (
    AUDIO_INPUT,
    AUDIO_OUTPUT,
    EMBEDDINGS_FEATURE,
    FILES,
    JSON_SCHEMA,
    LOGPROBS,
    TOOLS,
    VIDEO,
    VISION,
)
from tallystick.protocol.openai_wire import OUTPUT_LIMITS
from tallystick.protocol.routes import COMPLETIONS, EMBEDDINGS

MAX_BYTES_PER_TOKEN: Final = 16
"""Bytes of text, without white space, that a token has at most in any prompt that people send."""
MAX_WORDS_PER_TOKEN: Final = 2
"""Words that a token has at most, on average. Most tokenizers never join words; the few that do join less than this."""
LIKELY_BYTES_PER_TOKEN: Final = 4
LIKELY_MEDIA_TOKENS: Final = 800
"""Tokens that an image or a recording is likely to be."""
_MAX_DEPTH = 12
_SMALLEST_STEP = 256

_PARTS: Mapping[str, str] = {
    "image_url": VISION,
    "input_image": VISION,
    "image": VISION,
    "image_pil": VISION,
    "image_embeds": VISION,
    "computer_screenshot": VISION,
    "input_audio": AUDIO_INPUT,
    "audio_url": AUDIO_INPUT,
    "audio": AUDIO_INPUT,
    "video_url": VIDEO,
    "input_video": VIDEO,
    "video": VIDEO,
    "file": FILES,
    "input_file": FILES,
    "document": FILES,
}
"""The feature that a content part needs, by its type."""
_UNTYPED = ("image_url", "input_audio", "audio_url", "video_url")
"""Members by which a part without a type is recognised."""
_TOOL_PARTS = frozenset({"tool_use", "tool_result", "function_call", "function_call_output", "custom_tool_call"})
_PROMPTS = ("messages", "input", "prompt", "system", "instructions")
"""Members that hold the text of the request."""
_TEXTS = ("text", "content", "input_text", "output", "arguments", "refusal", "thinking", "reasoning_content")
"""Members of messages and parts that hold text, or parts with text."""
_TRUNCATING = ("truncate_prompt_tokens", "truncate", "truncation", "transforms")
"""Members of vLLM, TEI and NIM, OpenAI's responses, and OpenRouter that ask for a shorter prompt instead of an error."""
_GRAMMARS = ("guided_json", "json_schema", "structured_outputs")
"""Members of vLLM, llama.cpp and SGLang that have a JSON schema."""
_FEATURE_MEMBERS = frozenset(
    {
        *("tools", "functions", "modalities", "logprobs", "top_logprobs", "include"),
        *("text", "output_config", "response_format", "output_format", *_GRAMMARS),
    }
)
"""Members of a request that may use a feature; few requests have one of them."""
_MARKS = bytes(ord(" ") if chr(byte).isspace() else ord("x") for byte in range(128)) + b"x" * 128
"""Translates ASCII text to a space for each character that `str.split` splits at, and "x" for each other."""


@dataclass(frozen=True, slots=True)
class RequestNeeds:
    """What a request needs. `essential`: those of its features without which an engine refuses it for certain, as far as their
    declarations go. `least_tokens`: the fewest input tokens of its longest sequence, 0 if unknown; `likely_tokens`: those that
    it is likely to have.
    """

    features: tuple[str, ...] = ()
    essential: tuple[str, ...] = ()
    least_tokens: int = 0
    likely_tokens: int = 0


NO_NEEDS: Final = RequestNeeds()


def derive_needs(path: str, request: Mapping[str, Any]) -> RequestNeeds:
    """Reads the needs of a JSON request. Members of unexpected types need nothing: the engine judges them."""
    parts: Parts = []
    for name in _PROMPTS:
        if isinstance(prompt := request.get(name), list | dict):
            _collect_objects(prompt, _MAX_DEPTH, parts)
    kinds = [_kind(part) for part in parts]
    media = [_PARTS[kind] for kind in kinds if kind in _PARTS]
    features = set(media)
    if path == EMBEDDINGS:
        features.add(EMBEDDINGS_FEATURE)
    if not request.keys().isdisjoint(_FEATURE_MEMBERS):
        features.update(feature for feature, uses in _USES.items() if uses(request))
    if any(map(_is_of_tools, kinds, parts)):
        features.add(TOOLS)
    least, likely = _measure(path, request, len(media))
    if not features:
        return RequestNeeds((), (), least, likely)
    used = tuple(sorted(features))
    return RequestNeeds(used, tuple(f for f in used if not _is_soft(f, path, request)), least, likely)


def _measure(path: str, request: Mapping[str, Any], media: int) -> tuple[int, int]:
    """The fewest tokens of a request, and those that it is likely to have; 0 if unknown. `media`: its images and recordings."""
    if (path not in OUTPUT_LIMITS and path != EMBEDDINGS) or _truncates(request):
        return 0, 0
    least = likely = 0
    for sequence in _sequences(path, request):
        length = _length_of(sequence)
        least, likely = max(least, length[0]), max(likely, length[1])
    return least, max(least, likely + media * LIKELY_MEDIA_TOKENS + _likely_tools(request))


def round_up(tokens: int) -> int:
    """The next of four steps an octave, from 256 on: few enough values that equal demands can share a shortlist."""
    step = _step(tokens)
    return -(-tokens // step) * step


def round_down(tokens: int) -> int:
    """The step of `round_up` at or below a number; 0 below 256."""
    return 0 if tokens < _SMALLEST_STEP else tokens // _step(tokens) * _step(tokens)


def bucket(tokens: int) -> int:
    """The power of two at or above a number: what a coordinator gets to know of a request's size. 0 for 0."""
    return 1 << (tokens - 1).bit_length() if tokens > 0 else 0


def _step(tokens: int) -> int:
    return _SMALLEST_STEP if tokens < _SMALLEST_STEP else 1 << max(tokens.bit_length() - 3, 0)


def _truncates(request: Mapping[str, Any]) -> bool:
    """Whether the engine is asked to shorten a prompt that is too long."""
    for name in _TRUNCATING:
        value = request.get(name)
        if value and str(value).lower() not in ("disabled", "none", "false"):
            return True
    return False


# Features


def _kind(part: Mapping[str, Any]) -> str:
    kind = part.get("type")
    if isinstance(kind, str):
        return kind
    for name in _UNTYPED:
        if name in part:
            return name
    return ""


def _collect_objects(value: Any, depth: int, into: Parts) -> None:
    """Appends all messages, items and content parts of a prompt, also those inside results of tools."""
    if not depth:
        return
    if isinstance(value, list):
        for entry in value:
            if isinstance(entry, list | dict):
                _collect_objects(entry, depth - 1, into)
    elif isinstance(value, dict):
        into.append(value)
        for name in ("content", "output"):
            if isinstance(inner := value.get(name), list | dict):
                _collect_objects(inner, depth - 1, into)


Parts = list[Mapping[str, Any]]


def _defines_tools(request: Mapping[str, Any]) -> bool:
    return any(isinstance(request.get(name), list) and request[name] for name in ("tools", "functions"))


def _is_of_tools(kind: str, part: Mapping[str, Any]) -> bool:
    """Whether a message, an item or a part is a call of a tool, or its result."""
    return kind in _TOOL_PARTS or bool(part.get("tool_calls")) or part.get("role") == "tool"


def _has_schema(request: Mapping[str, Any]) -> bool:
    text, output = request.get("text"), request.get("output_config")
    formats = (
        request.get("response_format"),
        request.get("output_format"),
        text.get("format") if isinstance(text, Mapping) else None,
        output.get("format") if isinstance(output, Mapping) else None,
    )
    return any(isinstance(form, Mapping) and form.get("type") == "json_schema" for form in formats)


def _uses_schema(request: Mapping[str, Any]) -> bool:
    return _has_schema(request) or any(request.get(name) for name in _GRAMMARS)


def _uses_logprobs(request: Mapping[str, Any]) -> bool:
    logprobs, include = request.get("logprobs"), request.get("include")
    counted = isinstance(logprobs, int) and not isinstance(logprobs, bool)  # completions: a number, of which 0 asks too
    included = isinstance(include, list) and any(isinstance(name, str) and name.endswith(".logprobs") for name in include)
    return logprobs is True or counted or bool(request.get("top_logprobs")) or included


def _is_soft(feature: str, path: str, request: Mapping[str, Any]) -> bool:
    """Whether an engine that lacks a feature may still answer: it is declared for another form of request than this one.

    Tools are tested with the model's free choice. Named and required choices take another path in engines (vLLM decodes them by
    a grammar), and results of earlier calls are only text. Log-probabilities are tested in chats, and schemas in response_format.
    """
    if feature == TOOLS:
        choice = request.get("tool_choice")
        kind = choice.get("type") if isinstance(choice, Mapping) else choice
        return not _defines_tools(request) or kind not in (None, "auto")
    if feature == JSON_SCHEMA:
        return not _has_schema(request)
    return feature == LOGPROBS and path == COMPLETIONS


def _uses_audio_output(request: Mapping[str, Any]) -> bool:
    modalities = request.get("modalities")
    return isinstance(modalities, list) and "audio" in modalities


_USES: Mapping[str, Callable[[Mapping[str, Any]], bool]] = {
    TOOLS: _defines_tools,
    JSON_SCHEMA: _uses_schema,
    LOGPROBS: _uses_logprobs,
    AUDIO_OUTPUT: _uses_audio_output,
}
"""Whether a request uses a feature by its _FEATURE_MEMBERS."""


# Length


def _sequences(path: str, request: Mapping[str, Any]) -> list[list[Any]]:
    """The texts, or token ids, of each sequence that the request has an engine read."""
    prompt = request.get("input" if path == EMBEDDINGS else "prompt")
    if isinstance(prompt, list) and prompt and all(isinstance(entry, str | list) for entry in prompt):
        return [[entry] for entry in prompt]
    return [[request.get(name) for name in _PROMPTS]]


def _length_of(sequence: list[Any]) -> tuple[int, int]:
    """The fewest tokens of a sequence, and those that it is likely to have."""
    texts: list[str | int] = []
    for value in sequence:
        if value is not None:
            _collect_texts(value, _MAX_DEPTH, texts)
    size = bare = words = ids = 0
    for text in texts:
        if isinstance(text, int):
            ids += 1
            continue
        encoded = text.encode(errors="replace")
        size += len(encoded)
        if text.isascii():
            marks = encoded.translate(_MARKS)
            bare += len(marks) - marks.count(b" ")
            words += marks.count(b" x") + marks.startswith(b"x")
        else:
            split = text.split()
            words += len(split)
            bare += len("".join(split).encode(errors="replace"))
    least = ids + max(bare // MAX_BYTES_PER_TOKEN, words // MAX_WORDS_PER_TOKEN)
    return least, ids + size // LIKELY_BYTES_PER_TOKEN


def _collect_texts(value: Any, depth: int, into: list[str | int]) -> None:
    """Appends the texts and the token ids in a prompt. Media, which stand beside them as long texts too, are left out."""
    if isinstance(value, str):
        into.append(value)
    elif isinstance(value, int):
        if not isinstance(value, bool):
            into.append(value)
    elif depth and isinstance(value, list):
        for entry in value:
            _collect_texts(entry, depth - 1, into)
    elif depth and isinstance(value, dict):
        for name in _TEXTS:
            inner = value.get(name)
            if isinstance(inner, str):
                into.append(inner)
            elif isinstance(inner, list):
                _collect_texts(inner, depth - 1, into)


def _likely_tools(request: Mapping[str, Any]) -> int:
    """Tokens that the definitions of tools are likely to be."""
    defined = map(request.get, ("tools", "functions"))
    return sum([len(str(tools)) for tools in defined if isinstance(tools, list)]) // LIKELY_BYTES_PER_TOKEN
