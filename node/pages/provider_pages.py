"""The routes of a node's pages: what `tally node status` and `tally node earnings --offline` show."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from node.domain.earned_money import locate_money
from node.pages.income_view import GROUPINGS, read_query, rows_of
from node.pages.page_login import PageLogin
from node.pages.price_view import (
    MAX_DECISIONS,
    OfferComparison,
    PaidJob,
    PriceQuestion,
    compare_offers,
    earnings_at,
    likely,
    read_question,
)
from node.storage.earnings import read_lines, read_paid_jobs, read_payouts, read_tab_money
from node.storage.store import SqlStore
from tallystick.protocol.errors import TallyError
from tallystick.web.day_chart import PERIODS, bars_of
from tallystick.web.local_access import local_only
from tallystick.web.rendering import Pages
from tallystick.web.sign_in_routes import SIGN_IN_PATH
from tallystick.web.static_files import STATIC_PATH, serve_static
from tallystick.web.wallet_page import MEANING, WalletPage

SECTIONS = {"/": "Node", "/income": "Income", "/prices": "Prices", "/money": "Money"}
WALLET_PATH = "/wallet"
DAY_SECONDS = 86_400
PAYOUT_ROWS = 20
PRICED_JOBS = 5_000
"""Jobs of the last day that the page of prices counts, the latest ones: each receipt is unpacked for it."""
Ask = Callable[[str], Awaitable[object]]
"""Asks a coordinator for its decisions about this node. Takes more of the query; raises TallyError."""
Serve = Callable[[Request], Awaitable[Response]]
_PLACES = {
    "accrued": "signed for, on tabs that hold less than a claim should bring",
    "claimable": "the node claims it by itself; now: tally node collect",
    "owed_on_trust": "signed for, but the payers' purses are empty",
    "lost": "the orders behind it have expired",
    "settled": "paid by the contract: credited, cashed out, and coordinators' fees; tally node earnings tells them apart",
}


class ProviderPages:
    """See the module's docstring. `status` returns the status report; `least`: base units from which a tab is claimed. `ask`
    asks a coordinator for its decisions. `login`: None if the pages need none. `now` is Unix time.
    """

    def __init__(
        self,
        status: Callable[[], Mapping[str, Any]],
        store: SqlStore,
        *,
        least: Callable[[], int],
        ask: Ask,
        wallet: WalletPage | None = None,
        login: PageLogin | None = None,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._ask, self._status, self._store, self._least, self._now = ask, status, store, least, now
        self._wallet, self._login = wallet, login
        sections = SECTIONS if wallet is None else SECTIONS | {WALLET_PATH: "Wallet"}
        self.pages = Pages(Path(__file__).parent / "templates", product="Tallystick node", sections=sections)

    def routes(self) -> list[Route]:
        """The routes, for browsers on this machine, or for those that signed in."""
        routes = {"/": self._overview, "/income": self._income, "/prices": self._prices, "/money": self._money}
        if (wallet := self._wallet) is not None:
            routes |= {WALLET_PATH: wallet.shown(self.pages), f"{WALLET_PATH}/{MEANING}": wallet.meaning}
        static = f"{STATIC_PATH}/{{name}}"
        if self._login is None:
            return [Route(path, local_only(serve)) for path, serve in (routes | {static: serve_static}).items()]
        guarded = [Route(path, self._signed_in(serve)) for path, serve in routes.items()]
        return [*guarded, Route(static, serve_static), *self._login.routes(self.pages, (*SECTIONS, WALLET_PATH))]

    def _signed_in(self, serve: Serve) -> Serve:
        """A route that leads those who are not signed in to the page that does it."""

        async def guarded(request: Request) -> Response:
            if self._login is not None and await self._login.sign_in.session_of(request) is not None:
                return await serve(request)
            to = urlencode({"to": request.url.path})
            return RedirectResponse(f"{SIGN_IN_PATH}?{to}", 303, {"cache-control": "no-store"})

        return guarded

    async def _overview(self, _request: Request) -> Response:
        report = self._status()
        wrong = {name: check for name, check in report["checks"].items() if check["status"] != "pass"}
        return self.pages.render("node.html", section="/", report=report, wrong=wrong)

    async def _income(self, request: Request) -> Response:
        query, now = read_query(request.query_params), self._now()
        since = int(now) // DAY_SECONDS * DAY_SECONDS - (query.days - 1) * DAY_SECONDS
        lines = await self._store.read(lambda c: read_lines(c, since))
        rows = rows_of(lines, query.by)
        return self.pages.render(
            "income.html",
            section="/income",
            query=query,
            periods=PERIODS,
            groupings=GROUPINGS,
            rows=rows,
            bars=bars_of({row.name: row.revenue for row in rows_of(lines, "day")}, query.days, now),
            jobs=sum(row.jobs for row in rows),
            revenue=sum(row.revenue for row in rows),
            tokens=sum(row.output_tokens for row in rows),
        )

    async def _prices(self, request: Request) -> Response:
        """What the last day would have brought at other prices, by this node's receipts and a coordinator's decisions."""
        asks = self._status()["asks"]
        question = read_question(request.query_params, asks)
        values: dict[str, Any] = {"question": question, "models": list(dict.fromkeys(ask["model"] for ask in asks))}
        if question is None:
            return self.pages.render("prices.html", section="/prices", **values)
        since = int(self._now()) - DAY_SECONDS
        jobs = await self._store.read(lambda c: read_paid_jobs(c, question.model, since, PRICED_JOBS))
        earnings, offers = earnings_at((PaidJob(*job) for job in jobs), question.prices), await self._offers(question)
        values |= {"earnings": earnings, "cut": len(jobs) == PRICED_JOBS, "problem": "", "offers": None, "likely": None}
        if isinstance(offers, str):
            values["problem"] = offers
        else:
            values |= {"offers": offers, "likely": likely(earnings, offers.now, offers.then)}
        return self.pages.render("prices.html", section="/prices", **values)

    async def _offers(self, question: PriceQuestion) -> OfferComparison | str:
        """How a coordinator judged the ask as it was, and at other prices; text that says why this is not known."""
        try:
            now, then = await self._ask(f"limit={MAX_DECISIONS}"), await self._ask(f"limit={MAX_DECISIONS}{question.query}")
            return compare_offers(now, then, question.model)
        except TallyError as error:
            return f"Not known: {error}"

    async def _money(self, _request: Request) -> Response:
        now = int(self._now())
        tabs = await self._store.read(lambda c: read_tab_money(c, now))
        payouts = await self._store.read(lambda c: read_payouts(c, PAYOUT_ROWS))
        money = locate_money(tabs, least=self._least())
        settled = money.coordinator_fees + money.credited + money.cashed_out
        amounts = {
            "accrued": money.accrued,
            "claimable": money.claimable,
            "owed_on_trust": money.owed_on_trust,
            "lost": money.lost,
            "settled": settled,
        }
        return self.pages.render(
            "money.html",
            section="/money",
            places=[(name.replace("_", " "), amount, _PLACES[name]) for name, amount in amounts.items()],
            earned=money.earned,
            owing=sorted((tab for tab in tabs if tab.signed), key=lambda tab: -tab.signed)[:PAYOUT_ROWS],
            payouts=payouts,
            now=now,
        )
