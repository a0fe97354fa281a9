"""Texts of the user's own choice for made-up requests: no provider knows them, so it cannot recognise such a request."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from tallystick.protocol.errors import BadMessage

MAX_BYTES: Final = 16 << 20
MIN_PARAGRAPHS: Final = 20
"""Fewer would be recognised after a few requests."""


async def load_texts(path: Path | None) -> Sequence[str]:
    """The paragraphs of the file of `[audits] texts`; none without a file. Raises BadMessage for a file that is no such text."""
    return () if path is None else await asyncio.to_thread(_read, path)


def _read(path: Path) -> Sequence[str]:
    field = f"config: audits.texts: {path}"
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise BadMessage(f"{field}: {error.strerror}") from None
    if len(data) > MAX_BYTES:
        raise BadMessage(f"{field}: expected at most {MAX_BYTES} bytes")
    try:
        blocks = data.decode().replace("\r\n", "\n").split("\n\n")
    except UnicodeDecodeError:
        raise BadMessage(f"{field}: expected UTF-8 text") from None
    paragraphs = tuple(text for block in blocks if (text := " ".join(block.split())))
    if len(paragraphs) < MIN_PARAGRAPHS:
        raise BadMessage(f"{field}: expected at least {MIN_PARAGRAPHS} paragraphs, parted by empty lines, got {len(paragraphs)}")
    return paragraphs
