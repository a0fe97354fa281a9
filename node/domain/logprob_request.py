"""Adds log-probabilities to what the node asks its engine, so that the answer can be audited. Pure.

Each chat and completion asks for the five best of each token, whoever ordered it, so nothing tells which answer will be audited.
`node.engines.logprobs` takes out of the answer what was added here. Nothing is added to a request that would not give rows of one
answer: for several choices, for an echo of the prompt, or for probabilities in another form. Sources: OpenAI's API reference, and
vLLM's and llama.cpp's extensions of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from tallystick.protocol.lenient_json import dump_lenient
from tallystick.protocol.openai_wire import count_choices
from tallystick.protocol.routes import CHAT
from tallystick.protocol.token_evidence import TOP

TOKEN_ID_FLAG = "return_tokens_as_token_ids"  # noqa: S105 - no password
"""vLLM's member that puts "token_id:N" in the place of a token's text."""
_OTHER_FORMS = ("echo", "post_sampling_probs")
"""Members that make log-probabilities of something else than the answer, or probabilities after sampling."""


class TokenIds(str, Enum):
    """How an engine names the ids of tokens: in members of their own, or in the text on request (TOKEN_ID_FLAG)."""

    MEMBER = "member"
    TEXT = "text"


@dataclass(frozen=True, slots=True)
class EvidenceSupport:
    """What a probe found of an engine's log-probabilities.

    `chat`, `completions`: how the route names the ids of tokens; None if it gives none. `null_in_...`: whether an answer without
    log-probabilities has a member `logprobs` that is null, on chats, on their streams, and on completions.
    """

    chat: TokenIds | None
    completions: TokenIds | None
    null_in_chat: bool = False
    null_in_stream: bool = False
    null_in_completions: bool = False


@dataclass(frozen=True, slots=True)
class LogprobRequest:
    """What was added to one request. Its body without the addition is the first `shared` bytes, followed by `plain_end`.

    `strip`: the caller asked for no log-probabilities; `null`: what the engine writes then. `top`: the number of tokens that the
    caller asked for, to which the answer is cut; None: the answer stays as it is.
    """

    shared: int
    plain_end: bytes
    strip: bool = False
    null: bool = False
    top: int | None = None

    @property
    def adds(self) -> bool:
        """Whether the engine is asked for anything that the caller did not ask for."""
        return self.strip or self.top is not None


def add_logprobs(
    path: str, members: Mapping[str, Any], support: EvidenceSupport | None, *, stream: bool
) -> tuple[bytes, LogprobRequest | None]:
    """The body of a chat or completion request for an engine, and what was added to it; None if its answer gives no rows."""
    ids = None if support is None else support.chat if path == CHAT else support.completions
    if support is None or ids is None or count_choices(path, members) > 1 or any(members.get(name) for name in _OTHER_FORMS):
        return dump_lenient(members), None
    addition = _addition(path, members, ids)
    if addition is None:
        body = dump_lenient(members)
        return body, LogprobRequest(len(body), b"") if _asks(members) else None
    replaced = {name: members[name] for name in addition if name in members}
    shared = dump_lenient({name: value for name, value in members.items() if name not in addition})[:-1]
    null = support.null_in_completions if path != CHAT else support.null_in_stream if stream else support.null_in_chat
    top = members["top_logprobs" if path == CHAT else "logprobs"] if _asks(members) else None
    request = LogprobRequest(len(shared), _ending(replaced), strip=top is None, null=null, top=top)
    return shared + _ending(addition), request


def _ending(members: Mapping[str, Any]) -> bytes:
    """Members as the last ones of an object that has others before."""
    return b"," + dump_lenient(members)[1:] if members else b"}"


def _asks(members: Mapping[str, Any]) -> bool:
    """Whether the caller asked for log-probabilities. `n_probs` is llama.cpp's."""
    values = (members.get(name) for name in ("logprobs", "top_logprobs", "n_probs"))
    return any(value is not None and value is not False for value in values)


def _addition(path: str, members: Mapping[str, Any], ids: TokenIds) -> dict[str, Any] | None:
    """The members to add; None if the request has to stay as it is.

    A caller's own request for fewer tokens is raised if the answer can be cut back to them. That takes ids in members of their
    own, since callers want the texts.
    """
    wanted: dict[str, Any] = {"logprobs": True, "top_logprobs": TOP} if path == CHAT else {"logprobs": TOP}
    if not _asks(members):
        return wanted | ({TOKEN_ID_FLAG: True} if ids is TokenIds.TEXT else {})
    number = members.get("top_logprobs") if path == CHAT else members.get("logprobs")
    is_fewer = isinstance(number, int) and not isinstance(number, bool) and 0 < number < TOP
    is_usual = members.get("logprobs") is True if path == CHAT else True
    return wanted if is_fewer and is_usual and ids is TokenIds.MEMBER and not members.get("n_probs") else None
