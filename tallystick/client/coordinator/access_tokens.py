"""A wallet's access tokens: they prove to a coordinator that the client reading or cancelling a job holds the payer's key."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from tallystick.client.coordinator.info import CoordinatorInfo
from tallystick.protocol.access import dump_access
from tallystick.protocol.eip712 import Signer
from tallystick.protocol.messages import Access

REUSE_SECONDS = 120
"""Seconds for which a token is used before a new one is signed; a coordinator accepts it for much longer."""


class AccessTokens:
    """The access tokens of one wallet at one coordinator, each signed once and used for REUSE_SECONDS.

    `info` identifies the coordinator; `now` is Unix time in seconds.
    """

    def __init__(self, wallet: Signer, info: Callable[[], Awaitable[CoordinatorInfo]], now: Callable[[], int]) -> None:
        self._wallet, self._info, self._now = wallet, info, now
        self._token = ""
        self._signed_at = 0

    async def __call__(self) -> str:
        """Returns the value of the Authorization header. Raises Unavailable or Refusal if the coordinator is unknown."""
        now = max(self._now(), 0)
        if not self._token or not 0 <= now - self._signed_at < REUSE_SECONDS:
            info = await self._info()
            access = Access(account=self._wallet.address, coordinator=info.coordinator, issued_at=now)
            self._token, self._signed_at = dump_access(self._wallet.sign(access, info.domain)), now
        return self._token
