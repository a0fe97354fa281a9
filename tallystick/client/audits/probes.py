"""Probes of a coordinator: which provider is asked next, and with what. Pure.

A probe is a made-up request in the shape of the market's traffic, which the match log tells in buckets of tokens. Newcomers come
first: the provider with the fewest audits, among equals one that is idle, else one that a draw decides.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from tallystick.client.audits.planning import Random, draw
from tallystick.protocol.errors import BadMessage
from tallystick.protocol.json_members import read_count
from tallystick.protocol.link import read_ask
from tallystick.protocol.log_facts import RequestFacts
from tallystick.protocol.match_log import MatchLeaf
from tallystick.protocol.routes import CHAT, serves
from tallystick.protocol.types import Address

ANY_SHARE: Final = 0.25
"""The share of probes that any provider may get, so that none is safe after its first audits."""
CHARACTERS_PER_TOKEN: Final = 4
MAX_INPUT_TOKENS: Final = 4_000
MIN_OUTPUT_TOKENS: Final = 64
MAX_OUTPUT_TOKENS: Final = 512
"""An audit needs some tokens, and a probe costs its coordinator no more than these."""
_DEFAULT_SHAPE: Final = RequestFacts(120, 200)
_TEMPERATURES: Final = (None, None, 0.0, 0.3, 0.7, 1.0)


@dataclass(frozen=True, slots=True)
class ProbeTarget:
    """An ask that can be probed. `audits`: those behind its integrity; `free`: its free slots."""

    provider: Address
    model: str
    audits: int
    free: int


def read_targets(listed: Iterable[Mapping[str, Any]]) -> list[ProbeTarget]:
    """The asks of POST /v1/explain that can be probed now: for chats, and with a free slot. Malformed ones are left out."""
    targets: list[ProbeTarget] = []
    for entry in listed:
        try:
            ask, free = read_ask(entry.get("ask")).message, read_count(entry.get("free", 0), "free")
            audits = read_count(entry.get("audits", 0), "audits")
        except BadMessage:
            continue
        if free and serves(ask.spec.features, CHAT):
            targets.append(ProbeTarget(ask.provider, ask.model, audits, free))
    return targets


def choose_target(targets: Sequence[ProbeTarget], random: Random) -> ProbeTarget | None:
    """Which ask is probed next; None without any."""
    if not targets:
        return None
    if draw(random) >= ANY_SHARE:
        fewest = min(target.audits for target in targets)
        targets = [target for target in targets if target.audits == fewest]
        most = max(target.free for target in targets)
        targets = [target for target in targets if target.free == most]
    return targets[int(draw(random) * len(targets))]


def shape_of_traffic(model: str, leaves: Sequence[MatchLeaf], random: Random) -> dict[str, Any]:
    """A chat request with the size of one that the log has, preferably of this model. Its text is filler: only lengths count."""
    similar = [leaf.request for leaf in leaves if leaf.model == model] or [leaf.request for leaf in leaves] or [_DEFAULT_SHAPE]
    facts = similar[int(draw(random) * len(similar))]
    tokens = min(max(facts.input_tokens, 1), MAX_INPUT_TOKENS)
    output = min(max(facts.output_tokens, MIN_OUTPUT_TOKENS), MAX_OUTPUT_TOKENS)
    messages = [{"role": "user", "content": "x" * (tokens * CHARACTERS_PER_TOKEN)}]
    if draw(random) < 0.5:
        messages.insert(0, {"role": "system", "content": "x" * 60})
    body: dict[str, Any] = {"model": model, "messages": messages, "max_tokens": output, "stream": draw(random) < 0.5}
    temperature = _TEMPERATURES[int(draw(random) * len(_TEMPERATURES))]
    return body if temperature is None else body | {"temperature": temperature}
