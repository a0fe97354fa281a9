"""The key of an engine's API: from the settings, or from a file that another program renews, in the header that the API wants."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from tallystick.protocol.errors import Code, Fault, Unavailable

AUTHORIZATION = "authorization"
"""The header of most APIs, which takes the key as a bearer token. Every other header takes the bare key."""


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key that is never printed. `file` is read for every request, so that a token that expires can be renewed in it."""

    value: str | None = field(default=None, repr=False)
    file: Path | None = None
    header: str = AUTHORIZATION

    def read(self) -> str | None:
        """The key now; None if there is none. Raises Unavailable if its file cannot be read or is empty."""
        if self.file is None:
            return self.value
        try:
            key = self.file.read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise Unavailable(
                Code.ENGINE_UNAVAILABLE, f"the engine's API key cannot be read: {type(error).__name__}", fault=Fault.PROVIDER
            ) from None
        if not key:
            raise Unavailable(Code.ENGINE_UNAVAILABLE, "the engine's API key cannot be read: empty file", fault=Fault.PROVIDER)
        return key


Key = ApiKey | str | None
"""A key as callers have it: one that may change, one from the settings, or none."""


def auth_headers(key: Key) -> dict[str, str]:
    """The header that carries a key; none without a key. Raises Unavailable if the key cannot be read."""
    source = key if isinstance(key, ApiKey) else ApiKey(key)
    secret = source.read()
    if not secret:
        return {}
    return {source.header: f"Bearer {secret}" if source.header == AUTHORIZATION else secret}
