"""Saved conversations of `tally chat`: one private file (mode 0600) each, in the home folder."""

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
    """The messages, their model, and the cost so far: `cost` in base units, tokens as billed."""

    model: str
    messages: list[dict[str, str]] = field(default_factory=list)
    id: str = field(default_factory=lambda: f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}")
    answers: int = 0
    cost: int = 0
    input_tokens: int = 0
    output_tokens: int = 0

    @property
    def system(self) -> str:
        """The system prompt; empty if there is none."""
        return self.messages[0]["content"] if self.messages and self.messages[0]["role"] == "system" else ""

    @system.setter
    def system(self, text: str) -> None:
        rest = self.messages[1:] if self.system else self.messages
        self.messages = ([{"role": "system", "content": text}] if text else []) + rest

    @property
    def title(self) -> str:
        """The first question, in one line of at most 60 characters."""
        first = next((message["content"] for message in self.messages if message["role"] == "user"), "")
        return " ".join(first.split())[:60]

    def add_cost(self, cost: Amount, input_tokens: int, output_tokens: int) -> None:
        """Adds the cost of an answer, which may be partial."""
        self.answers += 1
        self.cost += int(cost)
        self.input_tokens += input_tokens
        self.output_tokens += output_tokens

    def save(self) -> None:
        """Writes the file atomically."""
        write_private(folder() / f"{self.id}.json", json.dumps(asdict(self), ensure_ascii=False).encode())

    @classmethod
    def load(cls, name: str) -> Self:
        """Reads the conversation with this id, or the newest for "last". Raises BadMessage."""
        if name == LAST:
            name = next(iter(_names()), LAST)
        path = folder() / f"{name}.json"
        if not _ID.fullmatch(name) or not path.exists():
            raise BadMessage(f"--resume: no saved conversation {name[:40]!r}; see: tally chat --list")
        try:
            return cls._read(path)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise BadMessage(f"{path}: not a conversation ({error}); remove the file to list the others") from None

    @classmethod
    def _read(cls, path: Path) -> Self:
        raw = json.loads(path.read_bytes())
        known = {member.name: raw[member.name] for member in fields(cls)}
        messages = [{"role": str(message["role"]), "content": str(message["content"])} for message in known["messages"]]
        if any(message["role"] not in _ROLES for message in messages):
            raise ValueError("unknown role")
        numbers = {name: int(known[name]) for name in ("answers", "cost", "input_tokens", "output_tokens")}
        return cls(**known | numbers | {"model": str(known["model"]), "messages": messages, "id": path.stem})


def folder() -> Path:
    """The folder of the saved conversations."""
    return home() / "chats"


def newest(limit: int) -> list[Conversation]:
    """The latest conversations, newest first. Raises BadMessage for a damaged one."""
    return [Conversation.load(name) for name in _names()[:limit]]


def complete_ids(incomplete: str) -> list[str]:
    """Shell completion: values for `--resume` that begin with `incomplete`."""
    return [name for name in (LAST, *_names()) if name.startswith(incomplete)]


def _names() -> list[str]:
    """Ids, newest first: an id begins with its time."""
    return sorted((path.stem for path in folder().glob("*.json") if _ID.fullmatch(path.stem)), reverse=True)
