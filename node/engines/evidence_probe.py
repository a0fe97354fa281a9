"""Finds out how an engine gives log-probabilities, from the answers to the smallest requests."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any

from node.domain.logprob_request import TOKEN_ID_FLAG, EvidenceSupport, TokenIds
from node.domain.published_asks import Offer
from node.domain.requests import prepare
from node.engines.logprobs import UnreadableLogprobs, read_reports
from node.ports import Engine
from tallystick.protocol.errors import Unavailable
from tallystick.protocol.openai_wire import choices_of, read_completion
from tallystick.protocol.plaintext_heads import RequestHead
from tallystick.protocol.routes import CHAT, COMPLETIONS
from tallystick.protocol.token_evidence import TOP, unpack_evidence
from tallystick.protocol.wire import dumps

STREAM = "stream"
"""Stands for a streamed chat beside the routes."""
Check = Callable[[str, bytes], bool | None]
Ask = Callable[..., Awaitable[bool | None]]
"""Sends a request to a route, with a check of the answer and the members of the request."""


@dataclass(slots=True)
class EvidenceProbe:
    """What is known so far of one model."""

    _ids: dict[str, TokenIds] = field(default_factory=dict)
    _has_null: dict[str, bool] = field(default_factory=dict)

    def note_plain(self, where: str, document: dict[str, Any]) -> None:
        """Notes whether an answer without log-probabilities has a member for them. `where`: a route, or STREAM."""
        for choice in choices_of(document):
            if "logprobs" in choice or choice.get("delta") or choice.get("message") or choice.get("text"):
                self._has_null[where] = self._has_null.get(where, False) or "logprobs" in choice

    def noting(self, where: str, check: Check, documents: Callable[[bytes], Iterable[bytes]]) -> Check:
        """The check, which also notes what the answer's documents look like."""

        def noted(kind: str, body: bytes) -> bool | None:
            accepted = check(kind, body)
            if accepted:
                for data in documents(body):
                    self.note_plain(where, read_completion(data).members)
            return accepted

        return noted

    async def try_chat(self, ask: Ask, minimal: dict[str, Any]) -> bool | None:
        """Tries chats. Returns whether they give log-probabilities at all; None if that is not known."""
        return await self._try(CHAT, ask, minimal, {"logprobs": True, "top_logprobs": TOP})

    async def try_completions(self, ask: Ask) -> None:
        """Tries completions."""
        await self._try(COMPLETIONS, ask, {"prompt": "Hi", "max_tokens": 1}, {"logprobs": TOP})

    async def _try(self, path: str, ask: Ask, minimal: dict[str, Any], asked: dict[str, Any]) -> bool | None:
        given = await ask(path, self._reads(path, TokenIds.MEMBER), **minimal, **asked)
        if given and path not in self._ids:
            await ask(path, self._reads(path, TokenIds.TEXT), **minimal, **asked, **{TOKEN_ID_FLAG: True})
        return given

    def _reads(self, path: str, ids: TokenIds) -> Check:
        def check(_kind: str, body: bytes) -> bool | None:
            values = [choice["logprobs"] for choice in choices_of(read_completion(body).members) if choice.get("logprobs")]
            try:
                reports = [report for value in values for report in read_reports(value)]
            except UnreadableLogprobs:
                reports = []
            if reports and all(len(report.logprobs) > 1 for report in reports):
                self._ids[path] = ids
            return bool(values) or None

        return check

    def support(self) -> EvidenceSupport | None:
        """How the engine gives log-probabilities with the ids of tokens; None if it does not."""
        chat, completions = self._ids.get(CHAT), self._ids.get(COMPLETIONS)
        if chat is None and completions is None:
            return None
        nulls = (self._has_null.get(where, False) for where in (CHAT, STREAM, COMPLETIONS))
        return EvidenceSupport(chat, completions, *nulls)


async def gives_evidence(engine: Engine, offer: Offer) -> bool:
    """Whether the answer to a small chat has rows, whichever way the engine names ids. Sends up to four requests."""
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
    for ids in TokenIds:
        asked = replace(offer, evidence=EvidenceSupport(ids, None))
        request = prepare(RequestHead(CHAT), dumps(body), asked, 1)
        try:
            async with aclosing(engine.answer(request)) as events:
                async for _ in events:
                    pass
        except Unavailable:
            return False
        if any(len(row.top) > 1 for row in unpack_evidence(request.rows.commit(None, truncated=True).packed)):
            return True
    return False
