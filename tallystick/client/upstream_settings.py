"""Settings of upstreams: hosted APIs that aliases name, with the user's own keys, prices and limits."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from tallystick.protocol.errors import BadMessage
from tallystick.protocol.types import Amount

UPSTREAM_SCHEME = "upstream://"
"""What the members of an alias begin with that are models of an upstream."""
_UPSTREAM_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,31}")


@dataclass(frozen=True, kw_only=True)
class UpstreamModel:
    """What one model of an upstream costs, in base units per 1,000,000 tokens, and the most tokens that one request may use.

    `context_tokens`: 0 if unknown. Raises BadMessage.
    """

    name: str
    input_price: Amount | None = None
    cached_input_price: Amount | None = None
    output_price: Amount | None = None
    context_tokens: int = 0
    max_output_tokens: int = 16_384

    def __post_init__(self) -> None:
        if (self.input_price is None) is not (self.output_price is None):
            raise BadMessage(f"config: upstreams: {self.name}: expected both input_price and output_price, or neither")
        if self.context_tokens < 0 or self.max_output_tokens < 1:
            raise BadMessage(f"config: upstreams: {self.name}: expected context_tokens from 0 and max_output_tokens from 1 on")


@dataclass(frozen=True, kw_only=True)
class Upstream:
    """A hosted API that is compatible with OpenAI's, with the user's own key: used only by aliases that name it.

    `url`: its base URL, as OpenAI's SDKs mean it. Raises BadMessage.
    """

    name: str
    url: str = field(repr=False)
    key_env: str | None = None
    key_file: Path | None = None
    models: tuple[UpstreamModel, ...] = ()
    timeout_seconds: float = 600.0
    supports_stream_usage: bool = True

    def __post_init__(self) -> None:
        where = f"config: upstreams: {self.name}"
        if not _UPSTREAM_NAME.fullmatch(self.name):
            raise BadMessage(f"config: upstreams: name: expected 1 to 32 of a-z, 0-9 and -, got {self.name!r:.60}")
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise BadMessage(f"{where}: url: expected an http:// or https:// base URL without a query")
        if parts.username is not None or parts.password is not None:
            raise BadMessage(f"{where}: url: expected no user or password in it; set key_env or key_file")
        if self.key_env is not None and self.key_file is not None:
            raise BadMessage(f"{where}: expected one of key_env and key_file, got both")
        if self.timeout_seconds <= 0:
            raise BadMessage(f"{where}: timeout_seconds: expected more than 0, got {self.timeout_seconds}")
        if len({model.name for model in self.models}) != len(self.models):
            raise BadMessage(f"{where}: models: expected each model once")

    def model(self, name: str) -> UpstreamModel:
        """What is configured for a model; no prices for one that is not listed."""
        return next((model for model in self.models if model.name == name), UpstreamModel(name=name))

    def read_key(self) -> str | None:
        """The API key; None if the config names none. Raises BadMessage if it is not set, or if others can read its file."""
        where = f"config: upstreams: {self.name}"
        if self.key_env is not None:
            key = os.environ.get(self.key_env, "").strip()
            if not key:
                raise BadMessage(f"{where}: expected the API key in the environment variable {self.key_env}, which is not set")
        elif self.key_file is not None:
            key = _read_key_file(self.key_file, where)
        else:
            return None
        if not key.isascii() or not key.isprintable() or " " in key:
            raise BadMessage(f"{where}: expected an API key of printable ASCII characters")
        return key


def _read_key_file(path: Path, where: str) -> str:
    try:
        if path.stat().st_mode & 0o077:
            raise BadMessage(f"{where}: key_file: {path} can be read by others; run: chmod 600 {path}")
        key = path.read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text"
        raise BadMessage(f"{where}: key_file: {path}: {reason}") from None
    if not key:
        raise BadMessage(f"{where}: key_file: {path}: expected an API key, got nothing")
    return key


@dataclass(frozen=True, slots=True)
class UpstreamTarget:
    """A model of an upstream, which the members of an alias name as "upstream://NAME/MODEL"."""

    upstream: str
    model: str

    @classmethod
    def parse(cls, member: str) -> UpstreamTarget | None:
        """The target that an alias's member names; None for a model of the market. Raises BadMessage."""
        if not member.startswith(UPSTREAM_SCHEME):
            return None
        name, _, model = member.removeprefix(UPSTREAM_SCHEME).partition("/")
        if not name or not model:
            raise BadMessage(f"config: aliases: expected {UPSTREAM_SCHEME}NAME/MODEL, got {member!r:.100}")
        return cls(name, model)

    def __str__(self) -> str:
        return f"{UPSTREAM_SCHEME}{self.upstream}/{self.model}"
