"""Token counts in the answers of engines: the places where engines report usage, and the names that they use. Pure.

Sources: OpenAI's, Anthropic's, DeepSeek's, Moonshot's, Groq's, Cohere's and Gemini's API references; llama.cpp's server README.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

_INPUT: Final = ("prompt_tokens", "input_tokens", "prompt_eval_count", "promptTokenCount", "inputTokens")
_OUTPUT: Final = ("completion_tokens", "output_tokens", "eval_count", "candidatesTokenCount", "outputTokens")
_TOTAL: Final = ("total_tokens", "totalTokenCount", "totalTokens")
_CACHED: Final = ("prompt_cache_hit_tokens", "cached_tokens", "num_cached_tokens", "cachedContentTokenCount")
_OTHER_PLACES: Final = frozenset({"response", "message", "x_groq", "data", "meta", "usageMetadata", "eval_count", "timings"})
"""Members of a document, beside `usage` and `choices`, that may hold usage."""
_DIGITS = re.compile(r"[0-9]{1,12}")


class _NoCount(Exception):
    """A member that should be a count is something else."""


@dataclass(frozen=True, slots=True)
class ReportedUsage:
    """Token counts as an engine reported them: not yet checked against anything. None for a count that it did not report."""

    input: int | None
    cached: int
    output: int | None

    @property
    def is_empty(self) -> bool:
        """Whether no count is above zero. Some engines send zeros instead of counting."""
        return not (self.input or self.cached or self.output)

    def updated(self, later: ReportedUsage | None) -> ReportedUsage:
        """This report with the counts of a later one of the same answer. A zero or missing count replaces none."""
        if later is None:
            return self
        return ReportedUsage(
            later.input or _first(self.input, later.input),
            later.cached or self.cached,
            later.output or _first(self.output, later.output),
        )


def find_usage(document: Mapping[str, Any]) -> ReportedUsage | None:
    """The usage in a document of an answer, in whichever of its places it stands; None if there is none that is valid."""
    if _has_no_place(document):
        return None
    found: ReportedUsage | None = None
    for usage in _places(document):
        reported = read_usage(usage)
        if reported is not None and not reported.is_empty:
            return reported
        found = found or reported
    return found or _read_timings(document.get("timings"))


def _has_no_place(document: Mapping[str, Any]) -> bool:
    """Whether none of the places holds anything, as in most events of a stream."""
    if document.get("usage") is not None or not _OTHER_PLACES.isdisjoint(document):
        return False
    choices = document.get("choices")
    for choice in choices if isinstance(choices, list) else ():
        if isinstance(choice, dict):
            delta = choice.get("delta")
            if choice.get("usage") is not None or (isinstance(delta, dict) and "usage" in delta):
                return False
    return True


def _places(document: Mapping[str, Any]) -> Iterator[object]:
    """OpenAI and most others; Responses; Anthropic's message_start; Groq; Moonshot; Cohere; Gemini; Ollama."""
    yield document.get("usage")
    for name in ("response", "message", "x_groq", "data"):
        holder = document.get(name)
        if isinstance(holder, dict):
            yield holder.get("usage")
    choices = document.get("choices")
    for choice in choices if isinstance(choices, list) else ():
        if isinstance(choice, dict):
            yield choice.get("usage")
            delta = choice.get("delta")
            yield delta.get("usage") if isinstance(delta, dict) else None
    meta = document.get("meta")
    if isinstance(meta, dict):
        yield meta.get("tokens")
    yield document.get("usageMetadata")
    if "eval_count" in document:
        yield document


def read_usage(usage: object) -> ReportedUsage | None:
    """Reads a usage object. None if it is missing or empty, or if a count is no whole number.

    A total without other counts (embeddings, ranks) is all input. Output that the total has beyond the input and the stated
    output is reasoning that the engine left out of its count. Anthropic counts input from and to a cache apart from other input.
    """
    if not isinstance(usage, dict):
        return None
    usage = next((usage[name] for name in ("tokens", "billed_units") if isinstance(usage.get(name), dict)), usage)
    try:
        return _read_counts(usage)
    except _NoCount:
        return None


def _read_counts(usage: dict[str, Any]) -> ReportedUsage | None:
    given, output, total = _count_of(usage, _INPUT), _count_of(usage, _OUTPUT), _count_of(usage, _TOTAL)
    if given is None and output is None and total is None:
        return None
    cached = _count_of(usage, _CACHED) or _read_details(usage)
    if "input_tokens" in usage or given is None:
        read, written = (_count_of(usage, (f"cache_{kind}_input_tokens",)) or 0 for kind in ("read", "creation"))
        if given is not None and (total is None or total >= given + (output or 0) + read + written):
            given += read + written
        cached = cached or read
    stated = output is not None or any(name in usage for name in _OUTPUT)
    if given is None:
        if output is None:
            return ReportedUsage(None, cached, None) if stated else ReportedUsage(total, cached, 0)
        return ReportedUsage(None if total is None else max(total - output, 0), cached, output)
    if total is not None and total > given + (output or 0):
        output = total - given
    elif output is None and total is not None and not stated:
        output = 0
    return ReportedUsage(given, cached, output)


def _read_details(usage: dict[str, Any]) -> int:
    for name in ("prompt_tokens_details", "input_tokens_details"):
        details = usage.get(name)
        if isinstance(details, dict) and (cached := _count_of(details, ("cached_tokens",))):
            return cached
    return _count_of(usage, ("cache_read_input_tokens",)) or 0


def _read_timings(timings: object) -> ReportedUsage | None:
    """llama.cpp's own counts, which stand in every last event: prompt tokens processed, taken from its cache, and generated."""
    if not isinstance(timings, dict) or "predicted_n" not in timings:
        return None
    try:
        processed, cached, output = (_count_of(timings, (name,)) for name in ("prompt_n", "cache_n", "predicted_n"))
    except _NoCount:
        return None
    return ReportedUsage(None if processed is None else processed + (cached or 0), cached or 0, output)


def _count_of(members: Mapping[str, Any], names: tuple[str, ...]) -> int | None:
    """The first count among these members; None if all are absent or null. Raises _NoCount."""
    value = None
    for name in names:
        value = members.get(name)
        if value is not None:
            break
    if value is None or (type(value) is int and value >= 0):
        return value
    if (isinstance(value, float) and value.is_integer()) or (isinstance(value, str) and _DIGITS.fullmatch(value)):
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise _NoCount
    return value


def _first(earlier: int | None, later: int | None) -> int | None:
    return later if earlier is None else earlier
