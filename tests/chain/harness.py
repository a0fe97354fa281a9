"""A market on a new chain behind a real port: deployed contracts, and accounts with keys and money."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import uvicorn

from tallystick.chain.claims import SettleRow
from tallystick.chain.codec import ContractError
from tallystick.chain.deploy import deploy
from tallystick.chain.deployment import Deployment
from tallystick.chain.devnet import dev_accounts
from tallystick.chain.escrow import Escrow, EscrowRules, TxResult
from tallystick.chain.rpc import Rpc, Sender
from tallystick.protocol.eip712 import Signer
from tallystick.protocol.messages import Bind
from tallystick.protocol.types import Address, Amount
from tests.chain.signing import MessageSigner, as_read, person, read_for

__all__ = ["as_read", "person", "read_for"]
DOLLAR = 1_000_000
RULES = EscrowRules(thaw=100, release=200, unstake=500, penalty=Amount(10 * DOLLAR), treasury=Address("0x" + "77" * 20))
FAR = 1 << 40


@contextmanager
def serving(app: Any) -> Iterator[str]:
    """Serves an app on a free port from a separate thread; yields its URL."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
        thread.start()
        deadline = time.monotonic() + 60
        while not server.started:
            assert time.monotonic() < deadline, "the chain did not start"
            time.sleep(0.01)
        yield f"http://127.0.0.1:{sock.getsockname()[1]}"
        server.should_exit = True
        thread.join(10)


@dataclass
class World(MessageSigner):
    """One deployed market on a chain behind a port, and senders for the accounts in it."""

    rpc: Rpc
    deployment: Deployment
    escrow: Escrow
    deployer: Sender
    seq: int = 0
    senders: dict[str, Sender] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.domain = self.deployment.domain

    @classmethod
    async def make(cls, rpc: Rpc, rules: EscrowRules = RULES) -> World:
        """Deploys a market from the first dev account."""
        deployer = Sender(rpc, dev_accounts(1)[0], poll=0.001)
        deployment = await deploy(rpc, deployer, rules=rules)
        return cls(rpc, deployment, Escrow(rpc, deployment), deployer)

    async def sender(self, signer: Signer) -> Sender:
        """A sender with coins for gas."""
        if signer.address not in self.senders:
            await self.deployer.send(signer.address, b"", value=10**18)
            self.senders[signer.address] = Sender(self.rpc, signer, poll=0.001)
        return self.senders[signer.address]

    async def advance(self, seconds: int) -> None:
        """Moves the clock forward and mines a block."""
        await self.rpc.request("evm_increaseTime", seconds)
        await self.rpc.request("evm_mine")

    async def give(self, to: Address, amount: int) -> None:
        """Mints test dollars."""
        await self.escrow.token.mint(self.deployer, to, Amount(amount))

    async def purse(self, key: Signer, owner: Signer, amount: int) -> Sender:
        """Opens and fills a purse. Returns the owner's sender."""
        sender = await self.sender(owner)
        bind = key.sign(Bind(key=key.address, owner=owner.address), self.domain)
        await self.escrow.open_purse(sender, key.address, owner.address, bind)
        if amount:
            await self.top_up(key, owner, amount)
        return sender

    async def top_up(self, key: Signer, owner: Signer, amount: int) -> None:
        """Fills a purse with newly minted test dollars."""
        sender = await self.sender(owner)
        await self.give(owner.address, amount)
        await self.escrow.token.approve(sender, self.deployment.escrow, Amount(amount))
        await self.escrow.deposit(sender, key.address, Amount(amount))

    async def stake(self, provider: Signer, amount: int) -> Sender:
        """Stakes newly minted test dollars. Returns the provider's sender."""
        sender = await self.sender(provider)
        await self.give(provider.address, amount)
        await self.escrow.token.approve(sender, self.deployment.escrow, Amount(amount))
        await self.escrow.stake(sender, Amount(amount))
        return sender

    async def settle(self, provider: Sender, *rows: SettleRow) -> TxResult:
        """Sends a claim of rows that the provider signs."""
        return await self.escrow.settle(provider, [self.claim(provider.signer, *rows)])

    def forget_nonces(self) -> None:
        """Makes every sender read its nonce from the chain again, after the chain was reverted."""
        for sender in (self.deployer, *self.senders.values()):
            sender.forget_nonce()


@contextmanager
def refused(name: str, **values: object) -> Iterator[None]:
    """Asserts that the block raises the contract's custom error of this name, with these arguments."""
    with pytest.raises(ContractError) as caught:
        yield
    assert caught.value.name == name, caught.value
    assert {key: caught.value.values[key] for key in values} == values
