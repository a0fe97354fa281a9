"""What the user answered when asked whether audits may show prompts to other providers: a small file beside the ledger."""

from __future__ import annotations

from pathlib import Path

from tallystick.protocol.errors import BadMessage
from tallystick.protocol.wire import dumps, loads
from tallystick.runtime.keystore import write_private

QUESTION = (
    "Answers can be checked by audits: another provider of the same model reads the prompt and the answer, sealed and paid like "
    "any job. It would see them, as the provider that answered does. Without your word, only made-up requests are shown, and "
    "your own engine checks the real ones if you name one. May audits show your prompts to other providers?"
)
"""Says who would see what."""


def read_answer(path: Path) -> bool | None:
    """What the user answered; None if the user was never asked. Raises BadMessage for a damaged file."""
    try:
        raw = loads(path.read_bytes(), str(path))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise BadMessage(f"{path}: {error.strerror}") from None
    if not isinstance(raw, dict) or not isinstance(raw.get("sharePrompts"), bool):
        raise BadMessage(f"{path}: expected an object with sharePrompts: true or false")
    return bool(raw["sharePrompts"])


def write_answer(path: Path, *, share: bool, now: int) -> None:
    """Stores the user's answer. Raises OSError."""
    write_private(path, dumps({"sharePrompts": share, "answeredAt": now}))
