"""Asks coordinators over HTTP where this node has links to them: for proofs of their match logs, and for ratings.

A coordinator lists its replicas by name, and owns the names. So an answer comes from no nearer address than a link may have.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import urlencode, urlsplit

import aiohttp
import orjson

from tallystick.protocol.errors import Code, Unavailable, error_from_json
from tallystick.protocol.log_monitor import LogQuestion
from tallystick.protocol.proxies import uses_proxy
from tallystick.protocol.replicas import Reach
from tallystick.runtime.replica_resolver import ReplicaResolver

ASK_SECONDS = 20.0
MAX_ANSWER = 1 << 20
"""Bytes of an answer. An honest one with proofs has some 100 KiB."""


@dataclass(frozen=True, slots=True)
class CoordinatorHttp:
    """`limit_of`: the nearest address to which a URL may lead."""

    limit_of: Callable[[str], Reach]

    async def ask_proof(self, url: str, question: LogQuestion) -> object:
        """Asks a coordinator for proofs. Raises Unavailable, and the coordinator's own error."""
        return await self.fetch_json(f"{url}/v1/log/proof?{urlencode(question.query)}", "no proof from its match log")

    async def fetch_json(self, url: str, problem: str = "no answer") -> object:
        """A coordinator's answer of at most MAX_ANSWER bytes. Raises Unavailable, and the coordinator's own error."""
        timeout = aiohttp.ClientTimeout(total=ASK_SECONDS)
        connector = aiohttp.TCPConnector(resolver=ReplicaResolver((), limit=self.limit_of(url)))
        try:
            async with (
                aiohttp.ClientSession(connector=connector, timeout=timeout, trust_env=uses_proxy(url)) as session,
                session.get(url, allow_redirects=False) as response,
            ):
                body = await response.content.read(MAX_ANSWER)
                while len(body) < MAX_ANSWER and (more := await response.content.read(MAX_ANSWER - len(body))):
                    body += more
                raw: object = orjson.loads(body)
                if response.status != 200:
                    raise error_from_json(raw, response.status)
                return raw
        except (aiohttp.ClientError, TimeoutError, OSError, orjson.JSONDecodeError) as error:
            cause = getattr(error, "os_error", error)  # aiohttp leaves its text out
            text = f"coordinator {base_of(url)}: {problem}: {str(cause) or type(error).__name__}"
            raise Unavailable(Code.COORDINATOR_UNAVAILABLE, text) from error


def base_url(url: str) -> str:
    """The HTTP address of a coordinator, given that of its node link."""
    parts = urlsplit(url)
    scheme = {"ws": "http", "wss": "https"}.get(parts.scheme, parts.scheme)
    return f"{scheme}://{parts.netloc}{parts.path.removesuffix('/v1/node')}"


def base_of(url: str) -> str:
    """A URL's scheme and host, for messages."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.hostname}" + (f":{parts.port}" if parts.port else "")
