"""Watches the match logs of this node's coordinators: an order that was dispatched here must be logged as a match.

A coordinator that shows orders without logging them leaves evidence in the node's folder `match-log`. The newest head of a log
goes with each response to the client, and the client's comes with its request, both sealed: a coordinator that shows its clients
and its nodes two logs cannot keep them apart. Nodes tell the coordinator the heads that they saw, too, in their beats.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlencode, urlsplit

import aiohttp
import orjson

from node.ports import Link
from tallystick.protocol.eip712 import Domain, Signed
from tallystick.protocol.errors import Code, Unavailable, error_from_json
from tallystick.protocol.log_monitor import LogQuestion
from tallystick.protocol.match_log import Match
from tallystick.protocol.messages import Order
from tallystick.protocol.proxies import uses_proxy
from tallystick.protocol.types import Address
from tallystick.runtime.log_watch import LogWatch

ASK_SECONDS = 20.0
MAX_ANSWER = 1 << 20
"""Bytes of an answer with proofs. An honest one has some 100 KiB."""


class MatchWatch:
    """See the module's docstring. `url_of`: the URL of an open link to a coordinator; empty without one. `folder`: where
    evidence is kept.
    """

    def __init__(self, domain: Domain, folder: Path, url_of: Callable[[Address], str]) -> None:
        self._domain, self._folder, self._url_of = domain, folder, url_of
        self._watches: dict[Address, LogWatch] = {}
        self._urls: dict[Address, str] = {}

    def on_match(self, link: Link, match: Match, order: Signed[Order]) -> None:
        """Takes a match that the admission checked, and gives the link the newest head of the log."""
        watch = self._watch_of(link)
        watch.add_match(match, order)
        link.log_head = watch.packed_head

    def on_connected(self, link: Link) -> None:
        """Watches the log of a link's coordinator from what an earlier process kept of it."""
        self._watch_of(link).start()

    def on_client_head(self, link: Link, packed: bytes) -> None:
        """Takes the head that a client passed on in its request, which is untrusted."""
        self._watch_of(link).add_head(packed)

    def head_of(self, coordinator: Address) -> bytes:
        """The newest head that is known of a coordinator's log, as it is passed on; empty if none is known."""
        watch = self._watches.get(coordinator)
        return b"" if watch is None else watch.packed_head

    def _watch_of(self, link: Link) -> LogWatch:
        coordinator = link.coordinator
        self._remember_url(coordinator)
        watch = self._watches.get(coordinator)
        if watch is None:
            watch = self._watches[coordinator] = LogWatch(
                self._domain, coordinator, self._folder, lambda question: self._ask(coordinator, question)
            )
        return watch

    async def _ask(self, coordinator: Address, question: LogQuestion) -> object:
        """Asks the coordinator over any open link to it, or where it was last. Raises TallyError."""
        self._remember_url(coordinator)
        return await ask_proof(self._urls[coordinator], question)

    def _remember_url(self, coordinator: Address) -> None:
        if url := self._url_of(coordinator):
            self._urls[coordinator] = base_url(url)

    async def close(self) -> None:
        """Stops watching; matches that were not checked yet are checked by the next process."""
        await asyncio.gather(*(watch.close() for watch in self._watches.values()))


def base_url(url: str) -> str:
    """The HTTP address of a coordinator, given that of its node link."""
    parts = urlsplit(url)
    scheme = {"ws": "http", "wss": "https"}.get(parts.scheme, parts.scheme)
    return f"{scheme}://{parts.netloc}{parts.path.removesuffix('/v1/node')}"


def base_of(url: str) -> str:
    """A URL's scheme and host, for messages."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.hostname}" + (f":{parts.port}" if parts.port else "")


async def ask_proof(url: str, question: LogQuestion) -> object:
    """Asks a coordinator for proofs. Raises Unavailable, and the coordinator's own error."""
    return await fetch_json(f"{url}/v1/log/proof?{urlencode(question.query)}", "no proof from its match log")


async def fetch_json(url: str, problem: str = "no answer") -> object:
    """A coordinator's answer of at most MAX_ANSWER bytes. Raises Unavailable, and the coordinator's own error."""
    timeout = aiohttp.ClientTimeout(total=ASK_SECONDS)
    try:
        async with (
            aiohttp.ClientSession(timeout=timeout, trust_env=uses_proxy(url)) as session,
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
        text = f"coordinator {base_of(url)}: {problem}: {str(error) or type(error).__name__}"
        raise Unavailable(Code.COORDINATOR_UNAVAILABLE, text) from error
