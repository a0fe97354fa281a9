"""What a model can do, as a probe found it or the config declares it."""

from __future__ import annotations

from dataclasses import dataclass

from node.domain.logprob_request import EvidenceSupport


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a model can do. `streams`: "usage" if streams end with token counts, "yes" if not, "no" if it does not stream.

    `streams` is "unknown" if nothing was generated. `features`: what an ask declares, routes and absences included.
    `output_limit_field`: the member that limits its output. `evidence`: how it gives log-probabilities with the ids of tokens;
    None if it does not, or nothing was generated.
    """

    chat: bool
    completions: bool
    streams: str
    features: tuple[str, ...] = ()
    output_limit_field: str = "max_tokens"
    evidence: EvidenceSupport | None = None
