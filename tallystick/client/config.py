"""Config of a client: how to reach the market, which deployment to insist on, what to spend at most, how long to wait."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from tallystick.protocol.demand import SORTS
from tallystick.protocol.errors import BadMessage
from tallystick.protocol.requirements import Requirements
from tallystick.protocol.types import Address, Amount
from tallystick.protocol.wire import MAX_CANDIDATES
from tallystick.runtime.config import home, load
from tallystick.runtime.plaintext import is_loopback

MIB = 1024 * 1024
ENV_PREFIX = "TALLY_GATEWAY_"
MAX_LABEL = 64
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/*?#@\s]+")


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The most to spend in a UTC day, in base units: on the workload `label` and those under it ("research/papers" is under
    "research"), or on all. Raises BadMessage.
    """

    per_day: Amount
    label: str | None = None
    warn_percent: int = 80

    def __post_init__(self) -> None:
        if not 0 <= self.warn_percent <= 100:
            raise BadMessage("config: budgets: warn_percent: expected 0 to 100")

    @property
    def name(self) -> str:
        """How it is called where it is told of."""
        return "the day's budget" if self.label is None else f"the day's budget of {self.label!r}"

    def covers(self, label: str) -> bool:
        """Whether it bounds jobs of this workload."""
        return self.label is None or label == self.label or label.startswith(f"{self.label}/")


@dataclass(frozen=True, kw_only=True)
class ApiKey:
    """A key of the gateway's callers, and what jobs asked for with it are held to, beside what the config says.

    Their workload is `label`, or what they name under it. `models`: empty for any; an alias stands for its models. Raises
    BadMessage.
    """

    label: str
    secret: str | None = field(default=None, repr=False)
    secret_env: str | None = None
    models: tuple[str, ...] = ()
    max_cost: Amount | None = None
    max_input_price: Amount | None = None
    max_output_price: Amount | None = None
    min_reputation: int = 0
    min_stake: Amount = Amount(0)
    require: Requirements = field(default_factory=Requirements)

    def __post_init__(self) -> None:
        if not 0 < len(self.label) <= MAX_LABEL:
            raise BadMessage(f"config: keys: label: expected 1 to {MAX_LABEL} characters")
        if (self.secret is None) is (self.secret_env is None):
            raise BadMessage(f"config: keys: {self.label}: give one of secret and secret_env")

    @property
    def value(self) -> str:
        """What callers send; empty where the environment lacks it."""
        return os.environ.get(self.secret_env, "") if self.secret_env is not None else self.secret or ""


@dataclass(frozen=True, kw_only=True)
class Recount:
    """A model whose tokens are counted again, with its tokenizer.json. A receipt that bills so many percent more than was counted
    is booked and flagged; from `refuse_above` on it is refused, as dishonest. Raises BadMessage.
    """

    model: str
    tokenizer: Path
    flag_above: int = 5
    refuse_above: int | None = None

    def __post_init__(self) -> None:
        if self.flag_above < 0 or (self.refuse_above is not None and self.refuse_above < self.flag_above):
            raise BadMessage(f"config: recounts: {self.model}: expected 0 <= flag_above <= refuse_above, in percent")


@dataclass(frozen=True, kw_only=True)
class Alias:
    """A name that stands for several models, asked in this order; with `weights`, each is first for that share of requests; with
    a `rule` (see rules.py), in the order that it gives, and the next one also where an answer will not do. Raises BadMessage.
    """

    name: str
    models: tuple[str, ...]
    weights: tuple[int, ...] = ()
    rule: str | None = None

    def __post_init__(self) -> None:
        if not self.models or len(set(self.models)) != len(self.models):
            raise BadMessage(f"config: aliases: {self.name}: models: expected at least one, each once")
        if self.weights and self.rule is not None:
            raise BadMessage(f"config: aliases: {self.name}: give weights or a rule, not both")
        if self.weights and (len(self.weights) != len(self.models) or min(self.weights) < 0 or not sum(self.weights)):
            raise BadMessage(f"config: aliases: {self.name}: weights: expected a whole number for each model, not all 0")


@dataclass(frozen=True, kw_only=True)
class ClientConfig:
    """Everything that a `Market` and a gateway are told. See example.toml for each setting in words.

    Prices are base units per 1,000,000 tokens (written as decimal dollars in TOML), `max_cost`, `min_stake`, `reserve_target` and
    `top_up_total` are base units, names that end in `_seconds` are durations. Raises BadMessage for values that cannot work.
    """

    coordinator: str = "http://127.0.0.1:8420"
    deployment: Path | None = None
    rpc: str | None = None
    use_deployment_rpc: bool = False
    chain_id: int | None = None
    contract: Address | None = None
    coordinator_address: Address | None = None

    max_input_price: Amount | None = None
    max_output_price: Amount | None = None
    max_cost: Amount | None = None
    require: Requirements = field(default_factory=Requirements)
    min_reputation: int = 0
    min_stake: Amount = Amount(0)
    sort: str = "price"
    prefer: tuple[Address, ...] = ()
    exclude: tuple[Address, ...] = ()
    aliases: tuple[Alias, ...] = ()
    budgets: tuple[Budget, ...] = ()
    recounts: tuple[Recount, ...] = ()
    label: str = ""
    max_fee_bps: int = 500
    reserve_target: Amount = Amount(1_000_000)
    top_up_total: Amount = Amount(0)
    idle_days: int = 7
    default_max_output_tokens: int = 4_096

    shortlist_size: int = 3
    shortlist_seconds: float = 5.0
    start_seconds: int = 60
    run_seconds: int = 3_600
    claim_seconds: int = 7 * 86_400
    idle_seconds: float = 60.0
    connect_seconds: float = 5.0
    control_seconds: float = 15.0
    cancel_seconds: float = 15.0
    grace_seconds: float = 10.0
    linger_seconds: int = 30
    key_seconds: int = 86_400
    max_jobs: int = 1_024

    state: Path | None = None
    cache: Path | None = None
    cache_mib: int = 256
    cache_seconds: int = 86_400
    proofs: Path | None = None
    proofs_mib: int = 1_024
    host: str = "127.0.0.1"
    port: int = 8421
    api_key: str | None = field(default=None, repr=False)
    keys: tuple[ApiKey, ...] = ()
    allow_origins: tuple[str, ...] = ()
    max_body_bytes: int = 16 * MIB
    max_bodies_bytes: int = 256 * MIB
    max_answer_bytes: int = 32 * MIB

    def __post_init__(self) -> None:
        if not self.coordinator.startswith(("http://", "https://")):
            raise BadMessage(f"config: coordinator: expected an http:// or https:// address, got {self.coordinator!r}")
        if not 1 <= self.shortlist_size <= MAX_CANDIDATES:
            raise BadMessage(f"config: shortlist_size: expected 1 to {MAX_CANDIDATES}")
        if self.sort not in SORTS:
            raise BadMessage(f"config: sort: expected one of {', '.join(SORTS)}")
        if not 0 <= self.min_reputation <= 100:
            raise BadMessage("config: min_reputation: expected 0 to 100 percent")
        if any(not _ORIGIN.fullmatch(origin) for origin in self.allow_origins):
            raise BadMessage('config: allow_origins: expected origins such as "http://localhost:3000", without a path or a "*"')
        self._check_numbers()

    def _check_numbers(self) -> None:
        if len(self.label) > MAX_LABEL:
            raise BadMessage(f"config: label: at most {MAX_LABEL} characters")
        if not 0 <= self.max_fee_bps <= 10_000:
            raise BadMessage("config: max_fee_bps: expected 0 to 10000")
        if not 0 < self.max_body_bytes <= self.max_bodies_bytes:
            raise BadMessage("config: max_bodies_bytes: expected at least max_body_bytes, and that at least 1")
        spans = ("start_seconds", "run_seconds", "claim_seconds", "key_seconds")
        for name in (*spans, "default_max_output_tokens", "max_jobs", "proofs_mib", "cache_mib", "idle_days"):
            if getattr(self, name) < 1:
                raise BadMessage(f"config: {name}: expected at least 1")
        for name in ("idle_seconds", "connect_seconds", "control_seconds", "cancel_seconds"):
            if getattr(self, name) <= 0:
                raise BadMessage(f"config: {name}: every wait has a deadline, so more than 0")

    def state_file(self, payer: Address) -> Path:
        """Where this wallet's orders and receipts are kept; processes of one wallet share it."""
        return self.state or home() / "client" / f"{payer}.db"

    def models_of(self, caller: ApiKey | None) -> frozenset[str]:
        """The models that a caller may have; empty for any."""
        aliases = {alias.name: alias.models for alias in self.aliases}
        allowed = () if caller is None else caller.models
        return frozenset(model for name in allowed for model in aliases.get(name, (name,)))

    @property
    def loopback(self) -> bool:
        """Whether the gateway can be reached from this machine only."""
        return is_loopback(self.host)


def load_config(path: Path | None = None, flags: dict[str, object] | None = None) -> ClientConfig:
    """The config from a TOML file, then TALLY_GATEWAY_… variables, then flags. Raises BadMessage."""
    return load(ClientConfig, path, prefix=ENV_PREFIX, flags=flags)
