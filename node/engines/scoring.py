"""The scoring route of an engine: its adapter answers the request with the engine's own endpoints (`tallystick.scoring`)."""

from __future__ import annotations

from collections.abc import AsyncGenerator

import aiohttp
import orjson

from node.domain.requests import EngineRequest
from node.engines.addresses import BaseAddress
from node.engines.api_key import Key, auth_headers
from node.engines.engine_settings import EngineSettings
from node.ports import EngineEvent, ResponseEnd, ResponseStart
from tallystick.protocol.errors import BadMessage, Code, Fault, Unavailable
from tallystick.protocol.lenient_json import dump_lenient
from tallystick.protocol.routes import JSON
from tallystick.protocol.token_scores import ScoreRequest
from tallystick.protocol.usage_reports import ReportedUsage
from tallystick.scoring.detect import find_scorer
from tallystick.scoring.engine_api import EngineApi, NoSuchRoute
from tallystick.scoring.scorer import Scorer


def scoring_api(session: aiohttp.ClientSession, base: BaseAddress, key: Key) -> EngineApi:
    """The endpoints of an engine for its adapter."""
    return EngineApi(session, base.root, base.api, lambda: auth_headers(key))


class ScoringRoute:
    """Answers scoring requests. It finds out the adapter of each model at the first request. Call `close` at the end."""

    def __init__(self, settings: EngineSettings) -> None:
        self._settings = settings
        self._scorers: dict[str, Scorer] = {}
        self._session: aiohttp.ClientSession | None = None

    async def close(self) -> None:
        """Closes all connections."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def answer(self, request: EngineRequest, base: BaseAddress) -> AsyncGenerator[EngineEvent, None]:
        """See ports.Engine. Only the tokens that were read are charged, all as input."""
        scoring = ScoreRequest.from_json(orjson.loads(request.body))
        try:
            scorer = await self._find(scoring.model, base)
            request.on_sent()
            response = await scorer.score(scoring)
        except BadMessage as error:
            document = {"error": {"message": str(error), "type": "invalid_request_error", "param": None, "code": None}}
            yield ResponseStart(400, JSON)
            yield ResponseEnd(dump_lenient(document))
            return
        except NoSuchRoute:
            self._scorers.pop(scoring.model, None)
            text = "the engine cannot score texts any more"
            raise Unavailable(Code.ENGINE_UNAVAILABLE, text, fault=Fault.ENGINE) from None
        body = response.to_json()
        if request.rename is not None:
            body["model"] = request.rename[1]
        usage = ReportedUsage(response.prompt_tokens + len(response.tokens), 0, 0)
        yield ResponseStart(200, JSON)
        yield ResponseEnd(dump_lenient(body), usage=usage)

    async def _find(self, model: str, base: BaseAddress) -> Scorer:
        """The adapter of a model. Raises NoSuchRoute if it has none."""
        scorer = self._scorers.get(model)
        if scorer is None:
            scorer = await find_scorer(scoring_api(self._open(), base, self._settings.api_key), model)
            if scorer is None:
                raise NoSuchRoute
            self._scorers[model] = scorer
        return scorer

    def _open(self) -> aiohttp.ClientSession:
        """The HTTP session, created inside the running event loop."""
        if self._session is None:
            connect = self._settings.connect_seconds
            self._session = aiohttp.ClientSession(
                timeout=aiohttp.ClientTimeout(total=None, connect=connect, sock_connect=connect),
                cookie_jar=aiohttp.DummyCookieJar(),
                trust_env=self._settings.trust_env,
            )
        return self._session
