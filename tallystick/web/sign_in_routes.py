"""The routes of signing in with a wallet: a page for people, and JSON for programs (`tally sign-in`)."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import parse_qs, urlencode

from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import Route

from tallystick.protocol.errors import BadMessage, Code, Refusal, TallyError, retry_headers
from tallystick.protocol.sign_in import MAX_MESSAGE
from tallystick.protocol.signatures import checksum
from tallystick.protocol.types import Address, parse_address
from tallystick.protocol.wire import loads
from tallystick.web.rendering import Pages
from tallystick.web.request_body import read_body
from tallystick.web.sessions import SESSION_SECONDS, cookie_name
from tallystick.web.wallet_sign_in import MAX_SIGNATURE, WalletSignIn

SIGN_IN_PATH = "/sign-in"
SIGN_IN_PATHS = (SIGN_IN_PATH, f"{SIGN_IN_PATH}/challenge", "/sign-out", f"{SIGN_IN_PATH}/key")
"""The paths of `SignInRoutes`, which everybody may ask for."""
MAX_BODY = 2 * MAX_SIGNATURE + MAX_MESSAGE + 1_024
"""Bytes of a request to sign in."""
Serve = Callable[[Request], Awaitable[Response]]


class SignInRoutes:
    """The routes of one daemon. `pages`: its templates; `targets`: the pages that a sign-in may lead to, the first by default.

    `notice`: what a person gets by signing in. `find_holder` returns the account that a key of the config stands for, or None;
    without it, no key signs in.
    """

    def __init__(
        self,
        sign_in: WalletSignIn,
        pages: Pages,
        *,
        targets: tuple[str, ...],
        notice: str,
        find_holder: Callable[[str], Address | None] | None = None,
    ) -> None:
        self._sign_in, self._pages, self._targets, self._notice = sign_in, pages, targets, notice
        self._find_holder = find_holder

    def routes(self) -> list[Route]:
        """The routes of SIGN_IN_PATHS."""
        page, challenge, out, key = SIGN_IN_PATHS
        by_key = [] if self._find_holder is None else [Route(key, self._open_by_key, methods=["POST"])]
        return [
            *by_key,
            Route(page, self._show, methods=["GET"]),
            Route(page, _answering(self._open), methods=["POST"]),
            Route(challenge, _answering(self._challenge), methods=["POST"]),
            Route(out, _answering(self._close), methods=["POST"]),
        ]

    async def _show(self, request: Request) -> Response:
        try:
            origin = self._sign_in.origin_of(request)
            session = await self._sign_in.session_of(request)
        except TallyError as error:
            return self.page(request, problem=str(error), status=error.status)
        return self.page(request, origin=origin, account="" if session is None else checksum(session.account))

    def page(self, request: Request, *, problem: str = "", status: int = 200, origin: str = "", account: str = "") -> Response:
        """The page to sign in. `account`: the one that is signed in, in EIP-55 mixed case."""
        wanted = request.query_params.get("to", "")
        target = wanted if wanted in self._targets else self._targets[0]
        values = {"origin": origin, "account": account, "target": target, "notice": self._notice, "problem": problem}
        values["by_key"] = "" if self._find_holder is None else f"{SIGN_IN_PATH}/key?{urlencode({'to': target})}"
        return self._pages.render("sign_in.html", status, section=SIGN_IN_PATH, minutes=SESSION_SECONDS // 60, **values)

    async def _challenge(self, request: Request) -> Response:
        origin = self._sign_in.origin_of(request)
        self._sign_in.check_own_page(request, origin)
        body = await _read_json(request, {"account"})
        account = body.get("account")
        return _json(self._sign_in.challenge(origin, None if account is None else parse_address(account, "account")))

    async def _open(self, request: Request) -> Response:
        origin = self._sign_in.origin_of(request)
        self._sign_in.check_own_page(request, origin)
        body = await _read_json(request, {"message", "signature", "bearer"})
        text, bearer = body.get("message"), body.get("bearer", False)
        if not isinstance(text, str) or not isinstance(bearer, bool):
            raise BadMessage("sign-in: expected a message, and whether a bearer token is wanted")
        value, session = await self._sign_in.sign_in(origin, text, _read_signature(body.get("signature")))
        answer = {"account": session.account, "expiresAt": int(session.until)}
        if bearer:
            return _json(answer | {"token": value})
        return await self._give(request, origin, value, _json(answer))

    async def _give(self, request: Request, origin: str, value: str, response: Response) -> Response:
        """The response with the cookie of a new session, which replaces the one that the request has."""
        await self._sign_in.sign_out(request)
        secure = origin.startswith("https:")
        response.set_cookie(
            cookie_name(origin), value, max_age=SESSION_SECONDS, path="/", httponly=True, samesite="strict", secure=secure
        )
        return response

    async def _open_by_key(self, request: Request) -> Response:
        """Signs in with a key, by the form of the page."""
        try:
            origin = self._sign_in.origin_of(request)
            self._sign_in.check_own_page(request, origin)
            form = parse_qs((await read_body(request, "sign-in", MAX_BODY)).decode(errors="replace"), max_num_fields=4)
            account = None if self._find_holder is None else self._find_holder(form.get("key", [""])[-1])
            if account is None:
                raise Refusal(Code.UNAUTHENTICATED, "This is not the key of the config (page_key).")
            value, _ = await self._sign_in.open(origin, account)
        except (TallyError, ValueError) as error:  # ValueError: too many fields
            status = error.status if isinstance(error, TallyError) else 400
            return self.page(request, problem=str(error), status=status)
        target = request.query_params.get("to", "")
        response = RedirectResponse(target if target in self._targets else self._targets[0], 303, {"cache-control": "no-store"})
        return await self._give(request, origin, value, response)

    async def _close(self, request: Request) -> Response:
        """Ends the session. It answers a form of the page, and programs."""
        origin = self._sign_in.origin_of(request)
        self._sign_in.check_own_page(request, origin)
        await self._sign_in.sign_out(request)
        is_form = request.headers.get("content-type", "").startswith("application/x-www-form-urlencoded")
        response: Response = RedirectResponse(SIGN_IN_PATH, 303) if is_form else _json({"signedOut": True})
        response.delete_cookie(
            cookie_name(origin), path="/", httponly=True, samesite="strict", secure=origin.startswith("https:")
        )
        return response


def _answering(serve: Serve) -> Serve:
    """A route that answers errors as JSON."""

    async def answering(request: Request) -> Response:
        try:
            return await serve(request)
        except TallyError as error:
            return JSONResponse(error.as_json(), error.status, {"cache-control": "no-store"} | retry_headers(error))

    return answering


def _json(value: dict[str, Any]) -> Response:
    return JSONResponse(value, headers={"cache-control": "no-store"})


async def _read_json(request: Request, members: set[str]) -> dict[str, Any]:
    """The body, a JSON object with some of these members. Raises BadMessage.

    Forms of other sites cannot send this media type without asking first, which no route here allows.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise BadMessage("sign-in: expected content-type: application/json")
    body = loads(await read_body(request, "sign-in", MAX_BODY), "sign-in")
    if not isinstance(body, dict) or body.keys() - members:
        raise BadMessage(f"sign-in: expected a JSON object with none but {', '.join(sorted(members))}")
    return body


def _read_signature(text: object) -> bytes:
    try:
        if isinstance(text, str) and text.startswith("0x") and len(text) <= 2 * MAX_SIGNATURE + 2 and text.isalnum():
            return bytes.fromhex(text[2:])
    except ValueError:
        pass
    raise BadMessage(f"signature: expected 0x and the hex digits of at most {MAX_SIGNATURE} bytes")
