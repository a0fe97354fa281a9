"""Sign-in with a wallet to the pages of a gateway: which wallets may, and where."""

from __future__ import annotations

import secrets
from functools import partial

from tallystick.client.sdk.market import Market, maintenance_of
from tallystick.protocol.origins import own_origins
from tallystick.web.wallet_sign_in import WalletSignIn

STATEMENT = "Sign in to this Tallystick gateway. This sends no transaction and spends nothing."
ANY_CHAIN = 1
"""The chain that messages name if the gateway knows none: they are signed by keys, which are the same on all chains."""


def make_sign_in(market: Market) -> WalletSignIn:
    """Returns the sign-in for the gateway's own wallet and those of `page_wallets`."""
    config, onchain = market.config, maintenance_of(market).onchain
    allowed, check = frozenset((market.address, *config.page_wallets)), None
    if onchain is not None:
        from tallystick.chain.contract_signature import is_contract_signature  # noqa: PLC0415 - slow to import

        check = partial(is_contract_signature, onchain.escrow.rpc)
    return WalletSignIn(
        origins=own_origins(config.page_urls, config.host, config.port),
        chain_id=(config.chain_id or ANY_CHAIN) if onchain is None else onchain.escrow.deployment.chain_id,
        key=secrets.token_bytes(32),
        statement=STATEMENT,
        may_enter=allowed.__contains__,
        check_contract=check,
    )
