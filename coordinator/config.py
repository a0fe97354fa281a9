"""Settings of the coordinator. example.toml explains each of them for operators."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from coordinator.bus.nats_address import parse_nats_address
from coordinator.domain.endpoints import endpoints_of, is_loopback
from coordinator.domain.limits import IntakeLimits, JobLimits
from coordinator.http.response_buffer import Retention
from tallystick.protocol.errors import BadMessage
from tallystick.protocol.match_log import MERGE_SECONDS
from tallystick.protocol.replicas import MAX_REPLICAS, Reach, read_replica_url, split_allowed
from tallystick.protocol.tiers import Tier, Tiers
from tallystick.protocol.types import Amount
from tallystick.runtime.config import home, load
from tallystick.runtime.connection_limiter import ConnectionLimits
from tallystick.runtime.database_url import parse_database_url
from tallystick.runtime.trusted_proxies import TrustedProxies
from tallystick.tracing.settings import TracingSettings

ENV_PREFIX = "TALLY_COORDINATOR_"
MIN_HEAD_SECONDS = 0.1
"""Each head is a signature and a synced write."""
MIN_KEEP_SECONDS = 86_400
"""A client that was away learns from the contents of a restart's leaf that its match was lost, not hidden."""

_SECONDS = (
    *("settle_interval", "accept_timeout", "first_output_timeout", "idle_timeout", "job_timeout", "reader_timeout"),
    "max_order_seconds",
    "max_wait_seconds",
)
_FROM_ZERO = (
    *("confirmations", "funds_ttl", "min_claim_window", "response_seconds", "response_mib", "responses_mib"),
    *("linger_seconds", "responses_mib_per_payer", "responses_disk_mib", "drain_seconds"),
)
_ABOVE_ZERO = (
    *("max_connections", "max_connections_per_address", "max_nodes_per_address", "max_jobs_per_payer", "max_jobs_per_node"),
    *("max_jobs_per_address", "max_body_mib", "max_bodies_mib", "max_bodies_mib_per_address", "requests_per_second"),
    *("refused_requests_per_second", "refused_requests_burst", "max_waiting_jobs", "max_waiting_jobs_per_model"),
    "max_waiting_mib",
)


@dataclass(frozen=True)
class CoordinatorConfig:
    """Times are seconds. Relative paths start at the working directory of the process."""

    deployment: Path = field(default_factory=lambda: home() / "deployment.json")
    """The deployment file of the settlement contract, written by `tally deploy`."""
    name: str = "tallystick"
    host: str = "127.0.0.1"
    port: int = 8420
    public_urls: tuple[str, ...] = ()
    """URLs under which nodes reach this coordinator, such as https://coordinator.example. Required if `host` is not loopback.

    Each node signs the address that it dialled, which keeps a relay from posing as this coordinator.
    """
    db: str = "sqlite:///coordinator.db"
    bus: str | None = None
    """Addresses of NATS servers. With one, this process is a replica: any number of them serve one account on one PostgreSQL."""
    replica_url: str | None = None
    """URL of this replica alone, as `/v1/info` lists it. {port} stands for the port of a process of `workers`.

    None: the first of `public_urls`, else the address of `host` and `port`.
    """
    workers: int = 1
    """Replicas that one command runs on this machine: all on `port`, and each on a port of its own, `port` + 1 and following."""
    drain_seconds: float = 5
    """How long live jobs may go on after SIGTERM."""
    rpc: str | None = None
    """URL of the chain's JSON-RPC endpoint. None: the one in the deployment file."""
    settle_interval: float = 30
    """Time between two batches of claims."""
    min_claim: Amount = Amount(1)
    """Base units that a claim must pay its provider for this coordinator to spend gas on it."""
    min_claim_row: Amount = Amount(1)
    """Base units that a claim must pay per row on average: what the gas of a row costs this coordinator."""
    confirmations: int = 0
    """Blocks that must follow a settlement before it counts as final."""
    funds_ttl: float = 5
    """How long a payer's balance is trusted before the chain is read again."""
    fee_bps: int = 0
    """Fee in hundredths of a percent. Must equal the rate registered on chain with `tally coordinator fee`."""
    accept_timeout: float = 10
    first_output_timeout: float = 120
    idle_timeout: float = 60
    job_timeout: float = 3_600
    """Total time of a job, without the time that its reader takes."""
    reader_timeout: float = 600
    """How long a client may keep its job waiting, in all. Nodes allow 900 s; a longer time here costs them their pay."""
    max_order_seconds: int = 3_600
    """How far ahead an order's deadline may lie, and how long replays are remembered."""
    max_wait_seconds: int = 600
    """How long a job may wait for a free slot."""
    hedge_share: float = 0.05
    """Share of jobs, 0 to 1, that may run at two providers because their first output is late; of each payer's jobs too."""
    min_claim_window: int = 3_600
    """How long an order must leave its provider to claim."""
    job_keep_seconds: int = 2_592_000
    """Retention: how long ended jobs and their receipts are kept. The last receipts of each tab stay."""
    match_log_seconds: float = 1
    """Time between two signed heads of the match log, at most 30: clients expect each match under a head within 60 s."""
    match_log_keep_seconds: int = 2_592_000
    """How long the match log keeps the contents of its leaves; their hashes stay. 30 days by default."""
    match_log_lost: bool = False
    """Whether the database with this key's match log is lost for good, so that the coordinator may begin another log."""
    response_seconds: float = 600
    """How long the sealed response of a job with an idempotency key is kept after the job's end."""
    response_mib: int = 4
    """The longest response that is kept."""
    responses_mib: int = 256
    """Memory for all kept responses."""
    responses_mib_per_payer: int = 32
    """Memory for the kept responses of one payer."""
    responses_disk_mib: int = 1_024
    """Disk space for kept responses in the database, which also keeps those that memory has no room for."""
    linger_seconds: float = 60
    """How long such a job may continue after its client's connection was lost."""
    max_connections: int = 10_000
    """Concurrent connections of clients and nodes together."""
    max_connections_per_address: int = 1_000
    """An address is an IPv4 address or the /64 network of an IPv6 address."""
    trusted_proxies: tuple[str, ...] = ()
    """Addresses and networks of the reverse proxies that name their clients in X-Forwarded-For."""
    max_nodes_per_address: int = 64
    max_jobs_per_address: int = 256
    max_jobs_per_payer: int = 256
    max_jobs_per_node: int = 1_024
    max_waiting_jobs: int = 10_000
    """Jobs that wait for a free slot."""
    max_waiting_jobs_per_model: int = 5_000
    """Of one model. Batch jobs may be half of them."""
    max_waiting_mib: int = 256
    """Memory for the requests of all jobs that wait. Those of one model may take half."""
    max_body_mib: int = 32
    """The largest body of a job, sealed."""
    max_bodies_mib: int = 1_024
    """Memory for the bodies of all running jobs."""
    max_bodies_mib_per_address: int = 128
    """Memory for the bodies of the running jobs of one address."""
    requests_per_second: float = 100
    """Requests of one address to all routes but /v1/jobs; the burst is 20 times that."""
    refused_requests_per_second: float = 2
    """Refused requests of one address (unreadable, badly signed, unfunded), after a burst of `refused_requests_burst`."""
    refused_requests_burst: int = 100
    tiers: tuple[Tier, ...] = ()
    """[[tiers]]: limits by a payer's wallet, or by what it settled; see docs/how-to/access-tiers.md."""
    log_json: bool | None = None
    """Whether the log is JSON; None: text at a terminal, JSON elsewhere."""
    log_level: str = "info"
    tracing: TracingSettings = field(default_factory=TracingSettings)
    """Where traces of jobs go; nowhere by default."""

    def __post_init__(self) -> None:
        """Raises BadMessage that names the setting, what was expected, and the value."""
        for names, expected in ((_SECONDS, "seconds above 0"), (_ABOVE_ZERO, "a number above 0")):
            for name in names:
                if not getattr(self, name) > 0:
                    raise BadMessage(f"config: {name}: expected {expected}, got {getattr(self, name)}")
        for name in _FROM_ZERO:
            if not getattr(self, name) >= 0:
                raise BadMessage(f"config: {name}: expected a number from 0, got {getattr(self, name)}")
        if not 0 <= self.hedge_share <= 1:
            raise BadMessage(f"config: hedge_share: expected a share from 0 to 1, got {self.hedge_share}")
        self._check_match_log()
        self._check_retention()
        self._check_tiers()
        TrustedProxies.parse(self.trusted_proxies)
        self._check_replicas()
        if not 0 <= self.fee_bps <= 10_000:
            raise BadMessage(f"config: fee_bps: expected 0 to 10000 hundredths of a percent, got {self.fee_bps}")
        if not self.public_urls and not is_loopback(self.host):
            raise BadMessage(
                f"config: public_urls: must name the addresses at which nodes reach this coordinator, since host = {self.host!r}"
                ' accepts connections from other machines; for example public_urls = ["https://coordinator.example"]'
            )
        try:
            endpoints_of(self.public_urls)
        except BadMessage as error:
            raise BadMessage(f"config: public_urls: {error}") from None

    def _check_replicas(self) -> None:
        database = parse_database_url(self.db, "config: db")
        if not 1 <= self.workers <= MAX_REPLICAS:
            raise BadMessage(f"config: workers: expected 1 to {MAX_REPLICAS}, got {self.workers}")
        if self.bus is None:
            given = "workers" if self.workers > 1 else "replica_url" if self.replica_url is not None else None
            if given is not None:
                raise BadMessage(
                    f"config: bus: must name a NATS server, such as nats://127.0.0.1:4222, since `{given}` is set: several"
                    " processes share a PostgreSQL database (`db`) and tell each other over NATS what is momentary"
                )
            return
        parse_nats_address(self.bus, "config: bus")
        if not database.drivername.startswith("postgresql"):
            raise BadMessage(
                "config: db: expected postgresql://USER:PASSWORD@HOST/DATABASE, since `bus` makes this process one of several"
                " replicas on one database; got SQLite. Without `bus`, one process runs on SQLite"
            )
        self._check_replica_url()

    def _check_replica_url(self) -> None:
        port = f"{self.workers} processes need a URL each, so it must contain {{port}}"
        if self.replica_url is None:
            first = urlsplit(self.public_urls[0]) if self.public_urls else None
            if first is not None and self.workers > 1 and first.path.strip("/"):
                raise BadMessage(f"config: replica_url: required, since public_urls[0] has a path; {port}")
            return
        if self.workers > 1 and "{port}" not in self.replica_url:
            raise BadMessage(f"config: replica_url: {port}, got {self.replica_url[:200]!r}")
        url = read_replica_url(self.replica_url.replace("{port}", "1"), "config: replica_url")
        if not self.public_urls or is_loopback(urlsplit(self.public_urls[0]).hostname or ""):
            return
        public = self.public_urls[0]
        if split_allowed(public, [url], Reach.NETWORK)[1]:
            raise BadMessage(
                f"config: replica_url: whoever was given {public} would not use {self.replica_url[:200]!r}: a replica has "
                "https if that URL has it, the path of that URL or none, and no address by which a machine reaches itself"
            )

    def own_url(self, port: int) -> str:
        """Returns the URL at which clients and nodes reach the replica that listens on `port`, which no other replica has."""
        if self.replica_url is not None:
            return read_replica_url(self.replica_url.replace("{port}", str(port)), "config: replica_url")
        host = f"[{self.host}]" if ":" in self.host else self.host
        url = self.public_urls[0] if self.public_urls else f"http://{host}:{port}"
        if self.public_urls and self.workers > 1:
            parts = urlsplit(url)
            name = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
            url = f"{parts.scheme}://{name}:{port}"
        return read_replica_url(url, "config: public_urls[0]")

    def _check_tiers(self) -> None:
        Tiers(self.tiers)
        for tier in self.tiers:
            if tier.discount is not None:
                raise BadMessage(f"config: tiers: {tier.name}: discount: providers set the prices; a node's config may have it")

    def _check_match_log(self) -> None:
        between, keep = self.match_log_seconds, self.match_log_keep_seconds
        if not MIN_HEAD_SECONDS <= between <= MERGE_SECONDS / 2:
            text = f"clients expect each match under a signed head within {MERGE_SECONDS} s"
            high = MERGE_SECONDS // 2
            raise BadMessage(f"config: match_log_seconds: expected {MIN_HEAD_SECONDS} to {high}, since {text}; got {between}")
        if keep < MIN_KEEP_SECONDS:
            raise BadMessage(f"config: match_log_keep_seconds: expected at least {MIN_KEEP_SECONDS} (a day), got {keep}")

    def _check_retention(self) -> None:
        """What is remembered of a job must last as long as its order and its response can be sent again."""
        least, keep = max(self.max_order_seconds, int(self.response_seconds)), self.job_keep_seconds
        if keep < least:
            text = f"expected at least {least}, the longer of max_order_seconds and response_seconds, got {keep}"
            raise BadMessage(f"config: job_keep_seconds: {text}")

    @property
    def access(self) -> Tiers:
        """The access tiers."""
        return Tiers(self.tiers)

    @property
    def retention(self) -> Retention:
        """How long and how much of responses the jobs route keeps."""
        return Retention(
            seconds=self.response_seconds,
            response_bytes=self.response_mib << 20,
            total_bytes=self.responses_mib << 20,
            linger_seconds=self.linger_seconds,
            payer_bytes=self.responses_mib_per_payer << 20,
            stored_bytes=self.responses_disk_mib << 20,
        )

    @property
    def job_limits(self) -> JobLimits:
        """Deadlines and rules of the market."""
        return JobLimits(
            accept=self.accept_timeout,
            first_output=self.first_output_timeout,
            idle=self.idle_timeout,
            total=self.job_timeout,
            reader=self.reader_timeout,
            max_order_seconds=self.max_order_seconds,
            max_wait=self.max_wait_seconds,
            hedge_share=self.hedge_share,
            min_claim_window=self.min_claim_window,
            match_log_seconds=self.match_log_seconds,
            match_log_keep_seconds=self.match_log_keep_seconds,
            match_log_lost=self.match_log_lost,
            fee_bps=self.fee_bps,
            jobs_per_payer=self.max_jobs_per_payer,
            jobs_per_node=self.max_jobs_per_node,
            max_waiting=self.max_waiting_jobs,
            max_waiting_per_model=self.max_waiting_jobs_per_model,
            max_waiting_bytes=self.max_waiting_mib << 20,
        )

    @property
    def connection_limits(self) -> ConnectionLimits:
        """Limits of the HTTP server."""
        return ConnectionLimits(
            connections=self.max_connections,
            per_address=self.max_connections_per_address,
            proxies=TrustedProxies.parse(self.trusted_proxies),
        )

    @property
    def intake_limits(self) -> IntakeLimits:
        """Limits of request bodies and request rates."""
        return IntakeLimits(
            body_bytes=self.max_body_mib << 20,
            total_body_bytes=self.max_bodies_mib << 20,
            refused_per_second=self.refused_requests_per_second,
            refused_burst=float(self.refused_requests_burst),
            address_bytes=self.max_bodies_mib_per_address << 20,
            jobs_per_address=self.max_jobs_per_address,
            requests_per_second=self.requests_per_second,
        )

    @property
    def endpoints(self) -> frozenset[str]:
        """The hosts and ports of `public_urls`, in the form that nodes sign."""
        return endpoints_of(self.public_urls)


def load_config(path: Path | None = None, flags: Mapping[str, object] | None = None) -> CoordinatorConfig:
    """Reads a TOML file, then TALLY_COORDINATOR_* environment variables, then flags; later sources win. Raises BadMessage."""
    return load(CoordinatorConfig, path, prefix=ENV_PREFIX, flags=flags)
