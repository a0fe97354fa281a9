"""Requests to a coordinator over one pooled aiohttp session: to the first of its replicas that answers. Each has a deadline.

The replicas are tried in the payer's order (replica_set.py). A listed replica is used once it has said that it is this
coordinator.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator
from types import TracebackType
from typing import Any, Self, TypeVar

import aiohttp
import orjson
import structlog

from tallystick.client.config import ClientConfig
from tallystick.client.coordinator.bounded_json import BoundedJsonReader
from tallystick.client.coordinator.info import CoordinatorInfo
from tallystick.client.coordinator.replica_set import ReplicaSet
from tallystick.client.coordinator.replica_watch import ReplicaWatch
from tallystick.protocol.eip712 import Domain
from tallystick.protocol.errors import BadMessage, Code, Fault, TallyError, Unavailable, error_from_json
from tallystick.protocol.proxies import uses_proxy
from tallystick.protocol.types import ZERO_ADDRESS, Address
from tallystick.runtime.replica_resolver import ReplicaResolver

log = structlog.get_logger()
Authorize = Callable[[], Awaitable[str]]
"""Returns the Authorization header for reading and cancelling a payer's jobs; see protocol/access.py."""

KEEPALIVE_SECONDS = 4
"""Seconds for which an idle connection is kept open. A coordinator closes its end after five seconds."""

REPLICA_CONNECT_SECONDS = 2.0
"""Seconds within which a replica must take a connection, if there are others."""
HEALTH_SECONDS = 1.5
"""Seconds within which a replica that seems to hang must say that it does not."""
T = TypeVar("T")


class NotSent(Unavailable):
    """The coordinator could not be reached, and nothing was sent."""


class ConnectionLost(Unavailable):
    """The connection failed during a submission, and it is unknown whether the coordinator has the job.

    A repeated request may buy the job twice, unless it has the same idempotency key. Only then `retry` is true.
    """

    def __init__(self, message: str, *, keyed: bool) -> None:
        super().__init__(Code.COORDINATOR_UNAVAILABLE, message)
        self.retry = keyed


class AdmittedElsewhere(ConnectionLost):
    """The connection failed during a submission, and the coordinator says that it has the job."""

    def __init__(self, *, keyed: bool) -> None:
        super().__init__("the connection was lost after the coordinator had admitted the job", keyed=keyed)


@contextlib.contextmanager
def coordinator_fault() -> Iterator[None]:
    """Makes a malformed message the coordinator's fault."""
    try:
        yield
    except BadMessage as error:
        error.fault = Fault.COORDINATOR
        raise


class CoordinatorTransport:
    """A connection pool to one coordinator, with all its replicas. An async context manager."""

    def __init__(
        self, url: str, config: ClientConfig, authorize: Authorize | None = None, account: Address = ZERO_ADDRESS
    ) -> None:
        """`authorize` gives the header for reading and cancelling jobs; `account` is the payer, whose replica is used."""
        self.url, self._config, self.authorize = url.rstrip("/"), config, authorize
        self.replicas = ReplicaSet((self.url, *config.coordinator_urls), account)
        self._identity: tuple[Address, Domain] | None = None
        self._verified: set[str] = set()
        """Listed replicas that said that they are this coordinator."""
        self._refreshing: asyncio.Task[None] | None = None
        self.watch = ReplicaWatch(has_left=self._has_left, quiet_since=self._quiet_since, give_up=self._give_up)
        self._session: aiohttp.ClientSession | None = None
        self._resolver = ReplicaResolver(self.replicas.seeds)

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_SECONDS, resolver=self._resolver),
            timeout=aiohttp.ClientTimeout(total=self._config.request_seconds, connect=self._config.connect_seconds),
            read_bufsize=1 << 18,
            auto_decompress=False,
            trust_env=uses_proxy(self.url),
        )
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.watch.close()
        if self._refreshing is not None:
            self._refreshing.cancel()
            await asyncio.gather(self._refreshing, return_exceptions=True)
        if self._session is not None:
            await self._session.close()
            self._session = None

    # Replicas

    async def at_first(self, attempt: Callable[[str], Awaitable[T]], home: str | None = None) -> T:
        """Makes an attempt at each URL in turn until the coordinator answers. Raises the last Unavailable if it never does.

        `home`: the URL to begin with.
        """
        failure: Unavailable | None = None
        clock = asyncio.get_running_loop().time
        for url in self.replicas.order(clock(), home):
            try:
                if not await self._is_ours(url):
                    continue
                result = await attempt(url)
            except AdmittedElsewhere:
                raise
            except Unavailable as error:
                if error.code is not Code.COORDINATOR_UNAVAILABLE:
                    raise
                failure = error
                if self.replicas.has_several:
                    log.info("a replica of the coordinator does not answer", url=url, reason=str(error))
                    self.replicas.lose(url, clock())
            else:
                self._refresh_list()
                return result
        raise failure or NotSent(
            Code.COORDINATOR_UNAVAILABLE, f"no replica of the coordinator answers; it was first at {self.url}"
        )

    async def _is_ours(self, url: str) -> bool:
        """Whether a URL may be used: a configured one, or a replica that says that it is this coordinator. Raises Unavailable."""
        if url in self.replicas.seeds or url in self._verified or self._identity is None:
            return True
        info = await self._info_at(url)
        if (info.coordinator, info.domain) == self._identity:
            self._verified.add(url)
            return True
        log.warning("a listed replica is another coordinator's and is not used", url=url, coordinator=info.coordinator)
        self.replicas.refuse(url)
        return False

    def _refresh_list(self) -> None:
        """Reads the list of replicas again in the background, if it is time to."""
        now = asyncio.get_running_loop().time()
        if self._refreshing is None and self.replicas.is_stale(now):
            self.replicas.read_at = now
            self._refreshing = asyncio.create_task(self._refresh(), name="replicas")
            self._refreshing.add_done_callback(self._refreshed)

    def _refreshed(self, _task: asyncio.Task[None]) -> None:
        self._refreshing = None

    async def _refresh(self) -> None:
        try:
            await self.info()
        except TallyError as error:
            log.info("the list of the coordinator's replicas was not read", reason=str(error))
        await self._list_changed()

    async def _list_changed(self) -> None:
        """Called after the list of replicas was read again."""

    async def _has_left(self, url: str) -> bool:
        """Whether a replica does not answer, and another one says that it is not among them any more."""
        timeout = aiohttp.ClientTimeout(total=HEALTH_SECONDS)
        with contextlib.suppress(aiohttp.ClientError, TimeoutError, OSError):
            async with self.client().get(f"{url}/v1/health", timeout=timeout, allow_redirects=False):
                return False
        for other in self.replicas.others(url, asyncio.get_running_loop().time()):
            with contextlib.suppress(TallyError, TimeoutError):
                async with asyncio.timeout(HEALTH_SECONDS):
                    if not await self._is_ours(other):
                        continue
                    await self._info_at(other)
                    return self.replicas.has_left(url)
        return False

    def _quiet_since(self, _url: str) -> float | None:
        """Since when nothing has come on a connection that jobs wait on; None if none do."""
        return None

    def _give_up(self, url: str) -> None:
        """Ends what waits at a replica that hangs."""
        self.replicas.lose(url, asyncio.get_running_loop().time(), hangs=True)

    def _learn(self, url: str, info: CoordinatorInfo) -> None:
        """Takes the list of replicas from a configured URL, or from a replica of the same coordinator."""
        identity = info.coordinator, info.domain
        if identity != self._identity:
            if self._identity is not None and url not in self.replicas.seeds:
                return
            self._identity = identity
            self._verified.clear()
        self.replicas.read_at = asyncio.get_running_loop().time()
        if refused := self.replicas.learn(info.replicas, self._resolver.limit):
            text = (
                "replicas not used: plain http after a https coordinator, another path, or an address of this machine or network"
            )
            log.warning(text, coordinator=self.url, urls=refused)
        self._verified &= set(self.replicas.urls)

    def check_listed(self, address: str) -> None:
        """Raises OSError for an address that a listed replica may not have."""
        self._resolver.check(address)

    def transport_error(self, url: str, error: Exception) -> Unavailable:
        """Converts an error of the transport: NotSent if nothing was sent, otherwise Unavailable."""
        if isinstance(error, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError):
            why = getattr(getattr(error, "os_error", None), "strerror", None) or type(error).__name__
            text = f"no coordinator answers at {url} ({why}): start it, or correct the setting `coordinator`"
            return NotSent(Code.COORDINATOR_UNAVAILABLE, text)
        return Unavailable(Code.COORDINATOR_UNAVAILABLE, f"coordinator {url}: {str(error) or type(error).__name__}")

    def client(self) -> aiohttp.ClientSession:
        """The open session. Raises RuntimeError if there is none."""
        if self._session is None:
            raise RuntimeError("the market is not open; use `async with Market(…) as market`")
        return self._session

    async def request_json(self, method: str, path: str, body: object = None, **headers: str) -> Any:
        """Does what `fetch` does, and returns the JSON alone."""
        return (await self.fetch(method, path, body, **headers))[0]

    async def fetch(
        self, method: str, path: str, body: object = None, home: str | None = None, **headers: str
    ) -> tuple[Any, int]:
        """Sends a request, which may arrive at several replicas. Returns the JSON of the response and its size in bytes."""
        return await self.at_first(lambda url: self.fetch_at(url, method, path, body, **headers), home)

    async def fetch_at(self, url: str, method: str, path: str, body: object = None, **headers: str) -> tuple[Any, int]:
        """Sends a request to one replica. Returns the JSON of the response and its size in bytes."""
        all_headers = {"content-type": "application/json", "accept": "application/json"} | headers
        data = None if body is None else orjson.dumps(body)
        try:
            async with (
                self.watching(url),
                self.client().request(
                    method, url + path, data=data, headers=all_headers, allow_redirects=False, timeout=self.timeout()
                ) as response,
            ):
                self.check_direct(url, response)
                raw, size = await self.read(url, response)
                if response.status >= 300:
                    raise error_from_json(raw, response.status)
                return raw, size
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise self.transport_error(url, error) from error

    def watching(self, url: str) -> contextlib.AbstractAsyncContextManager[None]:
        """Wraps a request: it raises TimeoutError if its replica turns out to hang."""
        return self.watch.waiting(url) if self.replicas.is_replicated else contextlib.nullcontext()

    @property
    def connect_seconds(self) -> float:
        """Seconds to connect within. A replica that does not answer is left soon if there are others."""
        seconds = self._config.connect_seconds
        return min(seconds, REPLICA_CONNECT_SECONDS) if self.replicas.has_several else seconds

    def timeout(self, **changes: float) -> aiohttp.ClientTimeout:
        """The deadlines of a request."""
        return aiohttp.ClientTimeout(**({"total": self._config.request_seconds, "connect": self.connect_seconds} | changes))

    def check_direct(self, url: str, response: aiohttp.ClientResponse) -> None:
        """Raises BadMessage for a redirect, because tokens and jobs may go only to the configured coordinator."""
        if 300 <= response.status < 400:
            location = response.headers.get("location", "nowhere")[:200]
            text = f"coordinator {url} redirects to {location!r}; if that is right, set `coordinator` to it"
            raise BadMessage(text, fault=Fault.COORDINATOR)

    async def read(self, url: str, response: aiohttp.ClientResponse) -> tuple[Any, int]:
        """Returns the JSON of a response (None if it has none), with oversized list items as null, and its size in bytes."""
        reader = BoundedJsonReader()
        async for piece in response.content.iter_any():
            reader.feed(piece)
            if reader.full:
                response.close()
                break
        body = reader.close()
        if reader.dropped:
            log.warning("left out oversized items of the coordinator's list", url=url, items=reader.dropped)
        try:
            return orjson.loads(body) if body else None, reader.seen
        except orjson.JSONDecodeError:
            return None, reader.seen

    async def info(self) -> CoordinatorInfo:
        """GET /v1/info."""
        return await self.at_first(self._info_at)

    async def _info_at(self, url: str) -> CoordinatorInfo:
        raw, _ = await self.fetch_at(url, "GET", "/v1/info")
        with coordinator_fault():
            info = CoordinatorInfo.from_json(raw)
        self._learn(url, info)
        return info
