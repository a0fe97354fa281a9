"""The coordinator's HTTP API as typed calls over one pooled aiohttp session. Every wait has a deadline."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import aiohttp
import orjson

from tallystick.client.config import ClientConfig
from tallystick.protocol.eip712 import Domain, Signed, read_signed
from tallystick.protocol.errors import BadMessage, Code, Fault, Refusal, Unavailable, from_public
from tallystick.protocol.jobs import State
from tallystick.protocol.link import LateReceipt
from tallystick.protocol.messages import Ask, Inquiry, Receipt
from tallystick.protocol.types import Address, JobId, parse_address
from tallystick.protocol.wire import MAX_CANDIDATES

JOB_TYPE = "application/vnd.tallystick.job"
MAX_CONTROL = 8 * 1024 * 1024
"""Bytes of a control answer (models, shortlist, job state); more is refused unread."""


MAX_RECEIPTS = 64
"""Receipts of a tab that are looked at."""

KEPT_SECONDS = 4
"""How long an idle connection is kept: less than the five seconds after which a coordinator closes its end."""

LARGE = 1 << 20
"""Bytes from which a submission is sent piece by piece, so that the event loop goes on meanwhile."""


class NotSent(Unavailable):
    """The coordinator cannot be reached: nothing was sent."""


class Broken(Unavailable):
    """The connection failed on the way: whether the coordinator has the request is not known."""


@dataclass(frozen=True, slots=True)
class Info:
    """Who the coordinator says it is, and the deployment that it settles on."""

    coordinator: Address
    domain: Domain
    token: Address | None
    token_decimals: int
    fee_bps: int

    @classmethod
    def from_json(cls, raw: object) -> Info:
        """Reads GET /v1/info. Raises BadMessage."""
        if not isinstance(raw, dict):
            raise BadMessage("info: expected a JSON object")
        token = raw.get("token")
        return cls(
            coordinator=parse_address(raw.get("coordinator"), "info.coordinator"),
            domain=Domain(_whole(raw, "chainId"), parse_address(raw.get("contract"), "info.contract")),
            token=None if token is None else parse_address(token, "info.token"),
            token_decimals=_whole(raw, "tokenDecimals"),
            fee_bps=_whole(raw, "feeBps"),
        )


@dataclass(frozen=True, slots=True)
class ModelOffer:
    """A model on offer: how many providers, how many of them free now, the lowest prices (base units per 1,000,000 tokens)."""

    id: str
    providers: int
    live: int
    input_price: int
    cached_input_price: int
    output_price: int
    context_tokens: int
    max_output_tokens: int
    tokens_per_second: int = 0
    first_token_ms: int = 0
    """The best that its providers measured; 0 where none has yet."""

    @classmethod
    def from_json(cls, raw: object) -> ModelOffer:
        """Reads an entry of GET /v1/models. Raises BadMessage."""
        try:
            if not isinstance(raw, dict) or not isinstance(raw["id"], str):
                raise BadMessage("models: expected an object with an id")
            speeds = (int(raw.get(name, 0)) for name in _MODEL_SPEEDS)
            return cls(raw["id"], *(int(raw[name]) for name in _MODEL_NUMBERS), *speeds)
        except (KeyError, TypeError, ValueError) as error:
            raise BadMessage(f"models: {error}") from None

    def to_json(self) -> dict[str, Any]:
        """The wire form."""
        values = (self.providers, self.live, self.input_price, self.cached_input_price, self.output_price)
        told = zip(_MODEL_NUMBERS, (*values, self.context_tokens, self.max_output_tokens), strict=True)
        speeds = dict(zip(_MODEL_SPEEDS, (self.tokens_per_second, self.first_token_ms), strict=True))
        return {"id": self.id} | {name: str(value) if name.endswith("Price") else value for name, value in told} | speeds


_MODEL_NUMBERS = ("providers", "live", "inputPrice", "cachedInputPrice", "outputPrice", "contextTokens", "maxOutputTokens")
_MODEL_SPEEDS = ("tokensPerSecond", "firstTokenMs")


@dataclass(frozen=True, slots=True)
class RemoteJob:
    """A job as the coordinator tells it."""

    state: State
    receipt: Signed[Receipt] | None
    raw: dict[str, Any]


def _whole(raw: dict[str, Any], name: str) -> int:
    value = raw.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise BadMessage(f"info.{name}: expected a whole number")
    return value


@contextlib.contextmanager
def _its_fault() -> Iterator[None]:
    try:
        yield
    except BadMessage as error:
        error.fault = Fault.COORDINATOR
        raise


class Coordinator:
    """A connection pool to one coordinator. Raises Unavailable where it does not answer, and what it refuses with."""

    def __init__(self, url: str, config: ClientConfig) -> None:
        self.url = url.rstrip("/")
        self._config = config
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEPT_SECONDS),
            timeout=aiohttp.ClientTimeout(total=self._config.control_seconds, connect=self._config.connect_seconds),
            read_bufsize=1 << 18,
            auto_decompress=False,
        )
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    def unavailable(self, error: Exception) -> Unavailable:
        """A transport failure, told as what it means."""
        if isinstance(error, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError):
            why = getattr(getattr(error, "os_error", None), "strerror", None) or type(error).__name__
            text = f"no coordinator answers at {self.url} ({why}): it is not running, or elsewhere (setting `coordinator`)"
            return NotSent(Code.COORDINATOR_UNAVAILABLE, text)
        return Broken(Code.COORDINATOR_UNAVAILABLE, f"coordinator {self.url}: {str(error) or type(error).__name__}")

    def _client(self) -> aiohttp.ClientSession:
        if self._session is None:
            raise RuntimeError("the market is not open; use `async with Market(…) as market`")
        return self._session

    async def _call(self, method: str, path: str, body: object = None) -> Any:
        headers = {"content-type": "application/json", "accept": "application/json"}
        data = None if body is None else orjson.dumps(body)
        try:
            async with self._client().request(method, self.url + path, data=data, headers=headers) as response:
                raw = await self._read(response)
                if response.status >= 300:
                    raise from_public(raw, response.status)
                return raw
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise self.unavailable(error) from error

    async def _read(self, response: aiohttp.ClientResponse) -> Any:
        body = bytearray()
        async for piece in response.content.iter_any():
            body += piece
            if len(body) > MAX_CONTROL:
                raise BadMessage(f"coordinator: an answer longer than {MAX_CONTROL} bytes", fault=Fault.COORDINATOR)
        try:
            return orjson.loads(body) if body else None
        except orjson.JSONDecodeError:
            return None

    async def info(self) -> Info:
        """GET /v1/info."""
        raw = await self._call("GET", "/v1/info")
        with _its_fault():
            return Info.from_json(raw)

    async def models(self) -> list[ModelOffer]:
        """GET /v1/models."""
        raw = await self._call("GET", "/v1/models")
        data = raw.get("data") if isinstance(raw, dict) else None
        if not isinstance(data, list):
            raise BadMessage("models: expected a list", fault=Fault.COORDINATOR)
        with _its_fault():
            return [ModelOffer.from_json(entry) for entry in data]

    async def shortlist(self, demand: dict[str, Any]) -> list[Signed[Ask]]:
        """POST /v1/shortlist: asks, best first. One that does not parse is left out."""
        raw = await self._call("POST", "/v1/shortlist", demand)
        listed = raw.get("asks") if isinstance(raw, dict) else None
        if not isinstance(listed, list):
            raise BadMessage("shortlist: expected a list of asks", fault=Fault.COORDINATOR)
        found: list[Signed[Ask]] = []
        for entry in listed[:MAX_CANDIDATES]:
            with contextlib.suppress(BadMessage, KeyError, TypeError):
                found.append(read_signed(Ask, entry["ask"]))
        return found

    async def explain(self, demand: dict[str, Any]) -> list[dict[str, Any]]:
        """POST /v1/explain: every ask for a model, with why it would not be on the shortlist."""
        raw = await self._call("POST", "/v1/explain", demand)
        listed = raw.get("asks") if isinstance(raw, dict) else None
        if not isinstance(listed, list) or not all(isinstance(entry, dict) for entry in listed):
            raise BadMessage("explain: expected a list of asks", fault=Fault.COORDINATOR)
        return listed

    async def receipts(self, question: Signed[Inquiry]) -> list[LateReceipt]:
        """POST /v1/tabs: this payer's last receipts of a provider, with their orders. One that does not parse is left out."""
        raw = await self._call("POST", "/v1/tabs", question.to_json())
        listed = raw.get("receipts") if isinstance(raw, dict) else None
        if not isinstance(listed, list):
            raise BadMessage("tabs: expected a list of receipts", fault=Fault.COORDINATOR)
        found: list[LateReceipt] = []
        for entry in listed[:MAX_RECEIPTS]:
            with contextlib.suppress(BadMessage):
                found.append(LateReceipt.from_json(entry))
        return found

    async def submit(self, submission: bytes, *, linger: int | None = None) -> aiohttp.ClientResponse:
        """POST /v1/jobs: the open stream of an admitted job. Raises the refusal, NotSent or Broken.

        `linger`: seconds that the job goes on after a lost connection; the same bytes then bring the same answer.

        A pooled connection that the coordinator just closed is replaced once; the job's id keeps it from running twice.
        """
        try:
            return await self._submit(submission, linger)
        except aiohttp.ServerDisconnectedError:
            try:
                return await self._submit(submission, linger)
            except aiohttp.ClientError as error:
                raise Broken(Code.COORDINATOR_UNAVAILABLE, str(self.unavailable(error))) from error
            except Refusal as error:
                if error.code is Code.ORDER_REPLAYED:
                    text = "the connection broke after the coordinator had taken the job"
                    raise Broken(Code.COORDINATOR_UNAVAILABLE, text) from error
                raise
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise self.unavailable(error) from error

    async def _submit(self, submission: bytes, linger: int | None) -> aiohttp.ClientResponse:
        timeout = aiohttp.ClientTimeout(
            total=self._config.run_seconds, connect=self._config.connect_seconds, sock_read=self._config.idle_seconds
        )
        data = submission if len(submission) < LARGE else io.BytesIO(submission)
        headers = {"content-type": JOB_TYPE}
        if linger is not None:
            headers["x-tally-linger"] = str(linger)
        response = await self._client().post(f"{self.url}/v1/jobs", data=data, headers=headers, timeout=timeout)
        if response.status == 200:
            return response
        async with response:
            raw = await self._read(response)
            if response.status >= 500 and not (isinstance(raw, dict) and isinstance(raw.get("error"), dict)):
                text = f"something between here and the coordinator answered {response.status}; the job may have been taken"
                raise Broken(Code.COORDINATOR_UNAVAILABLE, text)
            raise from_public(raw, response.status)

    async def cancel(self, job: JobId) -> None:
        """POST /v1/jobs/{id}/cancel."""
        await self._call("POST", f"/v1/jobs/{job.hex()}/cancel")

    async def job(self, job: JobId) -> RemoteJob:
        """GET /v1/jobs/{id}. Raises Refusal (unknown_job) if the coordinator never admitted it."""
        raw = await self._call("GET", f"/v1/jobs/{job.hex()}")
        with _its_fault():
            try:
                receipt = raw["receipt"]
                return RemoteJob(State(raw["state"]), None if receipt is None else read_signed(Receipt, receipt), raw)
            except (KeyError, TypeError, ValueError):
                raise BadMessage("job: not the state of a job") from None
