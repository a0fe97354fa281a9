"""A sender of transactions that shows on the terminal for what a command waits."""

from __future__ import annotations

from tallystick.chain.sender import MinedTransaction, Sender
from tallystick.cli.progress import activity
from tallystick.protocol.types import Address


class ShownSender(Sender):
    """A sender whose waits are shown while they last."""

    async def send(self, to: Address | None, data: bytes, *, value: int = 0, gas: int | None = None) -> MinedTransaction:
        """See `Sender.send`."""
        with activity("waiting for the chain to take the transaction into a block"):
            return await super().send(to, data, value=value, gas=gas)
