"""The coordinator's settings; example.toml explains each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from coordinator.domain.endpoints import endpoints_of, is_loopback
from coordinator.domain.limits import Intake, Limits
from coordinator.http.response_buffer import Retention
from tallystick.protocol.errors import BadMessage
from tallystick.protocol.types import Amount
from tallystick.runtime.config import load
from tallystick.runtime.connection_limiter import ConnectionLimits

ENV_PREFIX = "TALLY_COORDINATOR_"


_MAXIMA = (
    *("max_connections", "max_connections_per_address", "max_nodes_per_address", "max_jobs_per_payer", "max_jobs_per_node"),
    *("max_jobs_per_address", "max_body_mib", "max_bodies_mib", "max_bodies_mib_per_address", "requests_per_second"),
)


@dataclass(frozen=True)
class CoordinatorConfig:
    """Times are seconds. Relative paths are relative to where the process was started."""

    deployment: Path
    """The deployment file of the settlement contract (written by `tally deploy`)."""
    name: str = "tallystick"
    host: str = "127.0.0.1"
    port: int = 8420
    public_urls: tuple[str, ...] = ()
    """Where nodes reach this coordinator, such as https://coordinator.example: they sign what they dialled, so that nobody in
    between can pass as this coordinator. Needed if `host` is not loopback.
    """
    db: str = "sqlite:///coordinator.db"
    rpc: str | None = None
    """The chain's JSON-RPC; the deployment file's by default."""
    settle_every: float = 30
    """How often pending claims are batched and sent to the chain."""
    min_claim: Amount = Amount(1)
    """What a claim must bring its provider, in base units, for gas to be spent on it."""
    min_row: Amount = Amount(1)
    """What a claim must bring for each of its rows, in base units: the gas of a row, at this coordinator's prices."""
    confirmations: int = 0
    """Blocks that must follow a settlement before it counts as final."""
    funds_ttl: float = 5
    """How long a payer's balance is trusted before the chain is asked again."""
    fee_bps: int = 0
    """Fee in hundredths of a percent; must equal the rate that the coordinator registered on chain (`tally coordinator fee`)."""
    accept_timeout: float = 10
    first_output_timeout: float = 120
    idle_timeout: float = 60
    job_timeout: float = 3_600
    """All of a job's time, without its reader's."""
    reader_timeout: float = 600
    """How long a client may keep its job waiting, in all. Nodes allow 900 s: a longer time here costs them their pay."""
    order_horizon: int = 3_600
    """How far ahead an order's deadline may lie, and how long replays are remembered."""
    min_claim_window: int = 3_600
    """How long orders must leave providers to claim."""
    answer_seconds: float = 600
    """How long the sealed answer of a job with an idempotency key is kept in memory after its end, for a client that lost it."""
    answer_mib: int = 4
    """The longest such answer that is kept."""
    answers_mib: int = 256
    """How much all of them may take."""
    answers_mib_per_payer: int = 32
    """How much those of one payer may take."""
    answers_disk_mib: int = 1_024
    """How much of them the database keeps, for `answer_seconds` too: also those that memory had no room for."""
    linger_seconds: float = 60
    """The longest that such a job goes on after its client's connection is lost."""
    max_connections: int = 10_000
    """Connections at once, clients and nodes together."""
    max_connections_per_address: int = 1_000
    """One address is an IPv4 address or the /64 network of an IPv6 address."""
    max_nodes_per_address: int = 64
    max_jobs_per_address: int = 256
    max_jobs_per_payer: int = 256
    max_jobs_per_node: int = 1_024
    max_body_mib: int = 32
    """The largest job, sealed."""
    max_bodies_mib: int = 1_024
    """What all jobs under way may hold together."""
    max_bodies_mib_per_address: int = 128
    """What the jobs of one address may hold together."""
    requests_per_second: float = 100
    """Of one address to everything but /v1/jobs, after 20 times as many at once."""
    bad_requests_per_second: float = 2
    """Of one address: requests that must be refused (unreadable, badly signed, unfunded), after `bad_requests_burst` at once."""
    bad_requests_burst: int = 100
    log_json: bool = True
    log_level: str = "info"

    def __post_init__(self) -> None:
        """Raises BadMessage for a time or a rate that cannot be meant."""
        times = ("settle_every", "accept_timeout", "first_output_timeout", "idle_timeout", "job_timeout", "reader_timeout")
        for name in (*times, "order_horizon"):
            if not getattr(self, name) > 0:
                raise BadMessage(f"config: {name}: expected seconds above 0, got {getattr(self, name)}")
        kept = ("answer_seconds", "answer_mib", "answers_mib", "linger_seconds", "answers_mib_per_payer", "answers_disk_mib")
        for name in ("confirmations", "funds_ttl", "min_claim_window", *kept):
            if not getattr(self, name) >= 0:
                raise BadMessage(f"config: {name}: expected a number from 0, got {getattr(self, name)}")
        for name in (*_MAXIMA, "bad_requests_per_second", "bad_requests_burst"):
            if not getattr(self, name) > 0:
                raise BadMessage(f"config: {name}: expected a number above 0, got {getattr(self, name)}")
        if not 0 <= self.fee_bps <= 10_000:
            raise BadMessage(f"config: fee_bps: expected 0 to 10000 hundredths of a percent, got {self.fee_bps}")
        if not self.public_urls and not is_loopback(self.host):
            raise BadMessage(
                f"config: public_urls: must name the addresses at which nodes reach this coordinator, since host = {self.host!r}"
                ' is open to others; for example public_urls = ["https://coordinator.example"]'
            )
        try:
            endpoints_of(self.public_urls)
        except BadMessage as error:
            raise BadMessage(f"config: public_urls: {error}") from None

    @property
    def retention(self) -> Retention:
        """The jobs route's part of the settings."""
        return Retention(
            self.answer_seconds,
            self.answer_mib << 20,
            self.answers_mib << 20,
            self.linger_seconds,
            self.answers_mib_per_payer << 20,
            self.answers_disk_mib << 20,
        )

    @property
    def limits(self) -> Limits:
        """The market's part of the settings."""
        return Limits(
            accept=self.accept_timeout,
            first_output=self.first_output_timeout,
            idle=self.idle_timeout,
            total=self.job_timeout,
            reader=self.reader_timeout,
            order_horizon=self.order_horizon,
            min_claim_window=self.min_claim_window,
            fee_bps=self.fee_bps,
            jobs_per_payer=self.max_jobs_per_payer,
            jobs_per_node=self.max_jobs_per_node,
        )

    @property
    def connection_limits(self) -> ConnectionLimits:
        """The server's part of the settings."""
        return ConnectionLimits(connections=self.max_connections, per_address=self.max_connections_per_address)

    @property
    def intake(self) -> Intake:
        """What the jobs route takes in."""
        return Intake(
            body=self.max_body_mib << 20,
            bodies=self.max_bodies_mib << 20,
            bad_rate=self.bad_requests_per_second,
            bad_burst=float(self.bad_requests_burst),
            address_bodies=self.max_bodies_mib_per_address << 20,
            address_jobs=self.max_jobs_per_address,
            request_rate=self.requests_per_second,
        )

    @property
    def endpoints(self) -> frozenset[str]:
        """The hosts and ports of `public_urls`, as nodes sign them."""
        return endpoints_of(self.public_urls)


def load_config(path: Path | None = None, flags: Mapping[str, object] | None = None) -> CoordinatorConfig:
    """The config from a TOML file, then TALLY_COORDINATOR_… variables, then flags. Raises BadMessage."""
    return load(CoordinatorConfig, path, prefix=ENV_PREFIX, flags=flags)
