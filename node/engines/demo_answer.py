"""One answer of the demo engine, whole or as the events of a stream."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import orjson

MODEL = "tally-demo-stand-in"
FINGERPRINT = "stand-in:one-token-per-word"


@dataclass(frozen=True, slots=True)
class DemoAnswer:
    """One answer, which can be rendered whole or as events of a stream.

    `logprobs`: an entry of `logprobs.content` for each word; None if the request does not ask for them.
    """

    number: int
    chat: bool
    words: list[str]
    finish: str
    usage: dict[str, Any] | None
    usage_in_stream: bool
    logprobs: list[dict[str, Any]] | None = None

    def _document(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": f"demo-{self.number}",
            "object": kind,
            "created": 0,
            "model": MODEL,
            "system_fingerprint": FINGERPRINT,
            "choices": choices,
        }

    def whole(self) -> dict[str, Any]:
        """The answer in one document."""
        text = "".join(self.words)
        content = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        logprobs = None if self.logprobs is None else {"content": self.logprobs}
        choice = {"index": 0, **content, "logprobs": logprobs, "finish_reason": self.finish}
        usage = {"usage": self.usage} if self.usage is not None else {}
        return self._document("chat.completion" if self.chat else "text_completion", [choice]) | usage

    def event(self, delta: dict[str, str], finish: str | None = None, position: int | None = None) -> bytes:
        """An event of the stream. `position`: of its word in the answer."""
        content: dict[str, Any] = {"delta": delta} if self.chat else {"text": delta.get("content", "")}
        logprobs = None if self.logprobs is None or position is None else {"content": [self.logprobs[position]]}
        choice = {"index": 0, **content, "logprobs": logprobs, "finish_reason": finish}
        return _event(self._document(self._kind, [choice]) | ({"usage": None} if self.usage_in_stream else {}))

    def usage_event(self) -> bytes:
        """The event with the usage."""
        return _event(self._document(self._kind, []) | {"usage": self.usage})

    @property
    def _kind(self) -> str:
        return "chat.completion.chunk" if self.chat else "text_completion"


def _event(document: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(document) + b"\n\n"
