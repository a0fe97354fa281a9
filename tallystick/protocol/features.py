"""The features that asks declare, and that requests need. Pure.

An ask lists what it supports, such as "tools" or "/v1/rerank". A name with a leading "-" declares the contrary: "-vision" says
that the model takes no images, "-/v1/embeddings" that it makes no embeddings. A feature that is declared neither way is unknown,
and unknown is not no: such an ask is offered a request that needs the feature if no other ask declares it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Final

TOOLS: Final = "tools"
JSON_SCHEMA: Final = "json_schema"
LOGPROBS: Final = "logprobs"
VISION: Final = "vision"
AUDIO_INPUT: Final = "audio_input"
AUDIO_OUTPUT: Final = "audio_output"
VIDEO: Final = "video"
FILES: Final = "files"
EMBEDDINGS_FEATURE: Final = "embeddings"
EVIDENCE: Final = "evidence"
"""Receipts commit to log-probabilities of the answer, by which it can be audited (token_evidence.py)."""
BATCH_ONLY: Final = "batch_only"
"""The ask is for jobs of the class `batch` alone, such as one at a discount. Interactive jobs are not offered it."""
MEANINGS: Final = {
    TOOLS: "calls of tools or functions",
    JSON_SCHEMA: "output by a JSON schema",
    LOGPROBS: "log-probabilities",
    VISION: "image input",
    AUDIO_INPUT: "audio input",
    AUDIO_OUTPUT: "audio output",
    VIDEO: "video input",
    FILES: "file input",
    EVIDENCE: "evidence for audits",
    BATCH_ONLY: "a price for batch jobs alone",
}
"""What a feature means, for people."""
_NOT = "-"


def absent(feature: str) -> str:
    """The declaration that an ask does not have a feature."""
    return _NOT + feature


def opposite(declared: str) -> str:
    """The declaration that says the contrary of this one."""
    return declared.removeprefix(_NOT) if declared.startswith(_NOT) else absent(declared)


def denied(features: Collection[str], needed: Iterable[str]) -> tuple[str, ...]:
    """Those of the needed features whose absence is declared. Names are compared without case."""
    declared = {feature.lower() for feature in features}
    return tuple(feature for feature in needed if absent(feature).lower() in declared)
