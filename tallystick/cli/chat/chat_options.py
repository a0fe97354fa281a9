"""How a chat is asked and shown: what `tally chat` and its session share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class ChatOptions:
    """How to ask and how to show the answers."""

    options: dict[str, Any]
    """OpenAI's: max_tokens, temperature."""
    save: Path | None
    plain: bool
    as_json: bool
    keep: bool
    """Whether what is said is kept in the home folder."""
