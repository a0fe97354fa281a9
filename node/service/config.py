"""The node's settings; example.toml explains each of them."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from node.chain.claim_policy import ClaimPolicy
from node.coordinator.link_settings import LinkSettings, node_url
from node.domain.admission_rules import AdmissionRules
from node.domain.credit_limits import CreditLimits
from node.domain.dynamic_pricing import PriceRule, apply_price_rules, batch_rule
from node.domain.payout_policy import PayoutPolicy
from node.domain.published_asks import Offer, for_batch, split_scoring
from node.domain.tier_prices import TierPrices
from node.engines.api_key import AUTHORIZATION, ApiKey
from node.engines.capabilities import Capabilities
from node.engines.engine_settings import EngineSettings
from node.jobs.deadlines import Deadlines
from tallystick.protocol.errors import BadMessage
from tallystick.protocol.features import EVIDENCE, absent, opposite
from tallystick.protocol.messages import UNKNOWN, Spec
from tallystick.protocol.origins import check_urls
from tallystick.protocol.pricing import Prices
from tallystick.protocol.proxies import uses_proxy
from tallystick.protocol.routes import EVIDENCE_ROUTE
from tallystick.protocol.sealing import SUITES, X25519
from tallystick.protocol.tiers import Tier, Tiers
from tallystick.protocol.types import Address, Amount
from tallystick.runtime.config import home, load
from tallystick.runtime.plaintext import is_loopback
from tallystick.runtime.trusted_proxies import TrustedProxies
from tallystick.tracing.settings import NodeTracing

if TYPE_CHECKING:
    from sqlalchemy import URL

ENV_PREFIX = "TALLY_NODE_"
DEFAULT_INPUT_PRICE = Amount(100_000)
DEFAULT_OUTPUT_PRICE = Amount(400_000)
DEFAULT_CONTEXT_TOKENS = 8_192
DEFAULT_OUTPUT_TOKENS = 4_096
DEFAULT_SLOTS = 4
MAX_QUEUE_DEPTH = 1_024
MIN_KEEP_SECONDS = 86_400
MIN_KEY = 16
"""The fewest characters of `page_key`."""
SETTLEMENT_SECONDS = 300
"""Seconds that a transaction of this node may take to be mined and seen, after the coordinator's time for a claim has passed."""
_JOB_PHASES = frozenset({"total", "reader", "first_credit"})
"""The deadlines that add up to the longest job; the others run within `total`."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One model for sale. Prices are base units per 1,000,000 tokens (decimal dollars in TOML)."""

    name: str
    sell_as: str | None = None
    input_price: Amount | None = None
    cached_input_price: Amount | None = None
    output_price: Amount | None = None
    score_price: Amount | None = None
    batch_discount: str | None = None
    batch_hours: str | None = None
    context_tokens: int | None = None
    max_output_tokens: int | None = None
    spec: Spec = field(default_factory=Spec)

    def __post_init__(self) -> None:
        if not 0 < len(self.sold_as) <= 256:
            raise BadMessage(f"config: engines.models: expected a name of 1 to 256 characters, got {len(self.sold_as)}")

    @property
    def sold_as(self) -> str:
        """The model's name on the market."""
        return self.sell_as or self.name

    @property
    def prices(self) -> Prices:
        """The prices with defaults; by default, cached input costs as much as input."""
        input_price = DEFAULT_INPUT_PRICE if self.input_price is None else self.input_price
        cached_price = input_price if self.cached_input_price is None else self.cached_input_price
        return Prices(
            int(input_price), int(cached_price), int(DEFAULT_OUTPUT_PRICE if self.output_price is None else self.output_price)
        )


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """One engine and the models sold from it. Without models, all models that it lists are sold, at the prices given here."""

    url: str
    name: str | None = None
    api_key: str | None = field(default=None, repr=False)
    api_key_env: str | None = None
    api_key_file: Path | None = None
    api_key_header: str = AUTHORIZATION
    slots: int | None = None
    max_slots: int | None = None
    queue_depth: int = 0
    models: tuple[ModelConfig, ...] = ()
    input_price: Amount | None = None
    cached_input_price: Amount | None = None
    output_price: Amount | None = None
    score_price: Amount | None = None
    batch_discount: str = "0%"
    batch_hours: str = ""
    output_limit_field: str | None = None
    supports_stream_usage: bool | None = None
    probe: bool = True
    evidence: bool = True
    price_rules: tuple[PriceRule, ...] = ()
    spec: Spec = field(default_factory=Spec)

    def __post_init__(self) -> None:
        if urlsplit(self.url).scheme not in ("http", "https"):
            raise BadMessage(f"config: engines.url: expected an http:// or https:// URL, got {self.url!r}")
        if self.slots is not None and self.slots < 1:
            raise BadMessage(f"config: engines.slots: expected at least 1, got {self.slots}")
        least = self.slots or 1
        if self.max_slots is not None and self.max_slots < least:
            raise BadMessage(f"config: engines.max_slots: expected at least {least}, the value of slots, got {self.max_slots}")
        if not 0 <= self.queue_depth <= MAX_QUEUE_DEPTH:
            raise BadMessage(f"config: engines.queue_depth: expected 0 to {MAX_QUEUE_DEPTH}, got {self.queue_depth}")
        for model in self.models:
            self._batch_rule(model)
        batch_rule(self.batch_discount, self.batch_hours)
        if self.output_limit_field not in (None, "max_tokens", "max_completion_tokens"):
            raise BadMessage(
                "config: engines.output_limit_field: expected max_tokens or max_completion_tokens, got "
                f"{self.output_limit_field!r}"
            )

    @property
    def label(self) -> str:
        """The engine's name in logs and metrics."""
        return self.name or urlsplit(self.url).netloc.rpartition("@")[2]

    @property
    def limits(self) -> tuple[int | None, int | None, int]:
        """The settings of the slots."""
        return self.slots, self.max_slots, self.queue_depth

    def settings(self, environment: Mapping[str, str]) -> EngineSettings:
        """Returns the adapter's settings. Raises BadMessage if `api_key_env` names a variable that is not set."""
        key = self.api_key
        if self.api_key_env:
            key = environment.get(self.api_key_env)
            if not key:
                raise BadMessage(f"config: engines.api_key_env: expected the environment variable {self.api_key_env} to be set")
        if self.api_key_file is not None or self.api_key_header != AUTHORIZATION:
            return EngineSettings(self.url, ApiKey(key, self.api_key_file, self.api_key_header), trust_env=uses_proxy(self.url))
        return EngineSettings(self.url, key, trust_env=uses_proxy(self.url))

    def slots_at_start(self, reported: int | None) -> int:
        """The number of slots to begin with, if the engine reports that it runs `reported` requests at once."""
        slots = self.slots or reported or DEFAULT_SLOTS
        return slots if self.max_slots is None else min(slots, self.max_slots)

    def offer(
        self,
        model: ModelConfig,
        context: int | None,
        reported: Spec,
        when: datetime,
        load: float,
        *,
        capabilities: Capabilities | None = None,
    ) -> Offer:
        """Returns the offer of a model at `when`, while the share `load` of the slots is taken. `context`, `reported`: what the
        engine reports; `capabilities`: what the probe found. The settings win over both.
        """
        if capabilities is None:
            capabilities = Capabilities(True, True, "unknown")
        usage = capabilities.streams != "yes"
        tokens = model.context_tokens or context or DEFAULT_CONTEXT_TOKENS
        evidence = capabilities.evidence if self.evidence else None
        specs: tuple[Spec, ...] = (Spec(features=capabilities.features), reported, self.spec, model.spec)
        if capabilities.chat or capabilities.completions:  # not for the config to declare: the node alone commits to evidence
            specs += (Spec(features=(EVIDENCE, EVIDENCE_ROUTE) if evidence is not None else (absent(EVIDENCE),)),)
        return Offer(
            model=model.sold_as,
            engine=self.label,
            upstream=model.name,
            prices=apply_price_rules(model.prices, self.price_rules, when, load),
            context_tokens=tokens,
            max_output_tokens=min(model.max_output_tokens or DEFAULT_OUTPUT_TOKENS, tokens),
            spec=merge_specs(*specs),
            output_limit_field=self.output_limit_field or capabilities.output_limit_field,
            supports_stream_usage=usage if self.supports_stream_usage is None else self.supports_stream_usage,
            evidence=evidence,
        )

    def model_defaults(self, name: str) -> ModelConfig:
        """Returns the config of a model that the engine lists and the config does not name, at this engine's prices."""
        return ModelConfig(
            name=name,
            input_price=self.input_price,
            cached_input_price=self.cached_input_price,
            output_price=self.output_price,
            score_price=self.score_price,
        )

    def priced_offers(self, offer: Offer, model: ModelConfig, when: datetime, load: float) -> tuple[Offer, ...]:
        """The offers of a model: one, and others for scoring and for batch jobs if these have prices of their own now."""
        offers, rule = self._scored_offers(offer, model, when, load), self._batch_rule(model)
        if rule.percent == 100 or not rule.applies(when, load):
            return offers
        return *offers, for_batch(offers[0], apply_price_rules(offers[0].prices, (rule,), when, load))

    def _batch_rule(self, model: ModelConfig) -> PriceRule:
        discount = self.batch_discount if model.batch_discount is None else model.batch_discount
        return batch_rule(discount, self.batch_hours if model.batch_hours is None else model.batch_hours)

    def _scored_offers(self, offer: Offer, model: ModelConfig, when: datetime, load: float) -> tuple[Offer, ...]:
        price = self.score_price if model.score_price is None else model.score_price
        if price is None:
            return (offer,)
        return split_scoring(offer, apply_price_rules(Prices(int(price), int(price), int(price)), self.price_rules, when, load))


@dataclass(frozen=True, kw_only=True)
class NodeConfig:
    """All settings of a node. Times are seconds, amounts base units (decimal dollars in TOML)."""

    coordinator: str = "http://127.0.0.1:8420"
    coordinator_address: Address | None = None
    coordinators: tuple[str, ...] = ()
    skip_recovery: tuple[str, ...] = ()
    deployment: Path = field(default_factory=lambda: home() / "deployment.json")
    rpc: str | None = None
    state: Path = field(default_factory=lambda: home() / "node")
    engines: tuple[EngineConfig, ...] = ()
    sealing_suite: str = X25519
    ask_validity: int = 3_600
    engine_check_interval: float = 10.0
    receipt_resend_interval: float = 60.0
    job_keep_seconds: int = 7_776_000
    """How long the records of a job are kept after its end."""
    shutdown_grace: float = 60.0
    metrics_host: str = "127.0.0.1"
    metrics_port: int | None = None
    trusted_proxies: tuple[str, ...] = ()
    page_urls: tuple[str, ...] = ()
    page_wallets: tuple[Address, ...] = ()
    page_key: str | None = field(default=None, repr=False)
    gpus: int = 0
    gpu_hour_cost: Amount | None = None
    watts: int = 0
    """The electric power behind this node, for its revenue per kWh; 0 if it is not known."""
    log_json: bool | None = None
    """Whether the log is JSON; None: text at a terminal, JSON elsewhere."""
    log_level: str = "info"
    tracing: NodeTracing = field(default_factory=NodeTracing)
    tiers: tuple[Tier, ...] = ()
    admission: AdmissionRules = field(default_factory=AdmissionRules)
    credit: CreditLimits = field(default_factory=CreditLimits)
    deadlines: Deadlines = field(default_factory=Deadlines)
    claims: ClaimPolicy = field(default_factory=ClaimPolicy)
    payout: PayoutPolicy = field(default_factory=PayoutPolicy)
    link: LinkSettings = field(default_factory=LinkSettings)

    def __post_init__(self) -> None:
        self._check_coordinators()
        if self.sealing_suite not in SUITES:
            raise BadMessage(f"config: sealing_suite: expected one of {', '.join(sorted(SUITES))}, got {self.sealing_suite!r}")
        if self.ask_validity < 60:
            raise BadMessage(f"config: ask_validity: expected at least 60 seconds, got {self.ask_validity}")
        if self.job_keep_seconds < MIN_KEEP_SECONDS:
            raise BadMessage(
                f"config: job_keep_seconds: expected at least {MIN_KEEP_SECONDS} (a day), got {self.job_keep_seconds}"
            )
        if min(self.gpus, self.watts) < 0:
            raise BadMessage(f"config: gpus, watts: expected 0 or more, got {self.gpus} and {self.watts}")
        self._check_access()
        labels = [engine.label for engine in self.engines]
        if len(set(labels)) != len(labels):
            raise BadMessage(f"config: engines.name: expected a different name for each engine, got {', '.join(labels)}")
        if not 0 <= self.credit.percent_of_paid <= 100:
            raise BadMessage(f"config: credit.percent_of_paid: expected 0 to 100, got {self.credit.percent_of_paid}")
        for part in (self.deadlines, self.link):
            for setting in fields(part):
                if getattr(part, setting.name) <= 0:
                    raise BadMessage(f"config: {setting.name}: expected more than 0, got {getattr(part, setting.name)}")

    def _check_access(self) -> None:
        check_urls(self.page_urls, "page_urls")
        TrustedProxies.parse(self.trusted_proxies)
        for tier in self.tiers:
            if tier.jobs_per_minute is not None:
                text = "only a coordinator counts the jobs of a minute; set jobs_in_flight"
                raise BadMessage(f"config: tiers: {tier.name}: jobs_per_minute: {text}")
        TierPrices(self.access)
        if self.page_key is not None and len(self.page_key) < MIN_KEY:
            raise BadMessage(f"config: page_key: expected at least {MIN_KEY} characters, got {len(self.page_key)}")

    def _check_coordinators(self) -> None:
        for url in self.all_coordinators:
            node_url(url)
        for url in self.skip_recovery:
            if node_url(url) not in map(node_url, self.all_coordinators):
                known = ", ".join(self.all_coordinators)
                raise BadMessage(f"config: skip_recovery: expected one of the coordinators ({known}), got {url!r}")

    @property
    def all_coordinators(self) -> tuple[str, ...]:
        """The URLs of all coordinators, each once."""
        return tuple(dict.fromkeys((self.coordinator, *self.coordinators)))

    @property
    def open_pages(self) -> bool:
        """Whether the pages beside the metrics need no login, since no other machine reaches them."""
        return is_loopback(self.metrics_host)

    @property
    def claim_margin(self) -> int:
        """Seconds that an order must stay claimable when a job on it begins: the longest job, and then its settlement.

        Settlement covers the next check of the tabs, the coordinator's time for the claim, and this node's own transaction.
        """
        longest_job = sum(
            float(getattr(self.deadlines, part.name)) for part in fields(self.deadlines) if part.name in _JOB_PHASES
        )
        settlement = self.claims.check_interval + self.claims.retry_after + SETTLEMENT_SECONDS
        return max(self.credit.claim_margin, math.ceil(longest_job + settlement))

    @property
    def credit_limits(self) -> CreditLimits:
        """`credit` with the claim margin that the deadlines need."""
        return replace(self.credit, claim_margin=self.claim_margin)

    @property
    def admission_rules(self) -> AdmissionRules:
        """`admission` with the claim window that the deadlines need."""
        return replace(self.admission, claim_window=max(self.admission.claim_window, self.claim_margin + 1))

    @property
    def access(self) -> Tiers:
        """The access tiers. What counts is what a payer settled with this node."""
        return Tiers(self.tiers, "on chain with this provider")

    @property
    def database(self) -> URL:
        """The URL of the node's store."""
        from tallystick.runtime.database_url import sqlite_url  # noqa: PLC0415 - slow to import, and most commands open no store

        return sqlite_url((self.state / "node.db").absolute())


def merge_specs(*specs: Spec) -> Spec:
    """Merges specs: known values of later ones win. Features add up, except that a later one replaces its contrary."""
    merged: dict[str, str] = {}
    features: dict[str, None] = {}
    for spec in specs:
        for member in fields(Spec):
            if member.name == "features":
                for feature in spec.features:
                    features.pop(opposite(feature), None)
                    features[feature] = None
            elif getattr(spec, member.name) != UNKNOWN:
                merged[member.name] = getattr(spec, member.name)
    return Spec(**merged, features=tuple(features))


def load_config(
    path: Path | None = None,
    flags: Mapping[str, object] | None = None,
    environment: Mapping[str, str] | None = None,
) -> NodeConfig:
    """Reads the config from a TOML file, then TALLY_NODE_… variables, then `flags`. Raises BadMessage."""
    return load(NodeConfig, path, prefix=ENV_PREFIX, flags=flags, environment=os.environ if environment is None else environment)
