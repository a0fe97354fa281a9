"""The routes of the market's pages. They read what the API reads; no page tells more than the API does."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

from coordinator.domain.ask_pages import ModelEntries, percent
from coordinator.domain.listed_ask import ListedAsk
from coordinator.domain.model_history import ModelHistory, Sample
from coordinator.http.account_routes import AccountViews
from coordinator.jobs.market import Market
from coordinator.jobs.market_load import MarketLoad
from coordinator.pages.account_page import ACCOUNT_PATH, AccountPage
from coordinator.pages.log_view import rows_of
from coordinator.pages.market_view import PAGE_ROWS, SORTS, Chart, chart, fitting, read_filter
from tallystick.protocol.criteria import audience
from tallystick.protocol.errors import TallyError
from tallystick.protocol.health import HealthReport
from tallystick.protocol.types import Address, format_amount, parse_address
from tallystick.runtime.health_monitor import HealthMonitor
from tallystick.web.receipt_page import TEMPLATE, receipt_values
from tallystick.web.rendering import Pages
from tallystick.web.static_files import STATIC_PATH, serve_static
from tallystick.web.wallet_page import MEANING, WalletPage

SECTIONS = {
    "/market": "Models",
    "/market/log": "Match log",
    "/market/receipt": "Receipt",
    "/market/status": "Status",
    ACCOUNT_PATH: "Account",
    "/docs": "API",
}
WALLET_PATH = "/market/wallet"
MAX_MODELS = 5_000
"""Models that one page considers."""
LIST_SECONDS = 2.0
"""How old the list of models may be. To read all of 5,000 takes the event loop some 100 ms."""
ASK_ROWS, DECISION_ROWS, LOG_ROWS = 200, 100, 50


class MarketPages:
    """See the module's docstring. `now` is Unix time; `tick` a monotonic clock."""

    def __init__(
        self,
        market: Market,
        health: HealthMonitor,
        *,
        name: str,
        connected: Callable[[], int],
        views: AccountViews,
        wallet: WalletPage | None = None,
        load: MarketLoad | None = None,
        now: Callable[[], float] = time.time,
        tick: Callable[[], float] = time.monotonic,
    ) -> None:
        self._market, self._health, self._connected, self._now, self._tick = market, health, connected, now, tick
        self._load = load or MarketLoad(market, market.matchmaker.queue, tick)
        self._entries, self._name, self._wallet = ModelEntries(), name, wallet
        self._listed: list[Mapping[str, Any]] = []
        self._listed_until = float("-inf")
        self.history = ModelHistory()
        sections = SECTIONS if wallet is None else SECTIONS | {WALLET_PATH: "Wallet"}
        self.pages = Pages(Path(__file__).parent / "templates", product=f"Market {name}", sections=sections)
        self._account = AccountPage(views, self.pages, now)

    def add_to(self, api: FastAPI) -> None:
        """Adds the routes, none of which is in the API's document."""
        routes = {
            "/market": self._models,
            "/market/models/{model:path}": self._model,
            "/market/providers/{provider}": self._provider,
            "/market/log": self._log,
            "/market/receipt": self._receipt,
            "/market/status": self._status,
            f"{STATIC_PATH}/{{name}}": serve_static,
        }
        if (wallet := self._wallet) is not None:
            routes |= {WALLET_PATH: wallet.shown(self.pages), f"{WALLET_PATH}/{MEANING}": wallet.meaning}
        for path, serve in routes.items():
            api.add_route(path, serve, methods=["GET", "HEAD"], include_in_schema=False)
        api.router.routes += self._account.routes()

    def sample(self) -> None:
        """Adds to the history of the models, if it is time; called every second."""
        if self.history.is_due(tick := self._tick()):
            at = int(self._now())
            self.history.add(((name, len(asks), _sample(at, asks)) for name, asks in self._market.book.models()), tick)

    def _all(self) -> list[Mapping[str, Any]]:
        """All models, read at most once in LIST_SECONDS, however many ask."""
        market, tick = self._market, self._tick()
        if tick >= self._listed_until:
            score, waiting = market.reputation.score, self._load.waiting_for
            models = islice(market.book.models(), MAX_MODELS)
            self._listed = [self._entries.entry(name, asks, score, tick) | {"waiting": waiting(name)} for name, asks in models]
            self._listed_until = tick + LIST_SECONDS
        return self._listed

    async def _models(self, request: Request) -> Response:
        wanted, entries = read_filter(request.query_params), self._all()
        rows = fitting(entries, wanted)
        pages = max(1, -(-len(rows) // PAGE_ROWS))
        page = min(wanted.page, pages)
        others = {name: value for name, value in request.query_params.items() if name != "page"}
        market = self._market
        return self.pages.render(
            "models.html",
            section="/market",
            rows=rows[PAGE_ROWS * (page - 1) : PAGE_ROWS * page],
            total=len(rows),
            offered=len(entries),
            wanted=wanted,
            sorts=SORTS,
            page=page,
            pages=pages,
            page_link=lambda number: "/market?" + urlencode(others | {"page": number}),
            model_link=_model_link,
            tiles={
                "nodes": self._connected(),
                "models": len(entries),
                "free slots": market.book.free_slots,
                "running jobs": self._load.jobs,
                "waiting jobs": self._load.waiting,
            },
        )

    async def _model(self, request: Request) -> Response:
        name = request.path_params["model"]
        asks = self._market.book.of_model(name)
        samples = self.history.of(name)
        if not asks and not samples:
            return self._missing(f"No provider offers {name!r} now.", "Model names are written as the providers list them.")
        charts: list[Chart | None] = [
            chart("Lowest price of output, dollars", samples, lambda sample: sample.output_price, format_amount),
            chart("Fastest first token, ms", samples, lambda sample: sample.first_token_ms, "{:,}".format),
            chart("Free slots", samples, lambda sample: sample.free, "{:,}".format),
        ]
        entry = self._entries.entry(name, asks, self._market.reputation.score, self._tick()) if asks else None
        return self.pages.render(
            "model.html",
            section="/market",
            name=name,
            entry=entry,
            rows=[self._ask_row(listed_ask) for listed_ask in asks[:ASK_ROWS]],
            total=len(asks),
            waiting=self._load.waiting_for(name),
            charts=[drawn for drawn in charts if drawn is not None],
        )

    def _ask_row(self, listed_ask: ListedAsk) -> dict[str, Any]:
        group = listed_ask.slot_group
        return {
            "ask": listed_ask.message,
            "free": group.free,
            "queue": group.places - group.free,
            "integrity": percent(listed_ask.integrity),
            "audits": listed_ask.audits,
            "availability": round(100 * self._market.reputation.score(listed_ask.provider)),
            "speed": listed_ask.speed,
            "measured": listed_ask.measured is not None,
            "model_link": _model_link(listed_ask.message.model),
            "audience": audience(listed_ask.message),
        }

    async def _provider(self, request: Request) -> Response:
        text = request.path_params["provider"]
        try:
            provider: Address = parse_address(text)
        except TallyError as error:
            return self._missing(str(error), "An account is 0x and 40 hex digits.")
        market, now = self._market, self._now()
        asks = market.book.of_provider(provider)
        verdicts = market.decision_log.verdicts(provider, market.book, DECISION_ROWS)
        return self.pages.render(
            "provider.html",
            section="/market",
            provider=provider,
            connected=market.book.node(provider) is not None,
            availability=round(100 * market.reputation.score(provider)),
            rows=[self._ask_row(listed_ask) for listed_ask in asks[:ASK_ROWS]],
            verdicts=[(max(0.0, now - verdict.at), verdict) for verdict in verdicts],
        )

    async def _log(self, request: Request) -> Response:
        match_log, now = self._market.match_log, self._now()
        before = request.query_params.get("before", "")
        try:
            head = (await match_log.proof((), ()))["head"]["message"]
            size = int(head["size"])
            end = min(int(before), size) if before.isascii() and before.isdecimal() and len(before) < 19 else size
            start = max(0, end - LOG_ROWS)
            listed = (await match_log.entries(start, end - start))["entries"] if end > start else []
        except TallyError as error:
            return self.pages.render(
                "missing.html", 503, section="/market/log", problem=str(error), remedy="Try again in a second."
            )
        return self.pages.render(
            "log.html",
            section="/market/log",
            head=head,
            signed=datetime.fromtimestamp(int(head["signedAt"]), UTC).isoformat(sep=" "),
            size=size,
            start=start,
            rows=rows_of(listed, now),
            model_link=_model_link,
        )

    async def _receipt(self, _request: Request) -> Response:
        return self.pages.render(TEMPLATE, section="/market/receipt", **receipt_values())

    async def _status(self, _request: Request) -> Response:
        report: HealthReport = await self._health.report()
        age = max(0.0, self._now() - report.at)
        values = {"report": report, "age": age, "coordinator": self._market.address}
        return self.pages.render("status.html", section="/market/status", **values)

    def _missing(self, problem: str, remedy: str) -> Response:
        return self.pages.render("missing.html", 404, section="/market", problem=problem, remedy=remedy)


def _model_link(name: str) -> str:
    return f"/market/models/{quote(name, safe='')}"


def _sample(at: int, asks: list[ListedAsk]) -> Sample:
    groups = {id(listed_ask.slot_group): listed_ask.slot_group.free for listed_ask in asks}
    return Sample(
        at,
        min(int(listed_ask.message.output_price) for listed_ask in asks),
        min((speed for listed_ask in asks if (speed := listed_ask.speed.first_token_ms)), default=0),
        sum(groups.values()),
    )
