"""The login to a node's pages, where other machines reach them: by wallet, or by the key of the config."""

from __future__ import annotations

import hmac
from dataclasses import dataclass, field

from starlette.routing import Route

from tallystick.protocol.types import Address
from tallystick.web.rendering import Pages
from tallystick.web.sign_in_routes import SignInRoutes
from tallystick.web.wallet_sign_in import WalletSignIn

_NOTICE = (
    "See what this node does and earns. Its own wallet may, the payout address, and those that the config lists (page_wallets)."
)


@dataclass(frozen=True, slots=True)
class PageLogin:
    """How people log in. `account`: the node's own, for which the `key` of the config stands; None or empty: no key does."""

    sign_in: WalletSignIn
    account: Address
    key: str | None = field(default=None, repr=False)

    def routes(self, pages: Pages, targets: tuple[str, ...]) -> list[Route]:
        """The routes to sign in, for everybody. `targets`: the pages to which they lead."""
        find = self.find_holder if self.key else None
        return SignInRoutes(self.sign_in, pages, targets=targets, notice=_NOTICE, find_holder=find).routes()

    def find_holder(self, key: str) -> Address | None:
        """The account that a key stands for, or None for a wrong one."""
        given, own = key.strip().encode(errors="surrogatepass"), (self.key or "").encode()
        return self.account if own and hmac.compare_digest(given, own) else None
