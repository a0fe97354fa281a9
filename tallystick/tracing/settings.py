"""The settings of tracing: the table `[tracing]` of a config, and OpenTelemetry's environment variables, which win over it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from tallystick.protocol.errors import BadMessage

ENDPOINT, TRACES_ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"
HEADERS, TRACES_HEADERS = "OTEL_EXPORTER_OTLP_HEADERS", "OTEL_EXPORTER_OTLP_TRACES_HEADERS"
PROTOCOL, TRACES_PROTOCOL = "OTEL_EXPORTER_OTLP_PROTOCOL", "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"
EXPORTER, DISABLED = "OTEL_TRACES_EXPORTER", "OTEL_SDK_DISABLED"
TRACES_PATH = "/v1/traces"
MAX_FLUSH_SECONDS = 60.0
_MAX_HEADERS_BYTES = 16_384


@dataclass(frozen=True, kw_only=True)
class TracingSettings:
    """Where traces go. Without an endpoint here or in the environment, tracing is off. Raises BadMessage for impossible values.

    `endpoint`: the base URL of an OTLP backend over HTTP, to which /v1/traces is appended. `headers_file`: a file with one
    `NAME: VALUE` a line, which nobody else can read. `sample_ratio`: the share of traces, 0 to 1, that are recorded. What a
    caller asks not to record is not. `flush_seconds`: how long a stop waits for the backend.
    """

    endpoint: str | None = None
    headers_file: Path | None = None
    sample_ratio: float = 1.0
    flush_seconds: float = 5.0

    def __post_init__(self) -> None:
        if self.endpoint is not None:
            check_endpoint(self.endpoint, "config: tracing.endpoint")
        if not 0 <= self.sample_ratio <= 1:
            raise BadMessage(f"config: tracing.sample_ratio: expected a share from 0 to 1, got {self.sample_ratio}")
        if not 0 <= self.flush_seconds <= MAX_FLUSH_SECONDS:
            raise BadMessage(
                f"config: tracing.flush_seconds: expected 0 to {MAX_FLUSH_SECONDS:g} seconds, got {self.flush_seconds}"
            )


@dataclass(frozen=True, kw_only=True)
class ClientTracing(TracingSettings):
    """The settings of a gateway or an SDK.

    `share_trace_ids`: whether each job carries its trace id to the coordinator and the provider, which then see which jobs belong
    together. `capture_content`: whether spans have the prompts and answers of this user.
    """

    share_trace_ids: bool = False
    capture_content: bool = False


@dataclass(frozen=True, kw_only=True)
class NodeTracing(TracingSettings):
    """The settings of a node. `engine_header`: whether requests to its engines have the header `traceparent`."""

    engine_header: bool = False


def check_endpoint(url: str, where: str) -> None:
    """Raises BadMessage for a URL that traces cannot be sent to, without quoting it: it may contain a key."""
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        valid = False
    if not valid or parts.query or parts.fragment:
        raise BadMessage(f"{where}: expected an http:// or https:// URL without a query, such as https://otel.example:4318")
    if parts.username is not None or parts.password is not None:
        raise BadMessage(f"{where}: expected no user or password in the URL; put an Authorization header into headers_file")


def is_on(settings: TracingSettings, environment: Mapping[str, str]) -> bool:
    """Whether traces are exported. OTEL_SDK_DISABLED=true and OTEL_TRACES_EXPORTER=none switch it off."""
    if environment.get(DISABLED, "").strip().lower() == "true" or environment.get(EXPORTER, "").strip().lower() == "none":
        return False
    return settings.endpoint is not None or has_endpoint(environment)


def has_endpoint(environment: Mapping[str, str]) -> bool:
    """Whether the environment names an endpoint."""
    return bool(environment.get(ENDPOINT) or environment.get(TRACES_ENDPOINT))


def check_environment(environment: Mapping[str, str]) -> None:
    """Raises BadMessage for variables that ask for what this exporter does not do."""
    for name in (ENDPOINT, TRACES_ENDPOINT):
        if environment.get(name):
            check_endpoint(environment[name], f"environment variable {name}")
    protocol = (environment.get(TRACES_PROTOCOL) or environment.get(PROTOCOL) or "http/protobuf").strip()
    if protocol != "http/protobuf":
        name = TRACES_PROTOCOL if environment.get(TRACES_PROTOCOL) else PROTOCOL
        raise BadMessage(
            f"environment variable {name}: expected http/protobuf, got {protocol!r:.40}; point it at the HTTP port, 4318"
        )
    exporter = environment.get(EXPORTER, "otlp").strip() or "otlp"
    if exporter != "otlp":
        raise BadMessage(f"environment variable {EXPORTER}: expected otlp or none, got {exporter!r:.40}")


def read_headers(path: Path) -> dict[str, str]:
    """The headers in a file. Raises BadMessage, which quotes no value, also for a file that others can read."""
    where = f"config: tracing.headers_file: {path}"
    try:
        if path.stat().st_mode & 0o077:
            raise BadMessage(f"{where} can be read by others; run: chmod 600 {path}")
        text = path.read_bytes()[: _MAX_HEADERS_BYTES + 1].decode()
    except (OSError, ValueError) as error:
        raise BadMessage(f"{where}: {error.strerror if isinstance(error, OSError) else 'not a text'}") from None
    if len(text.encode()) > _MAX_HEADERS_BYTES:
        raise BadMessage(f"{where}: expected at most {_MAX_HEADERS_BYTES} bytes")
    headers: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        name, separator, value = line.partition(":")
        name, value = name.strip(), value.strip()
        if not separator or not name.replace("-", "").replace("_", "").isalnum() or not name.isascii():
            raise BadMessage(f'{where}: line {number}: expected NAME: VALUE, such as "Authorization: Basic …"')
        if not value or not value.isascii() or not value.isprintable():
            raise BadMessage(f"{where}: line {number}: {name}: expected a value of printable ASCII characters")
        headers[name.lower()] = value
    if not headers:
        raise BadMessage(f"{where}: expected at least one line NAME: VALUE")
    return headers


def headers_in(environment: Mapping[str, str]) -> bool:
    """Whether the environment has headers for the exporter."""
    return bool(environment.get(HEADERS) or environment.get(TRACES_HEADERS))
