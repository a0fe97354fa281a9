"""The routes of the gateway's pages: what `tally spending` and `tally job` show, for holders of the gateway's key."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import Route

from tallystick.client.jobs.export import job_json
from tallystick.client.ledger.queries import KnownJob
from tallystick.client.ledger.spending import DAY_SECONDS
from tallystick.client.pages.money_view import TabMoney, as_dollars, places_of
from tallystick.client.pages.spending_view import GROUPINGS, amounts_of, lines_of, read_query
from tallystick.client.sdk.market import Market, maintenance_of
from tallystick.protocol.errors import TallyError, Unavailable
from tallystick.protocol.routes import JSON
from tallystick.protocol.types import Amount, JobId, format_amount, parse_address, parse_job_id
from tallystick.web.day_chart import PERIODS, bars_of
from tallystick.web.receipt_page import TEMPLATE, receipt_values
from tallystick.web.rendering import Pages
from tallystick.web.request_body import read_body
from tallystick.web.sign_in_routes import SignInRoutes
from tallystick.web.static_files import STATIC_PATH, serve_static
from tallystick.web.wallet_page import MEANING, Parties, WalletPage, unavailable
from tallystick.web.wallet_sign_in import WalletSignIn

SECTIONS = {
    "/tally/spending": "Spending",
    "/tally/money": "Money",
    "/tally/jobs": "Jobs",
    "/tally/wallet": "Wallet",
    "/tally/receipt": "Receipt",
    "/tally/chat": "Chat",
}
LOGIN_PATH = "/tally/login"
WALLET_PATH = "/tally/wallet"
BIND_PATH = f"{WALLET_PATH}/bind"
NO_CHAIN = (
    "This gateway does not use the chain: its config names no deployment file, or no RPC address that it may trust. Set "
    "`deployment` and `rpc`, and start it again."
)
JOB_ROWS = 100
MAX_TABS = 200
"""Tabs that the page of money reads from the chain, those that were used last."""
MAX_FORM = 8_192
"""Bytes of the form to log in."""
_NOTICE = "See what this gateway's wallet did, and spend from it. Its own wallet may, and those of page_wallets in the config."
Access = Callable[[Request], bool]
"""Whether the caller may see what the whole wallet did."""


class PayerPages:
    """See the module's docstring. `may_see` decides for each request; others are shown the form to log in.

    `log_in` takes the key of the form, and returns the value of a session cookie, or None for a wrong key. `sign_in`: for
    wallets. `now`: Unix time.
    """

    def __init__(
        self,
        market: Market,
        *,
        may_see: Access,
        log_in: Callable[[str], str | None],
        sign_in: WalletSignIn | None = None,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._market, self._may_see, self._log_in, self._now = market, may_see, log_in, now
        self.pages = Pages(Path(__file__).parent / "templates", product="Tallystick gateway", sections=SECTIONS)
        self._sign_in = None if sign_in is None else SignInRoutes(sign_in, self.pages, targets=tuple(SECTIONS), notice=_NOTICE)
        onchain, parties = maintenance_of(market).onchain, Parties(key=market.address, bind=BIND_PATH)
        self._wallet = None if onchain is None else WalletPage(onchain.escrow, WALLET_PATH, parties)

    def routes(self) -> list[Route]:
        """The routes, of which LOGIN_PATH and those of static files are for everybody."""
        return [
            Route("/tally/spending", self._guarded(self._spending)),
            Route("/tally/money", self._guarded(self._money)),
            Route("/tally/jobs", self._guarded(self._jobs)),
            Route("/tally/pages/jobs/{job}", self._guarded(self._job)),
            Route("/tally/receipt", self._guarded(self._receipt)),
            Route(WALLET_PATH, self._guarded(self._wallet_page)),
            Route(f"{WALLET_PATH}/{MEANING}", self._guarded(self._meaning)),
            Route(BIND_PATH, self._guarded(self._bind), methods=["POST"]),
            Route("/tally/chat", self._guarded(self._chat)),
            Route(LOGIN_PATH, self._login, methods=["GET", "POST"]),
            *([] if self._sign_in is None else self._sign_in.routes()),
            Route(f"{STATIC_PATH}/{{name}}", serve_static),
        ]

    def _guarded(self, page: Callable[[Request], Any]) -> Callable[[Request], Any]:
        async def guarded(request: Request) -> Response:
            if not self._may_see(request):
                return self.pages.render("login.html", 401, section="", problem="", target=request.url.path)
            try:
                response: Response = await page(request)
            except TallyError as error:
                return self.pages.render("problem.html", 503, section="", problem=str(error))
            return response

        return guarded

    async def _login(self, request: Request) -> Response:
        if request.method == "GET":
            return self.pages.render("login.html", section="", problem="", target="/tally/spending")
        form = await _read_form(request)
        target = form.get("target")
        session = self._log_in(form.get("key", ""))
        if session is None:
            problem = "This is not the gateway's api_key (TALLY_GATEWAY_API_KEY)."
            return self.pages.render("login.html", 401, section="", problem=problem, target="/tally/spending")
        response = RedirectResponse(target if target in SECTIONS else "/tally/spending", 303)
        response.set_cookie("tally_session", session, httponly=True, samesite="strict", secure=request.url.scheme == "https")
        return response

    async def _spending(self, request: Request) -> Response:
        query, now = read_query(request.query_params), int(self._now())
        ledger = maintenance_of(self._market).ledger
        since = now - (query.days - 1) * DAY_SECONDS
        rows = await ledger.spending(since, (query.by,))
        by_day = rows if query.by == "day" else await ledger.spending(since, ("day",))
        budgets = [await ledger.budget_status(budget, now) for budget in self._market.config.budgets]
        total = Amount(sum(int(row.cost) for row in rows))
        return self.pages.render(
            "spending.html",
            section="/tally/spending",
            query=query,
            periods=PERIODS,
            groupings=GROUPINGS,
            lines=lines_of(rows, query.by),
            bars=bars_of(amounts_of(by_day), query.days, now),
            total=total,
            requests=sum(row.requests for row in rows),
            failed=sum(row.failed for row in rows),
            running=self._market.running,
            purse=await self._purse(),
            budgets=budgets,
            payer=self._market.address,
            coordinator=self._market.config.coordinator,
        )

    async def _money(self, _request: Request) -> Response:
        """Reads the chain now. Without it, there is nothing to show: the ledger alone does not know what is where."""
        maintenance = maintenance_of(self._market)
        onchain = maintenance.onchain
        if onchain is None:
            return unavailable(self.pages, "/tally/money", NO_CHAIN)
        domain, now = onchain.escrow.deployment.domain, int(self._now())
        accounts = await maintenance.ledger.accounts(domain, now)
        purse, tabs = await onchain.purse(), await onchain.tabs([account.provider for account in accounts[:MAX_TABS]])
        money = [
            TabMoney(account.provider, int(tab.reserved), int(tab.settled), account)
            for account, tab in zip(accounts, tabs, strict=False)
        ]
        places = places_of(int(purse.free), int(purse.thawing), money)
        values = {"places": places, "rows": as_dollars(places), "hidden": len(accounts) > MAX_TABS}
        return self.pages.render("money.html", section="/tally/money", **values)

    async def _purse(self) -> str:
        """The purse's free money in dollars; empty if the chain does not answer or is not known."""
        onchain = maintenance_of(self._market).onchain
        if onchain is None:
            return ""
        try:
            purse = await onchain.purse()
        except TallyError:
            return ""
        return format_amount(max(0, purse.free - purse.thawing))

    async def _jobs(self, _request: Request) -> Response:
        jobs = await maintenance_of(self._market).ledger.latest_jobs(JOB_ROWS)
        return self.pages.render("jobs.html", section="/tally/jobs", rows=[self._row(job) for job in jobs])

    def _row(self, job: KnownJob) -> dict[str, Any]:
        shown, now = job_json(job), self._now()
        ended = job.finished_at
        return shown | {
            "age": max(0.0, now - job.created_at),
            "seconds": None if ended is None else max(0, ended - job.created_at),
        }

    async def _job(self, request: Request) -> Response:
        try:
            job_id: JobId = parse_job_id(request.path_params["job"])
        except TallyError as error:
            return self.pages.render("problem.html", 404, section="/tally/jobs", problem=str(error))
        job = await self._market.find(job_id)
        if job is None:
            problem = f"This wallet's ledger has no job {job_id.hex()}."
            return self.pages.render("problem.html", 404, section="/tally/jobs", problem=problem)
        return self.pages.render("job.html", section="/tally/jobs", job=self._row(job))

    async def _receipt(self, _request: Request) -> Response:
        return self.pages.render(TEMPLATE, section="/tally/receipt", **receipt_values())

    async def _wallet_page(self, _request: Request) -> Response:
        if self._wallet is None:
            return unavailable(self.pages, WALLET_PATH, NO_CHAIN)
        try:
            await self._market.info()  # compares the coordinator's contract with the deployment file's
        except Unavailable:
            pass
        except TallyError as error:
            return unavailable(self.pages, WALLET_PATH, str(error))
        return await self._wallet.render(self.pages)

    async def _meaning(self, request: Request) -> Response:
        if self._wallet is None:
            return JSONResponse({"error": NO_CHAIN}, 503)
        return await self._wallet.meaning(request)

    async def _bind(self, request: Request) -> Response:
        """POST: the key's signature that an account may own its purse, which a browser wallet then opens."""
        onchain = maintenance_of(self._market).onchain
        if onchain is None:
            return JSONResponse({"error": NO_CHAIN}, 503)
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != JSON:
            return JSONResponse({"error": f"content-type: expected {JSON}"}, 415)  # forms of other sites cannot send it
        origin, host = request.headers.get("origin"), request.headers.get("host", "").lower()
        if origin is not None and origin.lower() not in {f"http://{host}", f"https://{host}"}:  # allow_origins says who may spend
            return JSONResponse({"error": f"Origin: pages of {origin[:100]} may not choose the purse's owner"}, 403)
        try:
            raw = json.loads(await read_body(request, "owner", MAX_FORM) or b"null")
            owner = parse_address(raw.get("owner") if isinstance(raw, dict) else None, "owner")
        except (ValueError, TallyError) as error:
            return JSONResponse({"error": str(error)}, 400)
        return JSONResponse({"key": self._market.address, "owner": owner, "signature": "0x" + onchain.bind(owner).hex()})

    async def _chat(self, _request: Request) -> Response:
        offers = await self._market.models()
        aliases = sorted(alias.name for alias in self._market.config.aliases)
        models = [*aliases, *sorted(offer.id for offer in offers)]
        return self.pages.render("chat.html", section="/tally/chat", models=models)


async def _read_form(request: Request) -> dict[str, str]:
    """The fields of a form (application/x-www-form-urlencoded). None of a body that is too long or too slow."""
    try:
        fields = parse_qs((await read_body(request, "form", MAX_FORM)).decode(errors="replace"), max_num_fields=8)
    except (ValueError, TallyError):  # ValueError: too many fields
        return {}
    return {name: values[-1] for name, values in fields.items()}
