"""Settings of the client and its gateway: the market, limits on cost, choice of providers, timeouts, files, callers."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from tallystick.client.audit_settings import AuditSettings, OwnReferee, check_referees
from tallystick.client.upstream_settings import Upstream, UpstreamTarget
from tallystick.protocol.criteria import MAX_CANDIDATES, read_sort
from tallystick.protocol.errors import BadMessage
from tallystick.protocol.origins import check_urls
from tallystick.protocol.requirements import Requirements
from tallystick.protocol.types import Address, Amount
from tallystick.protocol.weights import NO_WEIGHTS, Weights
from tallystick.protocol.wire import MAX_HEDGE_MS
from tallystick.runtime.config import home, load
from tallystick.runtime.plaintext import is_loopback
from tallystick.runtime.trusted_proxies import TrustedProxies
from tallystick.tracing.settings import ClientTracing

MIB = 1024 * 1024
ENV_PREFIX = "TALLY_GATEWAY_"
BATCH = "batch"
PRIORITIES = ("interactive", BATCH)
"""Classes of jobs in the coordinator's queue, the first to be served first."""


def read_priority(value: object, member: str) -> str:
    """Reads the class of a job. Raises BadMessage."""
    if value not in PRIORITIES:
        raise BadMessage(f"{member}: expected one of {', '.join(PRIORITIES)}, got {str(value)[:60]!r}")
    return str(value)


MAX_WAIT_SECONDS = 1_800
"""The longest wait for a free slot that a request may ask for. A coordinator may allow less."""
MAX_HEDGE_SECONDS = MAX_HEDGE_MS / 1_000
MAX_WEIGHT = 1_000
"""The most that one API key may weigh."""
MAX_LABEL = 64
"""The most characters of a workload's label."""
ANY_ORIGIN = "*"
"""Allows the web pages of all origins, if the gateway requires an API key."""
_AT_LEAST_ONE = (
    "start_seconds",
    "run_seconds",
    "claim_seconds",
    "idempotency_seconds",
    "default_max_output_tokens",
    "max_jobs",
    "key_slots",
    "proof_folder_mib",
    "cache_folder_mib",
    "responses_count",
    "responses_days",
    "batch_file_mib",
    "batch_concurrency",
    "batches_days",
    "ledger_days",
    "idle_reserve_days",
)
_AT_LEAST_ZERO = ("responses_mib", "batches_mib")
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/*?#@\s]+", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The most to spend in one UTC day, in base units: on the workload `label` and those below it, or on all of them.

    "research/papers" is below "research". Raises BadMessage.
    """

    per_day: Amount
    label: str | None = None
    warn_percent: int = 80

    def __post_init__(self) -> None:
        if not 0 <= self.warn_percent <= 100:
            raise BadMessage(f"config: budgets: warn_percent: expected 0 to 100, got {self.warn_percent}")

    @property
    def name(self) -> str:
        """Label used in messages."""
        return "the day's budget" if self.label is None else f"the day's budget of {self.label!r}"

    def covers(self, label: str) -> bool:
        """Whether it limits jobs of this workload."""
        return self.label is None or label == self.label or label.startswith(f"{self.label}/")


@dataclass(frozen=True, kw_only=True)
class ApiKey:
    """One caller's key for the gateway, with limits on its jobs in addition to the config's own.

    The workload of its jobs is `label`, or a workload below it that a request names. `models`: the models and aliases that it may
    use, all if empty. A named alias may be used with all its models, and those not by their own names. `share_prompts`: whether
    audits may show its prompts to other providers; see `audits.consent`. `weight`: its share of `key_slots`. Raises BadMessage.
    """

    label: str
    secret: str | None = field(default=None, repr=False)
    secret_env: str | None = None
    models: tuple[str, ...] = ()
    max_cost: Amount | None = None
    max_input_price: Amount | None = None
    max_output_price: Amount | None = None
    min_reputation: int = 0
    min_integrity: int = 0
    min_stake: Amount = Amount(0)
    require: Requirements = field(default_factory=Requirements)
    share_prompts: bool | None = None
    weight: int = 1

    def __post_init__(self) -> None:
        if not 0 < len(self.label) <= MAX_LABEL:
            raise BadMessage(f"config: api_keys: label: expected 1 to {MAX_LABEL} characters, got {len(self.label)}")
        if not 1 <= self.weight <= MAX_WEIGHT:
            raise BadMessage(f"config: api_keys: {self.label}: weight: expected 1 to {MAX_WEIGHT}, got {self.weight}")
        if (self.secret is None) is (self.secret_env is None):
            raise BadMessage(f"config: api_keys: {self.label}: expected one of secret and secret_env")

    @property
    def value(self) -> str:
        """The secret that callers send; empty if the environment variable is not set."""
        return os.environ.get(self.secret_env, "") if self.secret_env is not None else self.secret or ""


@dataclass(frozen=True, kw_only=True)
class TokenAudit:
    """A model whose tokens are counted again with its tokenizer.json.

    A receipt that bills `flag_percent` more tokens than were counted is recorded and flagged. From `refuse_percent` on it is
    refused as dishonest; None refuses none. Raises BadMessage.
    """

    model: str
    tokenizer: Path
    flag_percent: int = 5
    refuse_percent: int | None = None

    def __post_init__(self) -> None:
        if self.flag_percent < 0 or (self.refuse_percent is not None and self.refuse_percent < self.flag_percent):
            limits = f"{self.flag_percent} and {self.refuse_percent}"
            raise BadMessage(f"config: token_audits: {self.model}: expected 0 <= flag_percent <= refuse_percent, got {limits}")


@dataclass(frozen=True, kw_only=True)
class Alias:
    """A name for several models, which are tried in this order. A member "upstream://NAME/MODEL" is a model of an upstream.

    With `weights`, each model comes first for that share of the requests. With a `rule` (see routing_rules.py), the rule decides
    the order, and whether an answer is good enough or the next model is asked too. Raises BadMessage.
    """

    name: str
    models: tuple[str, ...]
    weights: tuple[int, ...] = ()
    rule: str | None = None

    def __post_init__(self) -> None:
        if not self.models or len(set(self.models)) != len(self.models):
            raise BadMessage(f"config: aliases: {self.name}: models: expected at least one model, and no model twice")
        if self.weights and self.rule is not None:
            raise BadMessage(f"config: aliases: {self.name}: expected weights or a rule, got both")
        if self.weights and (len(self.weights) != len(self.models) or min(self.weights) < 0 or not sum(self.weights)):
            raise BadMessage(f"config: aliases: {self.name}: weights: expected one whole number for each model, not all 0")


@dataclass(frozen=True, kw_only=True)
class ClientConfig:
    """All settings of a `Market` and a gateway; example.toml explains each.

    Prices are base units per 1,000,000 tokens. `max_cost`, `min_stake`, `reserve_target` and `top_up_total` are base units; TOML
    files have decimal dollars instead. Names that end in `_seconds` are durations. Raises BadMessage for impossible values.
    """

    coordinator: str = "http://127.0.0.1:8420"
    coordinator_urls: tuple[str, ...] = ()
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
    min_integrity: int = 0
    min_stake: Amount = Amount(0)
    sort: str = "price"
    weights: Weights = NO_WEIGHTS
    prefer: tuple[Address, ...] = ()
    exclude: tuple[Address, ...] = ()
    aliases: tuple[Alias, ...] = ()
    upstreams: tuple[Upstream, ...] = ()
    budgets: tuple[Budget, ...] = ()
    token_audits: tuple[TokenAudit, ...] = ()
    audits: AuditSettings = field(default_factory=AuditSettings)
    referees: tuple[OwnReferee, ...] = ()
    label: str = ""
    max_fee_bps: int = 500
    reserve_target: Amount = Amount(1_000_000)
    top_up_total: Amount = Amount(0)
    idle_reserve_days: int = 7
    default_max_output_tokens: int = 4_096

    shortlist_size: int = 3
    shortlist_seconds: float = 5.0
    wait_seconds: int = 120
    hedge_after: float = 0.0
    priority: str = "interactive"
    start_seconds: int = 60
    run_seconds: int = 3_600
    claim_seconds: int = 7 * 86_400
    stream_idle_seconds: float = 60.0
    connect_seconds: float = 5.0
    request_seconds: float = 15.0
    cancel_seconds: float = 15.0
    log_json: bool | None = None
    """Whether the gateway's log is JSON; None: text at a terminal, JSON elsewhere."""
    log_level: str = "info"
    tracing: ClientTracing = field(default_factory=ClientTracing)
    shutdown_seconds: float = 10.0
    evidence: bool = True
    linger_seconds: int = 30
    idempotency_seconds: int = 86_400
    max_jobs: int = 1_024

    ledger_file: Path | None = None
    ledger_days: int = 90
    cache_folder: Path | None = None
    cache_folder_mib: int = 256
    cache_seconds: int = 86_400
    responses_folder: Path | None = None
    responses_mib: int = 256
    responses_count: int = 10_000
    responses_days: int = 30
    batches_folder: Path | None = None
    batches_mib: int = 4_096
    batches_days: int = 30
    batch_file_mib: int = 200
    batch_concurrency: int = 32
    proof_folder: Path | None = None
    proof_folder_mib: int = 1_024
    host: str = "127.0.0.1"
    port: int = 8421
    api_key: str | None = field(default=None, repr=False)
    api_keys: tuple[ApiKey, ...] = ()
    key_slots: int = 256
    allow_origins: tuple[str, ...] = ()
    trusted_proxies: tuple[str, ...] = ()
    page_urls: tuple[str, ...] = ()
    page_wallets: tuple[Address, ...] = ()
    max_body_bytes: int = 16 * MIB
    max_total_body_bytes: int = 256 * MIB
    max_answer_bytes: int = 32 * MIB

    def __post_init__(self) -> None:
        for name, url in (("coordinator", self.coordinator), *(("coordinator_urls", url) for url in self.coordinator_urls)):
            if not url.startswith(("http://", "https://")):
                raise BadMessage(f"config: {name}: expected an http:// or https:// address, got {url!r}")
        if not 1 <= self.shortlist_size <= MAX_CANDIDATES:
            raise BadMessage(f"config: shortlist_size: expected 1 to {MAX_CANDIDATES}, got {self.shortlist_size}")
        read_sort(self.sort, "config: sort")
        read_priority(self.priority, "config: priority")
        for name in ("min_reputation", "min_integrity"):
            if not 0 <= getattr(self, name) <= 100:
                raise BadMessage(f"config: {name}: expected 0 to 100 percent, got {getattr(self, name)}")
        for origin in self.allow_origins:
            if origin != ANY_ORIGIN and not _ORIGIN.fullmatch(origin):
                text = f'expected origins such as "http://localhost:3000", without a path, or "*" for all, got {origin!r}'
                raise BadMessage(f"config: allow_origins: {text}")
        check_urls(self.page_urls, "page_urls")
        TrustedProxies.parse(self.trusted_proxies)
        self._check_numbers()
        self._check_upstreams()
        check_referees(self.referees)

    def _check_upstreams(self) -> None:
        names = [upstream.name for upstream in self.upstreams]
        if len(set(names)) != len(names):
            raise BadMessage("config: upstreams: expected different names, got the same name twice")
        for alias in self.aliases:
            for member in alias.models:
                target = UpstreamTarget.parse(member)
                if target is not None and target.upstream not in names:
                    known = ", ".join(names) or "none"
                    raise BadMessage(
                        f"config: aliases: {alias.name}: {target}: expected an upstream of the config ({known}), "
                        f"got {target.upstream!r}"
                    )

    def _check_numbers(self) -> None:
        if len(self.label) > MAX_LABEL:
            raise BadMessage(f"config: label: expected at most {MAX_LABEL} characters, got {len(self.label)}")
        if not 0 <= self.max_fee_bps <= 10_000:
            raise BadMessage(f"config: max_fee_bps: expected 0 to 10000, got {self.max_fee_bps}")
        if not 0 < self.max_body_bytes <= self.max_total_body_bytes:
            raise BadMessage("config: max_total_body_bytes: expected at least max_body_bytes, which must be at least 1")
        for name in (*_AT_LEAST_ONE, *_AT_LEAST_ZERO):
            least = 1 if name in _AT_LEAST_ONE else 0
            if getattr(self, name) < least:
                raise BadMessage(f"config: {name}: expected at least {least}, got {getattr(self, name)}")
        if not 0 <= self.hedge_after <= MAX_HEDGE_SECONDS:
            raise BadMessage(f"config: hedge_after: expected 0 to {MAX_HEDGE_SECONDS:g} seconds, got {self.hedge_after}")
        for name in ("stream_idle_seconds", "connect_seconds", "request_seconds", "cancel_seconds"):
            if getattr(self, name) <= 0:
                raise BadMessage(f"config: {name}: expected more than 0 seconds, got {getattr(self, name)}")

    def ledger_path(self, payer: Address) -> Path:
        """The file of this wallet's ledger, which all its processes share."""
        return self.ledger_file or home() / "client" / f"{payer}.db"

    def responses_path(self, payer: Address) -> Path:
        """The folder of this wallet's stored responses, beside its ledger unless the settings name another."""
        return self.responses_folder or self.ledger_path(payer).with_suffix(".responses")

    def batches_path(self, payer: Address) -> Path:
        """The folder of this wallet's files and batches, beside its ledger unless the settings name another."""
        return self.batches_folder or self.ledger_path(payer).with_suffix(".batches")

    def affinity_path(self, payer: Address) -> Path:
        """The file, beside this wallet's ledger, that says which provider holds which conversation in its cache."""
        return self.ledger_path(payer).with_suffix(".affinity")

    def audits_path(self, payer: Address) -> Path:
        """The file, beside this wallet's ledger, that has its audits."""
        return self.ledger_path(payer).with_suffix(".audits.db")

    def consent_path(self, payer: Address) -> Path:
        """The file, beside this wallet's ledger, that says whether audits may show prompts to other providers."""
        return self.ledger_path(payer).with_suffix(".consent")

    def kept_jobs_path(self, payer: Address) -> Path:
        """The folder, beside this wallet's ledger, of the jobs that are kept for audits."""
        return self.ledger_path(payer).with_suffix(".kept")

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach the gateway."""
        return is_loopback(self.host)


def load_config(path: Path | None = None, flags: dict[str, object] | None = None) -> ClientConfig:
    """Reads settings from a TOML file, then from TALLY_GATEWAY_… variables, then from flags; the last wins. Raises BadMessage."""
    return load(ClientConfig, path, prefix=ENV_PREFIX, flags=flags)
