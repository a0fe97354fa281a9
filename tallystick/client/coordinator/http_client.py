"""Client of the coordinator's HTTP API: typed methods over one pooled aiohttp session. Every wait has a deadline.

Every request goes to the first replica of the coordinator that answers (transport.py).
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
from collections.abc import AsyncIterator, Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

import aiohttp
import structlog

from tallystick.client.config import ClientConfig
from tallystick.client.coordinator.access_tier import AccessTier
from tallystick.client.coordinator.bounded_json import MAX_RAW
from tallystick.client.coordinator.info import RemoteJob
from tallystick.client.coordinator.job_stream import HttpJobStream, JobStream, LinkLost, StreamLost
from tallystick.client.coordinator.model_offers import ModelOffer
from tallystick.client.coordinator.transport import (
    AdmittedElsewhere,
    Authorize,
    ConnectionLost,
    CoordinatorTransport,
    NotSent,
    coordinator_fault,
)
from tallystick.protocol.audit_reports import ReportRequest, read_ack
from tallystick.protocol.criteria import MAX_CANDIDATES
from tallystick.protocol.eip712 import Domain, Signed, Verified, read_signed
from tallystick.protocol.errors import BadMessage, Code, Fault, Refusal, TallyError, error_from_json
from tallystick.protocol.jobs import State
from tallystick.protocol.link import LateReceipt, read_ask
from tallystick.protocol.log_monitor import LogQuestion
from tallystick.protocol.messages import Ask, Inquiry, LogHead, Receipt, ReportAck
from tallystick.protocol.types import ZERO_ADDRESS, Address, JobId
from tallystick.protocol.wire import Candidate

if TYPE_CHECKING:
    from tallystick.client.coordinator.job_links import JobLinks

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

SealReport = Callable[[ReportRequest, Domain], ReportRequest]
STREAMED_BYTES = 1 << 20
"""Size in bytes from which a submission is sent in pieces, to keep the event loop responsive."""


class CoordinatorClient(CoordinatorTransport):
    """A connection pool to one coordinator, with all its replicas.

    Its methods raise Unavailable if the coordinator does not answer, and the coordinator's own error if it refuses. `authorize`
    gives the header for reading and cancelling jobs; without it those methods raise Refusal.
    """

    def __init__(
        self, url: str, config: ClientConfig, authorize: Authorize | None = None, account: Address = ZERO_ADDRESS
    ) -> None:
        """See CoordinatorTransport."""
        super().__init__(url, config, authorize, account)
        self.seal: SealReport | None = None
        """Seals reports as the coordinator's own; None for everybody but the coordinator."""
        self._links: dict[str, JobLinks] = {}
        self._homes: dict[JobId, str] = {}
        """Where the latest jobs were submitted."""

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for links in list(self._links.values()):
            await links.close()
        self._links.clear()
        await super().__aexit__(kind, error, trace)

    def _links_of(self, url: str) -> JobLinks:
        if url not in self._links:
            from tallystick.client.coordinator.job_links import JobLinks  # noqa: PLC0415 - slow to import, and most commands place no job

            self._links[url] = JobLinks(url, self._config, None if url in self.replicas.seeds else self.check_listed)
        return self._links[url]

    async def _list_changed(self) -> None:
        """Closes links to replicas that are no longer listed."""
        for url, links in list(self._links.items()):
            if url not in self.replicas.urls and not links.in_use:
                del self._links[url]
                await links.close()

    def _quiet_since(self, url: str) -> float | None:
        """See CoordinatorTransport."""
        links = self._links.get(url)
        return None if links is None else links.quiet_since

    def _give_up(self, url: str) -> None:
        """See CoordinatorTransport."""
        super()._give_up(url)
        if url in self._links:
            self._links[url].abandon("this replica of the coordinator hangs")

    async def _pages(self, path: str, member: str, **query: str) -> AsyncIterator[Any]:
        """Yields the items of a listing, page by page, within MAX_PAGES, MAX_RAW and request_seconds."""
        clock = asyncio.get_running_loop().time
        until = clock() + self._config.request_seconds
        seen, size = {""}, 0
        after = ""
        for _ in range(MAX_PAGES):
            asked = urlencode(query | ({"after": after} if after else {}))
            raw, fetched = await self.fetch("GET", f"{path}?{asked}" if asked else path)
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
        for entry in _listed(await self.request_json("POST", "/v1/shortlist", demand), "asks"):
            with contextlib.suppress(BadMessage):
                asks.append(_read_ask(entry))
            if len(asks) == MAX_CANDIDATES:
                break
        return asks

    async def explain(self, demand: dict[str, Any]) -> list[dict[str, Any]]:
        """POST /v1/explain: every ask for a model, with the reason if it is not shortlisted. Non-objects are left out."""
        return (await self.explain_access(demand))[0]

    async def explain_access(self, demand: dict[str, Any]) -> tuple[list[dict[str, Any]], AccessTier | None]:
        """What `explain` returns, and the payer's access tier at this coordinator; None if it has none."""
        answer = await self.request_json("POST", "/v1/explain", demand)
        listed = [entry for entry in _listed(answer, "asks") if isinstance(entry, dict)][:MAX_EXPLAINED]
        return listed, AccessTier.from_json(answer.get("tier") if isinstance(answer, dict) else None)

    async def log_proof(self, question: LogQuestion) -> object:
        """GET /v1/log/proof: the newest head of the match log, with proofs. Unchecked; LogMonitor checks it."""
        raw: object = await self.request_json("GET", f"/v1/log/proof?{urlencode(question.query)}")
        return raw

    async def log_entries(self, start: int) -> object:
        """GET /v1/log/entries: a page of the match log, from leaf `start` on. Unchecked."""
        raw: object = await self.request_json("GET", f"/v1/log/entries?start={start}")
        return raw

    async def log_head(self) -> Signed[LogHead]:
        """GET /v1/log/head: the newest head of the match log."""
        with coordinator_fault():
            return read_signed(LogHead, await self.request_json("GET", "/v1/log/head"), "head")

    async def connected(self, provider: Address) -> bool:
        """GET /v1/providers/{provider}/why: returns whether the provider's node is connected; its asks are valid only then."""
        raw = await self.request_json("GET", f"/v1/providers/{provider}/why?limit=1")
        if not isinstance(raw, dict) or not isinstance(raw.get("connected"), bool):
            raise BadMessage("why.connected: expected true or false", fault=Fault.COORDINATOR)
        return bool(raw["connected"])

    async def receipts(self, inquiry: Signed[Inquiry]) -> list[LateReceipt]:
        """POST /v1/tabs: this payer's last receipts of a provider, with their orders. Malformed entries are left out."""
        receipts: list[LateReceipt] = []
        for entry in _listed(await self.request_json("POST", "/v1/tabs", inquiry.to_json()), "receipts")[:MAX_RECEIPTS]:
            with contextlib.suppress(BadMessage):
                receipts.append(LateReceipt.from_json(entry))
        return receipts

    async def report(self, request: ReportRequest) -> Verified[ReportAck]:
        """Reports an audit. Returns the coordinator's signed promise to log the report; raises BadMessage for another answer."""
        domain = (await self.info()).domain
        if self.seal is not None:
            request = self.seal(request, domain)
        raw = await self.request_json("POST", "/v1/reports", request.to_json())
        with coordinator_fault():
            return read_ack(raw, request, domain)

    async def submit(self, submission: bytes, *, linger: int | None = None) -> JobStream:
        """Submits a job and returns its open stream. Raises the coordinator's refusal, NotSent or ConnectionLost.

        It goes on the link, or by POST /v1/jobs if it is large or there is no link. `linger`: seconds for which the job goes on
        after a lost connection; the same submission then resumes it. If the connection is lost before anything came, the same
        submission is sent once more, as the coordinator may have just closed it, and then to the next replica. The job's id keeps
        it from running twice.
        """
        self.client()  # raises if the market is not open
        doubt: list[ConnectionLost] = []
        job = JobId(submission[1:17])

        async def attempt(url: str) -> JobStream:
            try:
                stream = await self._submit_at(url, submission, linger)
            except ConnectionLost as error:
                doubt.append(error)
                raise
            except Refusal as error:
                if doubt and error.code is Code.ORDER_REPLAYED:
                    raise AdmittedElsewhere(keyed=linger is not None) from error
                raise
            self._homes[job] = url
            if len(self._homes) > self._config.max_jobs:
                del self._homes[next(iter(self._homes))]
            return stream

        try:
            return await self.at_first(attempt)
        except AdmittedElsewhere:
            raise
        except TallyError as error:
            if doubt and error is not doubt[0]:  # another replica refuses what the first one may have admitted
                raise doubt[0] from error
            raise

    async def _submit_at(self, url: str, submission: bytes, linger: int | None) -> JobStream:
        """Submits a job to one replica, and once more if the connection was lost before anything came."""
        keyed = linger is not None
        try:
            return await self._submit_once(url, submission, linger)
        except (aiohttp.ServerDisconnectedError, LinkLost) as lost:
            if self.replicas.hangs(url, asyncio.get_running_loop().time()):
                raise ConnectionLost(f"coordinator {url}: {lost}", keyed=keyed) from lost
            try:
                return await self._submit_once(url, submission, linger)
            except StreamLost as error:
                raise ConnectionLost(f"coordinator {url}: {error}", keyed=keyed) from error
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                raise ConnectionLost(str(self.transport_error(url, error)), keyed=keyed) from error
            except Refusal as error:
                if error.code is Code.ORDER_REPLAYED:
                    raise AdmittedElsewhere(keyed=keyed) from error
                if error.code is Code.ORDER_EXPIRED:  # the first one may have been admitted before
                    raise ConnectionLost(f"coordinator {url}: {lost}", keyed=keyed) from error
                raise
        except StreamLost as error:
            raise ConnectionLost(f"coordinator {url}: {error}", keyed=keyed) from error
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            failure = self.transport_error(url, error)
            raise failure if isinstance(failure, NotSent) else ConnectionLost(str(failure), keyed=keyed) from error

    async def add_orders(self, job: JobId, candidates: Sequence[Candidate]) -> None:
        """POST /v1/jobs/{id}/orders: adds orders to a job that waits for a free slot. Raises TallyError."""
        listed = [base64.b64encode(candidate.to_bytes()).decode() for candidate in candidates]
        await self.fetch("POST", f"/v1/jobs/{job.hex()}/orders", {"candidates": listed}, self._homes.get(job))

    async def _submit_once(self, url: str, submission: bytes, linger: int | None) -> JobStream:
        link = await self._links_of(url).find(len(submission), self.connect_seconds)
        if link is not None:
            if self.replicas.is_replicated:
                self.watch.watch(url)
            return await link.submit(submission, linger)
        return HttpJobStream(await self._post(url, submission, linger), lambda: self.watching(url))

    async def _post(self, url: str, submission: bytes, linger: int | None) -> aiohttp.ClientResponse:
        timeout = self.timeout(total=self._config.run_seconds, sock_read=self._config.stream_idle_seconds)
        data = submission if len(submission) < STREAMED_BYTES else io.BytesIO(submission)
        headers = {"content-type": JOB_TYPE}
        if linger is not None:
            headers["x-tally-linger"] = str(linger)
        target = f"{url}/v1/jobs"
        async with self.watching(url):
            response = await self.client().post(target, data=data, headers=headers, timeout=timeout, allow_redirects=False)
        if response.status == 200:
            return response
        async with response:
            self.check_direct(url, response)
            raw, _ = await self.read(url, response)
            if response.status >= 500 and not (isinstance(raw, dict) and isinstance(raw.get("error"), dict)):
                text = f"a proxy before the coordinator answered with status {response.status}; the job may have been admitted"
                raise ConnectionLost(text, keyed=linger is not None)
            raise error_from_json(raw, response.status)

    async def _authorized(self, method: str, path: str, home: str | None = None) -> Any:
        if self.authorize is None:
            text = "the coordinator shows a job only to its payer: give the wallet's password (--password-file), or use --offline"
            raise Refusal(Code.UNAUTHENTICATED, text)
        return (await self.fetch(method, path, home=home, authorization=await self.authorize()))[0]

    async def cancel(self, job: JobId) -> None:
        """POST /v1/jobs/{id}/cancel, as the payer. Raises Refusal (unauthenticated) without the payer's key."""
        await self._authorized("POST", f"/v1/jobs/{job.hex()}/cancel", self._homes.get(job))

    async def job(self, job: JobId) -> RemoteJob:
        """GET /v1/jobs/{id}, as the payer. Raises Refusal: unknown_job if the coordinator never admitted it, unauthenticated
        without the payer's key.
        """
        raw = await self._authorized("GET", f"/v1/jobs/{job.hex()}", self._homes.get(job))
        with coordinator_fault():
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
