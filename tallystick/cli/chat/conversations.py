"""Conversations of `tally chat`, kept in the home folder to be taken up again: one private file (0600) each."""

from __future__ import annotations

import json
import re
import secrets
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Self

from tallystick.protocol.errors import BadMessage
from tallystick.protocol.types import Amount
from tallystick.runtime.config import home
from tallystick.runtime.keystore import write_private

LAST = "last"
_ID = re.compile(r"[0-9]{8}-[0-9]{6}-[0-9a-f]{4}")
_ROLES = ("system", "user", "assistant")


@dataclass
class Conversation:
    """What was said, to which model, and what it cost so far: `cost` in base units, tokens as billed."""

    model: str
    messages: list[dict[str, str]] = field(default_factory=list)
    id: str = field(default_factory=lambda: f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}")
    answers: int = 0
    cost: int = 0
    input_tokens: int = 0
    output_tokens: int = 0

    @property
    def system(self) -> str:
        """The system prompt; empty where there is none."""
        return self.messages[0]["content"] if self.messages and self.messages[0]["role"] == "system" else ""

    @system.setter
    def system(self, text: str) -> None:
        rest = self.messages[1:] if self.system else self.messages
        self.messages = ([{"role": "system", "content": text}] if text else []) + rest

    @property
    def title(self) -> str:
        """How it began, in one short line."""
        first = next((message["content"] for message in self.messages if message["role"] == "user"), "")
        return " ".join(first.split())[:60]

    def bill(self, cost: Amount, input_tokens: int, output_tokens: int) -> None:
        """Adds what an answer, or the part of one that came, cost."""
        self.answers += 1
        self.cost += int(cost)
        self.input_tokens += input_tokens
        self.output_tokens += output_tokens

    def save(self) -> None:
        """Writes it down, all of it or nothing."""
        write_private(folder() / f"{self.id}.json", json.dumps(asdict(self), ensure_ascii=False).encode())

    @classmethod
    def load(cls, name: str) -> Self:
        """Takes up the conversation with this id, or the last one. Raises BadMessage."""
        if name == LAST:
            name = next(iter(_names()), LAST)
        path = folder() / f"{name}.json"
        if not _ID.fullmatch(name) or not path.exists():
            raise BadMessage(f"no conversation {name[:40]!r} is kept; see: tally chat --list")
        try:
            return cls._read(path)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise BadMessage(f"{path}: not a conversation: {error}") from None

    @classmethod
    def _read(cls, path: Path) -> Self:
        raw = json.loads(path.read_bytes())
        known = {one.name: raw[one.name] for one in fields(cls)}
        messages = [{"role": str(one["role"]), "content": str(one["content"])} for one in known["messages"]]
        if any(one["role"] not in _ROLES for one in messages):
            raise ValueError("an unknown role")
        numbers = {name: int(known[name]) for name in ("answers", "cost", "input_tokens", "output_tokens")}
        return cls(**known | numbers | {"model": str(known["model"]), "messages": messages, "id": path.stem})


def folder() -> Path:
    """Where conversations are kept."""
    return home() / "chats"


def newest(limit: int) -> list[Conversation]:
    """The last conversations, newest first. Raises BadMessage for one that is damaged."""
    return [Conversation.load(name) for name in _names()[:limit]]


def ids(incomplete: str) -> list[str]:
    """For the shell's completion: what `--resume` takes that begins so."""
    return [name for name in (LAST, *_names()) if name.startswith(incomplete)]


def _names() -> list[str]:
    """Newest first: the time is in the name."""
    return sorted((path.stem for path in folder().glob("*.json") if _ID.fullmatch(path.stem)), reverse=True)
