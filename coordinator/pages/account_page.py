"""The page of one account: what `GET /v1/account` tells the wallet that signed in, and nobody else."""

from __future__ import annotations

import time
from collections.abc import Callable

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from coordinator.http.account_routes import AccountViews
from tallystick.protocol.errors import TallyError
from tallystick.protocol.signatures import checksum
from tallystick.web.rendering import Pages
from tallystick.web.sign_in_routes import SIGN_IN_PATH, SignInRoutes

ACCOUNT_PATH = "/market/account"
JOB_ROWS = 100
_NOTICE = "See your jobs, receipts and settlements at this coordinator, as a payer or a provider."


class AccountPage:
    """The page, and those to sign in. `now`: Unix seconds."""

    def __init__(self, views: AccountViews, pages: Pages, now: Callable[[], float] = time.time) -> None:
        self._views, self._pages, self._now = views, pages, now
        self._sign_in = SignInRoutes(views.accounts.sign_in, pages, targets=(ACCOUNT_PATH,), notice=_NOTICE)

    def routes(self) -> list[Route]:
        """The routes, for everybody: who is not signed in is led to the page that does it."""
        return [Route(ACCOUNT_PATH, self._show, methods=["GET"]), *self._sign_in.routes()]

    async def _show(self, request: Request) -> Response:
        try:
            session = await self._views.accounts.sign_in.session_of(request)
            if session is None:
                return RedirectResponse(SIGN_IN_PATH, 303, {"cache-control": "no-store"})
            view = await self._views.read(session.account, JOB_ROWS)
        except TallyError as error:
            values = {"problem": str(error), "remedy": "Try again in a second."}
            return self._pages.render("missing.html", error.status, section=ACCOUNT_PATH, **values)
        return self._pages.render(
            "account.html", section=ACCOUNT_PATH, view=view, account=checksum(session.account), now=self._now()
        )
