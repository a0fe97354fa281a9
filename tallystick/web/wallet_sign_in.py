"""Sign-in with a wallet (EIP-4361): challenges, the check of what was signed, and the session that it opens.

A challenge is not kept: its nonce has a time and a code (HMAC) of this server, so that no number of open challenges takes memory
or puts out that of another. A nonce opens one session. All that a message names is checked: site, chain, times and account.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import secrets
import time
from collections.abc import Awaitable, Callable, Collection
from typing import Any

from starlette.requests import Request

from tallystick.protocol.errors import BadMessage, BadSignature, Code, Fault, Refusal, Unavailable, rate_limited
from tallystick.protocol.origins import is_loopback_name, read_origin, same_host
from tallystick.protocol.sign_in import CHALLENGE_SECONDS, SignIn, parse_sign_in, recover_text, text_digest
from tallystick.protocol.signatures import SIGNATURE
from tallystick.protocol.types import Address, Hash
from tallystick.runtime.token_bucket import TokenBucket
from tallystick.web.sessions import (
    SESSION_SECONDS,
    MemorySessions,
    Session,
    SessionStore,
    cookie_name,
    read_cookie,
    session_digest,
)

ContractCheck = Callable[[Address, Hash, bytes], Awaitable[bool]]
"""Whether the contract at an account takes a signature of a digest for its own (EIP-1271). Raises Unavailable."""
MAX_SIGNATURE = 8_192
"""Bytes of a smart account's signature."""
CONTRACT_CHECKS, CHECK_SECONDS = 4, 10.0
"""Smart accounts that are asked at the same time, and how long one may take."""
CHECKS_PER_SECOND, CHECKS_BURST = 1.0, 20.0
"""How often the chain is asked about signatures: anybody may have it asked, and the operator pays for the answers."""
_TIME, _RANDOM, _CODE = 10, 24, 32
"""Hex digits of a nonce's parts."""
_EVERYBODY = ""
"""The one key of the rate of checks, which all share: an account costs a stranger nothing."""
_OWN_SITES = ("", "none", "same-origin")


class WalletSignIn:
    """See the module's docstring.

    `origins`: the sites that this server is, such as https://market.example. Without any, or with loopback ones alone, it is also
    whatever a browser of its machine calls it. `key`: secret bytes, the same in all processes that serve these sites.
    `may_enter`: the accounts that may sign in. `now`: Unix seconds.
    """

    def __init__(
        self,
        *,
        origins: Collection[str],
        chain_id: int,
        key: bytes,
        statement: str,
        store: SessionStore | None = None,
        may_enter: Callable[[Address], bool] = lambda _account: True,
        check_contract: ContractCheck | None = None,
        now: Callable[[], float] = time.time,
    ) -> None:
        self.origins = tuple(dict.fromkeys(map(read_origin, origins)))
        self._is_local = all(is_loopback_name(origin.partition("://")[2]) for origin in self.origins)
        self._chain_id, self._statement, self._now = chain_id, statement, now
        self._key = hashlib.blake2b(b"tallystick sign-in", key=hashlib.sha256(key).digest()).digest()
        self._memory = MemorySessions()
        self._store: SessionStore = store or self._memory
        self._may_enter, self._check_contract = may_enter, check_contract
        self._contract_checks = asyncio.Semaphore(CONTRACT_CHECKS)
        self._check_rate = TokenBucket(CHECKS_PER_SECOND, CHECKS_BURST)

    # Who asks

    def origin_of(self, request: Request) -> str:
        """The site that a request is for. Raises Refusal for one that this server is not.

        A loopback name is another machine to each visitor. A server that others reach does not go by one: a program on a
        visitor's machine could have the visitor sign for its own address, and use that here.
        """
        hosts = request.headers.getlist("host")
        host = hosts[0] if len(hosts) == 1 else ""
        for origin in self.origins:
            scheme, _, own = origin.partition("://")
            if same_host(scheme, host) == own:
                return origin
        local = same_host("http", host)
        if self._is_local and local and is_loopback_name(local):
            return f"http://{local}"
        local_names = ["localhost", "a loopback address"] if self._is_local else []
        known = f"one of {', '.join([*self.origins, *local_names])}"
        raise _refusal(f"Host: expected {known}, got {host[:100]!r}; other names need public_urls (page_urls) in the config")

    def check_own_page(self, request: Request, origin: str) -> None:
        """Raises Refusal for a request that a page of another site, or of another port, sent.

        The forms of pages without referrers have no origin (https://fetch.spec.whatwg.org/#append-a-request-origin-header). Where
        browsers say that such a form is of the same site, it is taken; over plain http to another machine they do not say so.
        """
        sites = [site.lower() for site in request.headers.getlist("sec-fetch-site")]
        own = {origin, "null"} if sites == ["same-origin"] else {origin}
        given = (text.lower().partition("://") for text in request.headers.getlist("origin"))
        if not own.issuperset(f"{scheme}{mark}{same_host(scheme, host)}" if mark else scheme for scheme, mark, host in given):
            raise _refusal(f"Origin: expected {origin}: pages of other sites cannot sign in or out here")
        if any(site not in _OWN_SITES for site in sites):
            raise _refusal("Sec-Fetch-Site: another site sent this request")

    async def session_of(self, request: Request) -> Session | None:
        """The session of a request's cookie or bearer token; None without an open one. Raises Unavailable."""
        value = self._presented(request)
        if value is None:
            return None
        return self._valid(request, await self._store.find(session_digest(value)))

    def session_at_hand(self, request: Request) -> Session | None:
        """The same as `session_of`, at once; for sessions in memory alone."""
        value = self._presented(request)
        return None if value is None else self._valid(request, self._memory.get(session_digest(value)))

    def _valid(self, request: Request, session: Session | None) -> Session | None:
        if session is None or self._now() >= session.until or not self._may_enter(session.account):
            return None
        try:
            return session if self.origin_of(request) == session.origin else None
        except Refusal:
            return None

    def _presented(self, request: Request) -> str | None:
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer":
            return token.strip()
        try:
            origin = self.origin_of(request)
        except Refusal:
            return None
        sites = request.headers.getlist("sec-fetch-site")
        follows_link = request.method == "GET" and request.headers.get("sec-fetch-mode") == "navigate"
        if not follows_link and any(site.lower() not in _OWN_SITES for site in sites):
            return None
        return read_cookie(request.headers.getlist("cookie"), cookie_name(origin))

    # Signing in and out

    def challenge(self, origin: str, account: Address | None) -> dict[str, Any]:
        """The members of a new message for this site; its text too if the account that is to sign it is given."""
        issued = int(self._now())
        challenge: dict[str, Any] = {
            "domain": origin.partition("://")[2],
            "statement": self._statement,
            "uri": f"{origin}/sign-in",
            "chainId": self._chain_id,
            "nonce": self._new_nonce(issued),
            "issuedAt": issued,
            "expiresAt": issued + CHALLENGE_SECONDS,
        }
        return challenge if account is None else challenge | {"message": message_of(challenge, account).to_text()}

    async def sign_in(self, origin: str, text: str, signature: bytes) -> tuple[str, Session]:
        """Opens a session with a signed message. Returns its secret value and the session.

        Raises BadMessage, BadSignature, Refusal (unauthenticated) and Unavailable.
        """
        message, now = parse_sign_in(text), self._now()
        message.check(origin=origin, chain_id=self._chain_id, now=now)
        if message.statement != self._statement:
            raise _refusal(
                f"statement: expected {self._statement!r}, got {message.statement[:200]!r}; sign what the challenge says"
            )
        self._check_nonce(message.nonce, now)
        if not self._may_enter(message.account):
            raise _refusal(f"{message.account} may not sign in here; the config lists the wallets that may (page_wallets)")
        await self._check_signature(message, text, signature)
        return await self.open(origin, message.account, message.nonce)

    async def open(self, origin: str, account: Address, nonce: str = "") -> tuple[str, Session]:
        """Opens a session for an account that was proven. Returns its secret value and the session. Raises as `sign_in`."""
        value, opened = secrets.token_urlsafe(32), self._now()
        nonce = nonce or secrets.token_hex(_RANDOM)
        session = Session(session_digest(value), nonce, account, origin, opened, opened + SESSION_SECONDS)
        await self._store.open(session)
        return value, session

    async def sign_out(self, request: Request) -> None:
        """Ends the session of a request, if it has one. Raises Unavailable."""
        value = self._presented(request)
        if value is not None:
            await self._store.close(session_digest(value))

    async def _check_signature(self, message: SignIn, text: str, signature: bytes) -> None:
        """Checks the key's signature, or asks the account's contract. Raises BadSignature, Unavailable."""
        other: BadSignature | None = None
        if len(signature) == SIGNATURE:
            try:
                signer = recover_text(text, signature)
            except BadSignature as error:
                other = error
            else:
                if signer == message.account:
                    return
        problem = other or BadSignature(f"signature: expected that of {message.account}, the account that the message names")
        if self._check_contract is None or not 0 < len(signature) <= MAX_SIGNATURE:
            raise problem
        if self._contract_checks.locked() or not self._check_rate.try_spend(_EVERYBODY, self._now()):
            delay = self._check_rate.delay(_EVERYBODY, self._now())
            raise rate_limited("too many smart accounts sign in", delay, fault=Fault.NOBODY)
        async with self._contract_checks:
            try:
                async with asyncio.timeout(CHECK_SECONDS):
                    is_valid = await self._check_contract(message.account, text_digest(text), signature)
            except TimeoutError:
                raise Unavailable(Code.CHAIN_UNAVAILABLE, "the chain did not say whether the account signed this") from None
        if not is_valid:
            raise problem

    # Nonces

    def _new_nonce(self, issued: int) -> str:
        start = f"{issued:0{_TIME}x}{secrets.token_hex(_RANDOM // 2)}"
        return start + self._code(start)

    def _check_nonce(self, nonce: str, now: float) -> None:
        start, code = nonce[: _TIME + _RANDOM], nonce[_TIME + _RANDOM :]
        if not hmac.compare_digest(code.encode(), self._code(start).encode()):
            raise _refusal("Nonce: expected one of this server; ask for a new challenge")
        if not -1 <= now - int(start[:_TIME], 16) <= CHALLENGE_SECONDS:
            raise _refusal(f"Nonce: expected one that is at most {CHALLENGE_SECONDS} s old; ask for a new challenge")

    def _code(self, start: str) -> str:
        return hmac.new(self._key, start.encode(), hashlib.sha256).hexdigest()[:_CODE]


def message_of(challenge: dict[str, Any], account: Address) -> SignIn:
    """The message of a challenge for an account. Raises BadMessage for a challenge that has not what it should."""
    types = {"domain": str, "statement": str, "uri": str, "chainId": int, "nonce": str, "issuedAt": int, "expiresAt": int}
    for name, kind in types.items():
        if type(challenge.get(name)) is not kind:
            raise BadMessage(f"challenge: {name}: expected {kind.__name__}, got {type(challenge.get(name)).__name__}")
    return SignIn(
        domain=challenge["domain"],
        account=account,
        statement=challenge["statement"],
        uri=challenge["uri"],
        chain_id=challenge["chainId"],
        nonce=challenge["nonce"],
        issued_at=challenge["issuedAt"],
        expires_at=challenge["expiresAt"],
    )


def _refusal(text: str) -> Refusal:
    return Refusal(Code.UNAUTHENTICATED, f"sign-in: {text}")
