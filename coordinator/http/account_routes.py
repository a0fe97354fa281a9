"""What one account may read: its jobs, tabs and refusals. It signs in with its wallet, or signs a token for each request."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request

from coordinator.domain import resource_bounds
from coordinator.domain.refusal_log import RefusalLog
from coordinator.http.job_views import job_view, live_view, refusal_view, tab_view
from coordinator.http.schemas import Token
from coordinator.jobs.accounts import AccessTiers, AccountStore, SettledAmounts
from coordinator.jobs.market import Market
from tallystick.protocol.access import SCHEME, load_access
from tallystick.protocol.errors import BadMessage, Code, Refusal, rate_limited
from tallystick.protocol.types import Address
from tallystick.runtime.token_bucket import TokenBucket
from tallystick.web.wallet_sign_in import WalletSignIn

MAX_ACCOUNT_JOBS = 200
"""Jobs, and tabs, of one account that an answer lists."""
_Limit = Annotated[int, Query(ge=1, le=MAX_ACCOUNT_JOBS, description="Maximum number of jobs, and of tabs.")]


@dataclass(frozen=True, slots=True)
class Accounts:
    """What the coordinator knows of single accounts, and how they prove who they are. `tiers`: None without any."""

    sign_in: WalletSignIn
    store: AccountStore
    settled: SettledAmounts
    refusals: RefusalLog = field(default_factory=RefusalLog)
    tiers: AccessTiers | None = None


class AccountViews:
    """Reads what is of an account, for the API and for its page. `now`: Unix seconds; `tick`: a monotonic clock in seconds."""

    def __init__(
        self, accounts: Accounts, market: Market, now: Callable[[], float], tick: Callable[[], float] = time.monotonic
    ) -> None:
        self.accounts, self._market, self._now, self._tick = accounts, market, now, tick
        self._reads = TokenBucket(resource_bounds.ACCOUNT_READS_PER_SECOND, resource_bounds.ACCOUNT_READS_BURST)

    async def caller(self, request: Request, token: str | None) -> Address:
        """Returns the account of a request, by its session or by the token that it signed.

        Raises Refusal (unauthenticated), BadSignature, Unavailable.
        """
        if token is not None and token.partition(" ")[0] == SCHEME:
            return read_token(token, self._market, self._now())
        session = await self.accounts.sign_in.session_of(request)
        if session is None:
            text = (
                f"expected a session (/sign-in, or tally sign-in) or a signed access token: Authorization: {SCHEME} TOKEN,"
                " or Authorization: Bearer SESSION"
            )
            raise Refusal(Code.UNAUTHENTICATED, text)
        return session.account

    async def read(self, account: Address, limit: int) -> dict[str, Any]:
        """Returns what is of an account as JSON. Raises Unavailable: rate_limited if it is read too often."""
        tick = self._tick()
        if not self._reads.try_spend(account, tick):
            text = f"{account} reads its account more than {resource_bounds.ACCOUNT_READS_PER_SECOND} times a second"
            raise rate_limited(text, self._reads.delay(account, tick))
        accounts = self.accounts
        jobs = await accounts.store.jobs_of(account, limit)
        live = [job for job in reversed(self._market.live_jobs.values()) if job.payer == account]
        return {
            "account": account,
            "tier": None if accounts.tiers is None else await accounts.tiers.explain(account),
            "live": [live_view(job) for job in live[:limit]],
            "jobs": [job_view(known, None if known.record.payer == account else account) for known in jobs],
            "tabs": [tab_view(tab) for tab in await accounts.store.tabs_of(account, limit)],
            "refusals": [refusal_view(refused) for refused in accounts.refusals.of(account)],
        }


def read_token(token: str | None, market: Market, now: float) -> Address:
    """Returns the account whose key signed an access token. Raises Refusal (unauthenticated) or BadSignature."""
    try:
        return load_access(token, market.domain, market.address, now)
    except BadMessage as error:
        raise Refusal(Code.UNAUTHENTICATED, str(error)) from error


def add_account_routes(api: FastAPI, views: AccountViews) -> None:
    """Adds the route of an account."""

    @api.get("/v1/account")
    async def account(request: Request, token: Token = None, limit: _Limit = 50) -> dict[str, Any]:
        """Returns what this coordinator knows of the caller's account; nobody else reads it.

        The caller signed in with its wallet (EIP-4361), and sends the session as a cookie or as `Authorization: Bearer SESSION`;
        or it sends `Tally TOKEN`. `live`: its jobs as a payer that have not ended. `jobs`: its ended jobs with a receipt, newest
        first; of a job that it served, its own attempt alone. `tabs`: receipts and settlement on chain, with each party.
        `refusals`: why its jobs came to nothing lately at this process. `tier`: its access tier, or null. Amounts of tabs are
        base units.
        """
        return await views.read(await views.caller(request, token), limit)
