"""What one exchange with a server tells of this machine's clock and of the server's certificate, as health checks."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from tallystick.protocol.health import LIVENESS_PATH, CheckResult, Health

PROBE_SECONDS = 5.0
MAX_HEAD = 16_384
SKEW_SECONDS = 20
"""Clocks that differ by more get a warning: orders and asks expire by the clock."""
CERTIFICATE_DAYS = 14
"""Certificates that expire sooner get a warning."""
_DAY = 86_400
TELL_OPERATOR = "tell the coordinator's operator to renew it"


@dataclass(frozen=True, slots=True)
class PeerState:
    """How many seconds the peer's clock is ahead of this machine's; how many seconds its certificate is still valid. None: the
    peer does not tell.
    """

    ahead: float | None
    certificate: float | None

    def checks(self) -> dict[str, CheckResult]:
        """The states of `clock` and `certificate`, as far as they are known. Both are warnings at worst."""
        results = {}
        if self.ahead is not None:
            results["clock"] = _clock(self.ahead)
        if self.certificate is not None:
            results["certificate"] = check_certificate(self.certificate)
        return results


def _clock(ahead: float) -> CheckResult:
    seconds = round(abs(ahead))
    if seconds <= SKEW_SECONDS:
        return CheckResult(Health.PASS, value=seconds, unit="s")
    side = "behind" if ahead > 0 else "ahead of"
    text = f"this machine's clock is {seconds} s {side} the coordinator's"
    remedy = "set the clock (`timedatectl set-ntp true`), or tell the coordinator's operator"
    return CheckResult(Health.WARN, text, remedy, seconds, "s")


def check_certificate(valid: float, whose: str = "the coordinator's", remedy: str = TELL_OPERATOR) -> CheckResult:
    """The state of a certificate that is valid for so many seconds more."""
    days = int(valid // _DAY)
    if days >= CERTIFICATE_DAYS:
        return CheckResult(Health.PASS, value=days, unit="days")
    text = f"{whose} certificate expires in {days} days"
    return CheckResult(Health.WARN, text, remedy, days, "days")


async def probe_peer(url: str, *, now: Callable[[], float] = time.time, context: ssl.SSLContext | None = None) -> PeerState:
    """Asks the server at `url` (http, https, ws or wss) for its liveness. `now` is Unix time.

    A server that does not answer tells nothing, and neither does one behind a proxy: other checks say why.
    """
    try:
        parts = urlsplit(url)
        secure = parts.scheme in {"https", "wss"}
        port = parts.port or (443 if secure else 80)
        if not parts.hostname or _has_proxy("https" if secure else "http", parts.hostname):
            return PeerState(None, None)
        async with asyncio.timeout(PROBE_SECONDS):
            return await _exchange(parts.hostname, port, (context or ssl.create_default_context()) if secure else None, now)
    except (OSError, TimeoutError, ValueError, EOFError):  # ssl.SSLError is an OSError
        return PeerState(None, None)


def _has_proxy(scheme: str, host: str) -> bool:
    proxies = getproxies()
    return (scheme in proxies or "all" in proxies) and not proxy_bypass(host)


async def _exchange(host: str, port: int, context: ssl.SSLContext | None, now: Callable[[], float]) -> PeerState:
    reader, writer = await asyncio.open_connection(host, port, ssl=context, limit=MAX_HEAD)
    try:
        certificate = _remaining(writer.get_extra_info("peercert"), now())
        name = f"[{host}]" if ":" in host else host
        writer.write(f"GET {LIVENESS_PATH} HTTP/1.1\r\nHost: {name}:{port}\r\nConnection: close\r\n\r\n".encode())
        await writer.drain()
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.LimitOverrunError:
            return PeerState(None, certificate)
        return PeerState(_ahead(head, now()), certificate)
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


def _remaining(certificate: Any, now: float) -> float | None:
    ends = (certificate or {}).get("notAfter")
    return None if ends is None else ssl.cert_time_to_seconds(ends) - now


def _ahead(head: bytes, now: float) -> float | None:
    """The difference of the answer's Date header (RFC 9110, 6.6.1), which is cut to seconds, to `now`."""
    for line in head.decode("latin-1").split("\r\n")[1:]:
        name, _, value = line.partition(":")
        if name.strip().lower() == "date":
            try:
                return parsedate_to_datetime(value.strip()).timestamp() + 0.5 - now
            except (ValueError, TypeError, OverflowError):
                return None
    return None
