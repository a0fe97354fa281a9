"""Client of the coordinator's HTTP API: typed methods over one pooled aiohttp session. Every wait has a deadline."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import urlencode

import aiohttp
import orjson
import structlog

from tallystick.client.config import ClientConfig
from tallystick.client.coordinator.bounded_json import MAX_RAW, BoundedJsonReader
from tallystick.client.coordinator.job_stream import HttpJobStream, JobStream, LinkLost, StreamLost
from tallystick.client.coordinator.model_offers import MAX_NUMBER, ModelOffer
from tallystick.protocol.audit_reports import ReportRequest, read_ack
from tallystick.protocol.criteria import MAX_CANDIDATES
from tallystick.protocol.eip712 import Domain, Signed, Verified, read_signed
from tallystick.protocol.errors import BadMessage, Code, Fault, Refusal, Unavailable, error_from_json
from tallystick.protocol.jobs import State
from tallystick.protocol.json_members import read_count, read_text
from tallystick.protocol.link import MAX_CHAIN_ID, LateReceipt, read_ask
from tallystick.protocol.log_monitor import LogQuestion
from tallystick.protocol.messages import Ask, Inquiry, LogHead, Receipt, ReportAck
from tallystick.protocol.proxies import uses_proxy
from tallystick.protocol.replicas import Replica, read_replicas
from tallystick.protocol.types import Address, JobId, parse_address
from tallystick.protocol.versions import check_protocol
from tallystick.protocol.wire import Candidate

if TYPE_CHECKING:
    from tallystick.client.coordinator.job_link import JobLinks

log = structlog.get_logger()
JOB_TYPE = "application/vnd.tallystick.job"

MAX_RECEIPTS = 64
"""Receipts of a tab that are read."""

MAX_PAGES = 256
"""Pages of a listing that are fetched. MAX_RAW bounds their total bytes, and the config's request_seconds their total time."""

MAX_CURSOR = 4_096
"""Characters of the cursor that names the next page."""

MAX_EXPLAINED = 1_024
"""Asks that one explanation may contain."""

Authorize = Callable[[], Awaitable[str]]
"""Returns the Authorization header for reading and cancelling a payer's jobs; see protocol/access.py."""

KEEPALIVE_SECONDS = 4
"""Seconds for which an idle connection is kept open. A coordinator closes its end after five seconds."""

SealReport = Callable[[ReportRequest, Domain], ReportRequest]
STREAMED_BYTES = 1 << 20
"""Size in bytes from which a submission is sent in pieces, to keep the event loop responsive."""


class NotSent(Unavailable):
    """The coordinator could not be reached, and nothing was sent."""


class ConnectionLost(Unavailable):
    """The connection failed during a submission, and it is unknown whether the coordinator has the job.

    A repeated request may buy the job twice, unless it has the same idempotency key. Only then `retry` is true.
    """

    def __init__(self, message: str, *, keyed: bool) -> None:
        super().__init__(Code.COORDINATOR_UNAVAILABLE, message)
        self.retry = keyed


@dataclass(frozen=True, slots=True)
class CoordinatorInfo:
    """The coordinator's account and fee (basis points), and the deployment on which it settles.

    `block` is the block of the contract's creation, 0 if it was not told. `rpc` is the chain's endpoint if that is on the
    coordinator's own machine. `replicas`: the processes that serve this coordinator; empty if it is alone.
    """

    coordinator: Address
    domain: Domain
    token: Address | None
    token_decimals: int
    fee_bps: int
    block: int = 0
    rpc: str | None = None
    replicas: tuple[Replica, ...] = ()

    @classmethod
    def from_json(cls, raw: object) -> CoordinatorInfo:
        """Reads GET /v1/info. Raises BadMessage, also for a coordinator of another protocol."""
        if not isinstance(raw, dict):
            raise BadMessage("info: expected a JSON object")
        check_protocol(raw.get("protocol"), "info", "the coordinator")
        token = raw.get("token")
        chain = read_count(raw.get("chainId"), "info.chainId", high=MAX_CHAIN_ID)
        return cls(
            coordinator=parse_address(raw.get("coordinator"), "info.coordinator"),
            domain=Domain(chain, parse_address(raw.get("contract"), "info.contract")),
            token=None if token is None else parse_address(token, "info.token"),
            token_decimals=read_count(raw.get("tokenDecimals"), "info.tokenDecimals", high=255),
            fee_bps=read_count(raw.get("feeBps"), "info.feeBps", high=10_000),
            block=read_count(raw.get("block", 0), "info.block", high=MAX_NUMBER),
            rpc=None if raw.get("rpc") is None else read_text(raw["rpc"], "info.rpc"),
            replicas=read_replicas(raw.get("replicas", []), "info.replicas"),
        )


@dataclass(frozen=True, slots=True)
class RemoteJob:
    """A job as the coordinator reports it."""

    state: State
    receipt: Signed[Receipt] | None
    raw: dict[str, Any]


@contextlib.contextmanager
def _coordinator_fault() -> Iterator[None]:
    try:
        yield
    except BadMessage as error:
        error.fault = Fault.COORDINATOR
        raise


class CoordinatorClient:
    """A connection pool to one coordinator.

    Its methods raise Unavailable if the coordinator does not answer, and the coordinator's own error if it refuses. `authorize`
    gives the header for reading and cancelling jobs; without it those methods raise Refusal.
    """

    def __init__(self, url: str, config: ClientConfig, authorize: Authorize | None = None) -> None:
        self.url = url.rstrip("/")
        self._config, self.authorize = config, authorize
        self.seal: SealReport | None = None
        """Seals reports as the coordinator's own; None for everybody but the coordinator."""
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_SECONDS),
            timeout=aiohttp.ClientTimeout(total=self._config.request_seconds, connect=self._config.connect_seconds),
            read_bufsize=1 << 18,
            auto_decompress=False,
            trust_env=uses_proxy(self.url),
        )
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if "_links" in vars(self):
            await self._links.close()
        if self._session is not None:
            await self._session.close()
            self._session = None

    @cached_property
    def _links(self) -> JobLinks:
        from tallystick.client.coordinator.job_link import JobLinks  # noqa: PLC0415 - slow to import, and most commands place no job

        return JobLinks(self.url, self._config)

    def _transport_error(self, error: Exception) -> Unavailable:
        """Converts an error of the transport: NotSent if nothing was sent, otherwise Unavailable."""
        if isinstance(error, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError):
            why = getattr(getattr(error, "os_error", None), "strerror", None) or type(error).__name__
            text = f"no coordinator answers at {self.url} ({why}): start it, or correct the setting `coordinator`"
            return NotSent(Code.COORDINATOR_UNAVAILABLE, text)
        return Unavailable(Code.COORDINATOR_UNAVAILABLE, f"coordinator {self.url}: {str(error) or type(error).__name__}")

    def _client(self) -> aiohttp.ClientSession:
        if self._session is None:
            raise RuntimeError("the market is not open; use `async with Market(…) as market`")
        return self._session

    async def _request_json(self, method: str, path: str, body: object = None, **headers: str) -> Any:
        return (await self._fetch(method, path, body, **headers))[0]

    async def _fetch(self, method: str, path: str, body: object = None, **headers: str) -> tuple[Any, int]:
        """Sends a request. Returns the JSON of the response and its size in bytes."""
        all_headers = {"content-type": "application/json", "accept": "application/json"} | headers
        data = None if body is None else orjson.dumps(body)
        try:
            async with self._client().request(
                method, self.url + path, data=data, headers=all_headers, allow_redirects=False
            ) as response:
                self._check_direct(response)
                raw, size = await self._read(response)
                if response.status >= 300:
                    raise error_from_json(raw, response.status)
                return raw, size
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise self._transport_error(error) from error

    def _check_direct(self, response: aiohttp.ClientResponse) -> None:
        """Raises BadMessage for a redirect, because tokens and jobs may go only to the configured coordinator."""
        if 300 <= response.status < 400:
            location = response.headers.get("location", "nowhere")[:200]
            text = f"coordinator {self.url} redirects to {location!r}; if that is right, set `coordinator` to it"
            raise BadMessage(text, fault=Fault.COORDINATOR)

    async def _read(self, response: aiohttp.ClientResponse) -> tuple[Any, int]:
        """Returns the JSON of a response (None if it has none), with oversized list items as null, and its size in bytes."""
        reader = BoundedJsonReader()
        async for piece in response.content.iter_any():
            reader.feed(piece)
            if reader.full:
                response.close()
                break
        body = reader.close()
        if reader.dropped:
            log.warning("left out oversized items of the coordinator's list", url=self.url, items=reader.dropped)
        try:
            return orjson.loads(body) if body else None, reader.seen
        except orjson.JSONDecodeError:
            return None, reader.seen

    async def _pages(self, path: str, member: str, **query: str) -> AsyncIterator[Any]:
        """Yields the items of a listing, page by page, within MAX_PAGES, MAX_RAW and request_seconds."""
        clock = asyncio.get_running_loop().time
        until = clock() + self._config.request_seconds
        seen, size = {""}, 0
        after = ""
        for _ in range(MAX_PAGES):
            asked = urlencode(query | ({"after": after} if after else {}))
            raw, fetched = await self._fetch("GET", f"{path}?{asked}" if asked else path)
            for item in _listed(raw, member):
                yield item
            after, size = raw.get("next") or "", size + fetched
            if not after or size >= MAX_RAW or clock() >= until:
                break
            if not isinstance(after, str) or len(after) > MAX_CURSOR or after in seen:
                raise BadMessage(f"{member}.next: expected the cursor of a page not fetched before", fault=Fault.COORDINATOR)
            seen.add(after)
        if after:
            log.warning("the coordinator's list is too long; read only its beginning", url=self.url, path=path, bytes=size)

    async def info(self) -> CoordinatorInfo:
        """GET /v1/info."""
        raw = await self._request_json("GET", "/v1/info")
        with _coordinator_fault():
            return CoordinatorInfo.from_json(raw)

    async def models(self) -> list[ModelOffer]:
        """GET /v1/models, every page. Malformed models are left out."""
        offers: dict[str, ModelOffer] = {}
        async for item in self._pages("/v1/models", "data"):
            with contextlib.suppress(BadMessage):
                offer = ModelOffer.from_json(item)
                offers.setdefault(offer.id, offer)
        return list(offers.values())

    async def asks(self, model: str) -> list[Signed[Ask]]:
        """GET /v1/asks, every page: the asks for a model, cheapest first. Malformed asks are left out."""
        asks: list[Signed[Ask]] = []
        async for item in self._pages("/v1/asks", "asks", model=model):
            with contextlib.suppress(BadMessage):
                asks.append(_read_ask(item))
        return asks

    async def shortlist(self, demand: dict[str, Any]) -> list[Signed[Ask]]:
        """POST /v1/shortlist: asks, best first. Oversized and malformed asks are left out."""
        asks: list[Signed[Ask]] = []
        for entry in _listed(await self._request_json("POST", "/v1/shortlist", demand), "asks"):
            with contextlib.suppress(BadMessage):
                asks.append(_read_ask(entry))
            if len(asks) == MAX_CANDIDATES:
                break
        return asks

    async def explain(self, demand: dict[str, Any]) -> list[dict[str, Any]]:
        """POST /v1/explain: every ask for a model, with the reason if it is not shortlisted. Non-objects are left out."""
        listed = _listed(await self._request_json("POST", "/v1/explain", demand), "asks")
        return [entry for entry in listed if isinstance(entry, dict)][:MAX_EXPLAINED]

    async def log_proof(self, question: LogQuestion) -> object:
        """GET /v1/log/proof: the newest head of the match log, with proofs. Unchecked; LogMonitor checks it."""
        raw: object = await self._request_json("GET", f"/v1/log/proof?{urlencode(question.query)}")
        return raw

    async def log_entries(self, start: int) -> object:
        """GET /v1/log/entries: a page of the match log, from leaf `start` on. Unchecked."""
        raw: object = await self._request_json("GET", f"/v1/log/entries?start={start}")
        return raw

    async def log_head(self) -> Signed[LogHead]:
        """GET /v1/log/head: the newest head of the match log."""
        with _coordinator_fault():
            return read_signed(LogHead, await self._request_json("GET", "/v1/log/head"), "head")

    async def connected(self, provider: Address) -> bool:
        """GET /v1/providers/{provider}/why: returns whether the provider's node is connected; its asks are valid only then."""
        raw = await self._request_json("GET", f"/v1/providers/{provider}/why?limit=1")
        if not isinstance(raw, dict) or not isinstance(raw.get("connected"), bool):
            raise BadMessage("why.connected: expected true or false", fault=Fault.COORDINATOR)
        return bool(raw["connected"])

    async def receipts(self, inquiry: Signed[Inquiry]) -> list[LateReceipt]:
        """POST /v1/tabs: this payer's last receipts of a provider, with their orders. Malformed entries are left out."""
        receipts: list[LateReceipt] = []
        for entry in _listed(await self._request_json("POST", "/v1/tabs", inquiry.to_json()), "receipts")[:MAX_RECEIPTS]:
            with contextlib.suppress(BadMessage):
                receipts.append(LateReceipt.from_json(entry))
        return receipts

    async def report(self, request: ReportRequest) -> Verified[ReportAck]:
        """Reports an audit. Returns the coordinator's signed promise to log the report; raises BadMessage for another answer."""
        domain = (await self.info()).domain
        if self.seal is not None:
            request = self.seal(request, domain)
        raw = await self._request_json("POST", "/v1/reports", request.to_json())
        with _coordinator_fault():
            return read_ack(raw, request, domain)

    async def submit(self, submission: bytes, *, linger: int | None = None) -> JobStream:
        """Submits a job and returns its open stream. Raises the coordinator's refusal, NotSent or ConnectionLost.

        It goes on the link, or by POST /v1/jobs if it is large or there is no link. `linger`: seconds for which the job goes on
        after a lost connection; the same submission then resumes it. If the connection is lost before anything came, as the
        coordinator may have just closed it, the submission is sent once more; the job's id keeps it from running twice.
        """
        keyed = linger is not None
        try:
            return await self._submit(submission, linger)
        except (aiohttp.ServerDisconnectedError, LinkLost):
            try:
                return await self._submit(submission, linger)
            except StreamLost as error:
                raise ConnectionLost(f"coordinator {self.url}: {error}", keyed=keyed) from error
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                raise ConnectionLost(str(self._transport_error(error)), keyed=keyed) from error
            except Refusal as error:
                if error.code is Code.ORDER_REPLAYED:
                    raise ConnectionLost(
                        "the connection was lost after the coordinator had admitted the job", keyed=keyed
                    ) from error
                raise
        except StreamLost as error:
            raise ConnectionLost(f"coordinator {self.url}: {error}", keyed=keyed) from error
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            failure = self._transport_error(error)
            raise failure if isinstance(failure, NotSent) else ConnectionLost(str(failure), keyed=keyed) from error

    async def add_orders(self, job: JobId, candidates: Sequence[Candidate]) -> None:
        """POST /v1/jobs/{id}/orders: adds orders to a job that waits for a free slot. Raises TallyError."""
        listed = [base64.b64encode(candidate.to_bytes()).decode() for candidate in candidates]
        await self._request_json("POST", f"/v1/jobs/{job.hex()}/orders", {"candidates": listed})

    async def _submit(self, submission: bytes, linger: int | None) -> JobStream:
        self._client()  # raises if the market is not open
        link = await self._links.find(len(submission))
        if link is not None:
            return await link.submit(submission, linger)
        return HttpJobStream(await self._post(submission, linger))

    async def _post(self, submission: bytes, linger: int | None) -> aiohttp.ClientResponse:
        timeout = aiohttp.ClientTimeout(
            total=self._config.run_seconds, connect=self._config.connect_seconds, sock_read=self._config.stream_idle_seconds
        )
        data = submission if len(submission) < STREAMED_BYTES else io.BytesIO(submission)
        headers = {"content-type": JOB_TYPE}
        if linger is not None:
            headers["x-tally-linger"] = str(linger)
        url = f"{self.url}/v1/jobs"
        response = await self._client().post(url, data=data, headers=headers, timeout=timeout, allow_redirects=False)
        if response.status == 200:
            return response
        async with response:
            self._check_direct(response)
            raw, _ = await self._read(response)
            if response.status >= 500 and not (isinstance(raw, dict) and isinstance(raw.get("error"), dict)):
                text = f"a proxy before the coordinator answered with status {response.status}; the job may have been admitted"
                raise ConnectionLost(text, keyed=linger is not None)
            raise error_from_json(raw, response.status)

    async def _authorized(self, method: str, path: str) -> Any:
        if self.authorize is None:
            text = "the coordinator shows a job only to its payer: give the wallet's password (--password-file), or use --offline"
            raise Refusal(Code.UNAUTHENTICATED, text)
        return await self._request_json(method, path, authorization=await self.authorize())

    async def cancel(self, job: JobId) -> None:
        """POST /v1/jobs/{id}/cancel, as the payer. Raises Refusal (unauthenticated) without the payer's key."""
        await self._authorized("POST", f"/v1/jobs/{job.hex()}/cancel")

    async def job(self, job: JobId) -> RemoteJob:
        """GET /v1/jobs/{id}, as the payer. Raises Refusal: unknown_job if the coordinator never admitted it, unauthenticated
        without the payer's key.
        """
        raw = await self._authorized("GET", f"/v1/jobs/{job.hex()}")
        with _coordinator_fault():
            try:
                receipt = raw["receipt"]
                return RemoteJob(State(raw["state"]), None if receipt is None else read_signed(Receipt, receipt), raw)
            except (KeyError, TypeError, ValueError):
                raise BadMessage("job: expected an object with the state and receipt of a job") from None


def _listed(raw: Any, member: str) -> list[Any]:
    listed = raw.get(member) if isinstance(raw, dict) else None
    if not isinstance(listed, list):
        raise BadMessage(f"{member}: expected a list", fault=Fault.COORDINATOR)
    return listed


def _read_ask(entry: object) -> Signed[Ask]:
    if not isinstance(entry, dict):
        raise BadMessage("ask: expected an object with an ask")
    return read_ask(entry.get("ask"))
