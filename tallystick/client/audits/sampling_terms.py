"""How a request says that its answer is to be drawn, as far as an audit may rely on it. Pure.

Engines fill in what a request leaves out, and truncate in different orders (vLLM after the temperature, llama.cpp before it). So
a test takes only the temperature at its word, and only if nothing else in the request can change which tokens are drawn.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

_HARMLESS: Final = frozenset(
    {
        *("model", "messages", "prompt", "stream", "stream_options", "max_tokens", "max_completion_tokens", "seed", "user"),
        *("temperature", "top_p", "top_k", "min_p", "metadata", "store", "service_tier", "logprobs", "top_logprobs", "stop"),
        *("safety_identifier", "prompt_cache_key", "cache_prompt"),
    }
)
"""Members of a request that do not change which tokens are drawn, beside the temperature and truncation."""
_NEUTRAL: Final[Mapping[str, tuple[Any, ...]]] = {
    "n": (1,),
    "best_of": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "repeat_penalty": (1,),
    "logit_bias": ({}, []),
    "response_format": ({"type": "text"},),
    "echo": (False,),
    "tools": ([],),
    "tool_choice": ("none",),
}
"""Values with which other members change nothing."""
_NO_TOP_K: Final = (0, -1)
MAX_TEMPERATURE: Final = 10.0


@dataclass(frozen=True, slots=True)
class SamplingTerms:
    """What a request declares. `temperature`: None if it is not declared, or if something else changes what is drawn.

    `untruncated`: whether it declares that any token may be drawn. `independent`: whether two answers to it are drawn anew, as
    far as it says; false with a seed, or if few tokens may be drawn.
    """

    temperature: float | None
    untruncated: bool = False
    independent: bool = False

    @property
    def greedy(self) -> bool:
        """Whether each token is the most probable one."""
        return self.temperature == 0


def read_sampling(request: Mapping[str, Any]) -> SamplingTerms:
    """The declared sampling of a chat or completion."""
    for name, value in request.items():
        if name not in _HARMLESS and value is not None and value not in _NEUTRAL.get(name, ()):
            return SamplingTerms(None)
    temperature = request.get("temperature")
    if isinstance(temperature, bool) or not isinstance(temperature, int | float):
        return SamplingTerms(None)
    if not 0 <= temperature <= MAX_TEMPERATURE:  # false for NaN; an integer of any size compares
        return SamplingTerms(None)
    top_p, top_k, min_p = request.get("top_p"), request.get("top_k"), request.get("min_p")
    untruncated = top_p == 1 and top_k in _NO_TOP_K and min_p == 0
    narrow = not (_above(top_p, 0.8) and (top_k in _NO_TOP_K or _above(top_k, 10)) and (min_p is None or not _above(min_p, 0.1)))
    return SamplingTerms(float(temperature), untruncated, independent=request.get("seed") is None and not narrow)


def _above(value: object, least: float) -> bool:
    return value is None or (isinstance(value, int | float) and value >= least)
