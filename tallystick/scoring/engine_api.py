"""The HTTP calls of the scoring adapters: JSON in, JSON out, with a deadline and a limit of bytes.

Error texts quote nothing of requests and answers, because they may travel unsealed.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import aiohttp

from tallystick.protocol.engine_errors import BUSY, CLIENT_FAULTS
from tallystick.protocol.errors import BadMessage, Code, Fault, TallyError, Unavailable
from tallystick.protocol.lenient_json import dump_lenient, load_lenient

CALL_SECONDS = 300.0
"""Timeout of one call, which may read a long prompt on a slow machine."""
MAX_ANSWER_BYTES = 64 << 20


class NoSuchRoute(Exception):
    """The engine lacks the endpoint, or answers it in another form."""


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Adds the name of an engine, or of a referee, to errors that lack it."""
    try:
        yield
    except TallyError as error:
        if name not in error.public_text:
            error.args = (f"{name}: {error.public_text}",)
        raise


class EngineApi:
    """An engine's endpoints. `root`: the URL before its own endpoints; `api`: the URL before /completions, as SDKs mean it.

    `headers` returns the headers of a call, such as that of the API key.
    """

    def __init__(
        self,
        session: aiohttp.ClientSession,
        root: str,
        api: str,
        headers: Callable[[], Mapping[str, str]] = dict,
        seconds: float = CALL_SECONDS,
    ) -> None:
        self._session, self._root, self._api, self._headers, self._seconds = session, root, api, headers, seconds

    @classmethod
    @asynccontextmanager
    async def open(cls, url: str, api_key: str | None = None, seconds: float = CALL_SECONDS) -> AsyncIterator[EngineApi]:
        """The engine at a base URL, with or without /v1."""
        root = url.rstrip("/").removesuffix("/v1")
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        async with aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar()) as session:
            yield cls(session, root, root + "/v1", lambda: headers, seconds)

    async def post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """The JSON object that the engine answers. Paths under /v1 are those of OpenAI's API.

        Raises NoSuchRoute; BadMessage if the engine refuses this request; Unavailable if it is busy, down or broken.
        """
        return await self._call("POST", path, dump_lenient(dict(body)))

    async def get(self, path: str) -> dict[str, Any]:
        """The JSON object that the engine answers; empty if it has no such endpoint. Raises Unavailable."""
        try:
            return await self._call("GET", path, None)
        except (NoSuchRoute, BadMessage):
            return {}

    async def _call(self, method: str, path: str, body: bytes | None) -> dict[str, Any]:
        address = self._api + path.removeprefix("/v1") if path.startswith("/v1/") else self._root + path
        headers = {"content-type": "application/json", **self._headers()}
        try:
            async with (
                asyncio.timeout(self._seconds),
                self._session.request(method, address, data=body, headers=headers, allow_redirects=False) as response,
            ):
                answer = await _read(response)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            text = f"the engine cannot be asked for scores: {type(error).__name__}"
            raise Unavailable(Code.ENGINE_UNAVAILABLE, text, fault=Fault.ENGINE) from error
        _check_status(response.status)
        try:
            document = load_lenient(answer)
        except ValueError:
            raise NoSuchRoute from None
        if not isinstance(document, dict):
            raise NoSuchRoute
        return document


async def _read(response: aiohttp.ClientResponse) -> bytes:
    answer = bytearray()
    while part := await response.content.readany():
        answer += part
        if len(answer) > MAX_ANSWER_BYTES:
            text = f"the engine answered a request for scores with more than {MAX_ANSWER_BYTES} bytes"
            raise Unavailable(Code.ENGINE_UNAVAILABLE, text, fault=Fault.ENGINE)
    return bytes(answer)


def _check_status(status: int) -> None:
    if status == 200:
        return
    if status in BUSY:
        raise Unavailable(Code.NODE_BUSY, f"the engine is busy ({status})", fault=Fault.ENGINE)
    if status in (404, 405, 501):
        raise NoSuchRoute
    if status in CLIENT_FAULTS:
        raise BadMessage(
            f"the engine refused to score this text ({status}): it may be longer than the engine's context, or have tokens that "
            "the model lacks"
        )
    text = f"the engine answered a request for scores with the status {status}"
    raise Unavailable(Code.ENGINE_UNAVAILABLE, text, fault=Fault.ENGINE)
