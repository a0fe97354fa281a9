"""Makes the node's pages, and the login to them, from its config."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from node.pages.page_login import PageLogin
from node.pages.provider_pages import WALLET_PATH, Ask, ProviderPages
from node.service.config import NodeConfig
from node.storage.store import SqlStore
from tallystick.chain.contract_signature import is_contract_signature
from tallystick.chain.escrow import Escrow
from tallystick.protocol.origins import own_origins
from tallystick.protocol.types import Address
from tallystick.web.wallet_page import Parties, WalletPage
from tallystick.web.wallet_sign_in import WalletSignIn

STATEMENT = "Sign in to this Tallystick node. This sends no transaction and spends nothing."


def make_pages(
    config: NodeConfig,
    account: Address,
    escrow: Escrow,
    *,
    status: Callable[[], Mapping[str, Any]],
    store: SqlStore,
    least: Callable[[], int],
    ask: Ask,
) -> ProviderPages:
    """Returns the pages; see ProviderPages. `account`: the node's own."""
    wallet = WalletPage(escrow, WALLET_PATH, Parties(account=account))
    return ProviderPages(status, store, least=least, ask=ask, wallet=wallet, login=_login(config, account, escrow))


def _login(config: NodeConfig, account: Address, escrow: Escrow) -> PageLogin | None:
    """Returns the login for a node's own wallet, its payout address and those of `page_wallets`; None if none is needed."""
    if config.open_pages:
        return None
    own = (account,) if config.payout.address is None else (account, config.payout.address)
    allowed = frozenset((*own, *config.page_wallets))
    sign_in = WalletSignIn(
        origins=own_origins(config.page_urls, config.metrics_host, config.metrics_port or 0),
        chain_id=escrow.deployment.chain_id,
        key=secrets.token_bytes(32),
        statement=STATEMENT,
        may_enter=allowed.__contains__,
        check_contract=partial(is_contract_signature, escrow.rpc),
    )
    return PageLogin(sign_in, account, config.page_key)
