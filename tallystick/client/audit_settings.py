"""Settings of audits: whether answers are checked, by whom, for how much, and who may see a prompt because of it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from tallystick.protocol.errors import BadMessage
from tallystick.protocol.precisions import precision_class

_REFEREE_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,31}")
MAX_OPINIONS = 8
MAX_AUDITED_POSITIONS = 255
"""Positions of an answer that one audit looks at."""


MAX_REPORT_DELAY = 86_400
"""Seconds. A coordinator takes reports for days after their jobs."""


def is_below(label: str, labels: Iterable[str]) -> bool:
    """Whether a workload is one of `labels` or below one: "research/papers" is below "research"."""
    return any(label == other or label.startswith(f"{other}/") for other in labels)


@dataclass(frozen=True, kw_only=True)
class AuditSettings:
    """Audits of the answers that this wallet paid for; example.toml explains each setting. Raises BadMessage."""

    enabled: bool = True
    budget_percent: float = 3.0
    share_prompts: bool | None = None
    share_labels: tuple[str, ...] = ()
    private_labels: tuple[str, ...] = ()
    opinions: int = 3
    positions: int = 64
    planted_percent: float = 5.0
    synthetic: bool = True
    report: bool = True
    report_delay: int = 0
    keep_mib: int = 256
    keep_hours: int = 24
    thresholds: Path | None = None
    texts: Path | None = None

    def __post_init__(self) -> None:
        for name, low, high in (("budget_percent", 0, 100), ("planted_percent", 0, 100)):
            if not low <= getattr(self, name) <= high:
                raise BadMessage(f"config: audits.{name}: expected {low} to {high} percent, got {getattr(self, name)}")
        for name, least, most in (
            ("opinions", 2, MAX_OPINIONS),
            ("positions", 16, MAX_AUDITED_POSITIONS),
            ("keep_mib", 0, 1 << 20),
            ("keep_hours", 1, 24 * 30),
            ("report_delay", 0, MAX_REPORT_DELAY),
        ):
            if not least <= getattr(self, name) <= most:
                raise BadMessage(f"config: audits.{name}: expected {least} to {most}, got {getattr(self, name)}")

    @property
    def keeps_jobs(self) -> bool:
        """Whether requests and answers are kept for audits."""
        return self.enabled and self.keep_mib > 0


@dataclass(frozen=True, kw_only=True)
class OwnReferee:
    """An engine of the user's own that scores answers: it sees prompts, and nobody else does because of it.

    `model`: the market's name of the model that it has. `served_model`: the engine's own name, if another one. `precision`: the
    class that it has the model in; empty: it judges all. Raises BadMessage.
    """

    name: str
    url: str = field(repr=False)
    model: str
    served_model: str = ""
    precision: str = ""
    key_env: str | None = None
    timeout_seconds: float = 120.0

    def __post_init__(self) -> None:
        if not _REFEREE_NAME.fullmatch(self.name):
            raise BadMessage(f"config: referees: name: expected 1 to 32 of a-z, 0-9 and -, got {self.name!r:.60}")
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.password:
            raise BadMessage(f"config: referees: {self.name}: url: expected an http:// or https:// base URL without a password")
        if not self.model:
            raise BadMessage(f"config: referees: {self.name}: model: expected the name of a model, got nothing")
        if self.timeout_seconds <= 0:
            raise BadMessage(f"config: referees: {self.name}: timeout_seconds: expected more than 0, got {self.timeout_seconds}")

    def serves(self, model: str, precision: str) -> bool:
        """Whether it can judge an answer of this model and precision class."""
        return model == self.model and (not self.precision or precision_class(self.precision) == precision_class(precision))

    def read_key(self) -> str | None:
        """The API key; None if the config names none. Raises BadMessage if its variable is not set."""
        if self.key_env is None:
            return None
        key = os.environ.get(self.key_env, "").strip()
        if not key:
            where = f"config: referees: {self.name}: key_env"
            raise BadMessage(f"{where}: expected the API key in the environment variable {self.key_env}, which is not set")
        return key


def check_referees(referees: Iterable[OwnReferee]) -> None:
    """Raises BadMessage for two referees of one name."""
    names = [referee.name for referee in referees]
    if len(set(names)) != len(names):
        raise BadMessage("config: referees: expected different names, got the same name twice")


@dataclass(frozen=True, slots=True)
class PromptConsent:
    """Whether other providers may see a request because of its audit. `private`: it was marked so, which nothing overrides."""

    may_share: bool = False
    private: bool = False


NO_CONSENT = PromptConsent()
