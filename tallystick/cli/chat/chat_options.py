"""Options of a chat that `tally chat`, its interactive session and its turns share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class ChatOptions:
    """How requests are made and how answers are shown."""

    parameters: dict[str, Any]
    """Members of the OpenAI request: max_tokens, temperature."""
    proof_file: Path | None
    plain: bool
    as_json: bool
    keep_history: bool
    """Whether prompts and answers are kept in the home folder."""
