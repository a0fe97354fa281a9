"""A market in a test: a fresh chain behind a real port, contracts, and people with keys and money."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import uvicorn

from tallystick.chain.claims import ClaimBatch, SettleRow
from tallystick.chain.codec import ContractError
from tallystick.chain.deploy import deploy
from tallystick.chain.deployment import Deployment
from tallystick.chain.devnet import dev_accounts
from tallystick.chain.escrow import Escrow, EscrowRules, TxResult
from tallystick.chain.rpc import Rpc, Sender
from tallystick.protocol.codecs import keccak
from tallystick.protocol.eip712 import Domain, Signed, Signer
from tallystick.protocol.messages import Bind, Claim, Order, Receipt
from tallystick.protocol.pricing import Usage
from tallystick.protocol.types import Address, Amount, Hash
from tests.builders import build_order, build_receipt

DOLLAR = 1_000_000
RULES = EscrowRules(thaw=100, release=200, unstake=500, penalty=Amount(10 * DOLLAR), treasury=Address("0x" + "77" * 20))
FAR = 1 << 40


@contextmanager
def serving(app: Any) -> Iterator[str]:
    """Serves an app on a free port of this machine from a thread of its own; gives its URL."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
        thread.start()
        deadline = time.monotonic() + 10
        while not server.started:
            assert time.monotonic() < deadline, "the chain did not start"
            time.sleep(0.01)
        yield f"http://127.0.0.1:{sock.getsockname()[1]}"
        server.should_exit = True
        thread.join(10)


def person(name: str) -> Signer:
    """A key that follows from a name."""
    return Signer(keccak(name.encode()))


@dataclass
class World:
    """One deployed market and the people in it. `seq` counts orders, so that no two are equal."""

    rpc: Rpc
    deployment: Deployment
    escrow: Escrow
    deployer: Sender
    seq: int = 0
    senders: dict[str, Sender] = field(default_factory=dict)

    @classmethod
    async def make(cls, rpc: Rpc, rules: EscrowRules = RULES) -> World:
        """Deploys from the first dev account."""
        deployer = Sender(rpc, dev_accounts(1)[0], poll=0.001)
        deployment = await deploy(rpc, deployer, rules=rules)
        return cls(rpc, deployment, Escrow(rpc, deployment), deployer)

    @property
    def domain(self) -> Domain:
        return self.deployment.domain

    async def sender(self, signer: Signer) -> Sender:
        """A sender with coins for gas."""
        if signer.address not in self.senders:
            await self.deployer.send(signer.address, b"", value=10**18)
            self.senders[signer.address] = Sender(self.rpc, signer, poll=0.001)
        return self.senders[signer.address]

    async def advance(self, seconds: int) -> None:
        """Lets time pass and a block with it."""
        await self.rpc.request("evm_increaseTime", seconds)
        await self.rpc.request("evm_mine")

    async def give(self, to: Address, amount: int) -> None:
        """Play money."""
        await self.escrow.token.mint(self.deployer, to, Amount(amount))

    async def purse(self, key: Signer, owner: Signer, amount: int) -> Sender:
        """Opens and fills a purse; gives the owner's sender."""
        sender = await self.sender(owner)
        bind = key.sign(Bind(key=key.address, owner=owner.address), self.domain)
        await self.escrow.open_purse(sender, key.address, owner.address, bind)
        if amount:
            await self.top_up(key, owner, amount)
        return sender

    async def top_up(self, key: Signer, owner: Signer, amount: int) -> None:
        """Fills a purse with fresh play money."""
        sender = await self.sender(owner)
        await self.give(owner.address, amount)
        await self.escrow.token.approve(sender, self.deployment.escrow, Amount(amount))
        await self.escrow.deposit(sender, key.address, Amount(amount))

    async def stake(self, provider: Signer, amount: int) -> Sender:
        """Stakes for a provider; gives its sender."""
        sender = await self.sender(provider)
        await self.give(provider.address, amount)
        await self.escrow.token.approve(sender, self.deployment.escrow, Amount(amount))
        await self.escrow.stake(sender, Amount(amount))
        return sender

    async def settle(self, provider: Sender, *rows: SettleRow) -> TxResult:
        """A provider signs for its rows and sends them."""
        return await self.escrow.settle(provider, [self.claim(provider.signer, *rows)])

    def forget_nonces(self) -> None:
        """Lets every sender ask for its nonce again, after the chain went back."""
        for sender in (self.deployer, *self.senders.values()):
            sender.forget_nonce()

    def order(self, key: Signer, provider: Address, ceiling: int, **changes: object) -> Signed[Order]:
        """A signed order; `changes` replace fields."""
        self.seq += 1
        fields: dict[str, object] = {"seq": self.seq, "terms_hash": Hash(bytes(range(32)))}
        order = build_order(key.address, provider, ceiling, **(fields | changes))
        return Signed(order, key.sign_digest(order.digest(self.domain)))

    def row(self, key: Signer, provider: Address, ceiling: int, cost: int | None = None, **changes: object) -> SettleRow:
        """A row that asks for `cost`, the ceiling if not given."""
        return SettleRow(self.order(key, provider, ceiling, **changes), 1, Amount(ceiling if cost is None else cost))

    def claim(self, provider: Signer, *rows: SettleRow) -> ClaimBatch:
        """Rows under the provider's signature, for anyone to send."""
        batch = ClaimBatch(provider.address, rows)
        return replace(batch, signature=provider.sign(as_read(batch, self.domain), self.domain).signature)

    def receipt(self, provider: Signer, payer: Address, seq: int, total: int, **changes: object) -> Signed[Receipt]:
        """A signed receipt."""
        fields: dict[str, object] = {"seq": seq, "cumulative_cost": Amount(total), "cost": Amount(1)}
        return provider.sign(build_receipt(payer, provider.address, Usage(1, 0, 1), **(fields | changes)), self.domain)


def as_read(claim: ClaimBatch, domain: Domain) -> Claim:
    """What the provider of a claim must have signed: the contract reads every row as its own."""
    orders = [replace(row.order, message=read_for(claim.provider, row.order.message)) for row in claim.rows]
    rows = tuple(replace(row, order=order) for row, order in zip(claim.rows, orders, strict=True))
    return replace(claim, rows=rows).claim(domain)


def read_for(provider: Address, order: Order) -> Order:
    """The order as a claim of this provider reads it: rows do not name the provider again."""
    return order if order.provider == provider else replace(order, provider=provider)


@contextmanager
def refused(name: str, **values: object) -> Iterator[None]:
    """The block ends in the contract's custom error of this name, with these arguments among its own."""
    with pytest.raises(ContractError) as caught:
        yield
    assert caught.value.name == name, caught.value
    assert {key: caught.value.values[key] for key in values} == values
