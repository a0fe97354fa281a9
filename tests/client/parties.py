"""The payer and the providers of the tests, and the messages that they sign."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

from tallystick.client.ledger.ledger import Ledger
from tallystick.client.ledger.order_writes import NewJob
from tallystick.client.orders.signing import OrderPolicy, PlacedOrder, sign_order, terms_for
from tallystick.client.orders.tab import Tab
from tallystick.protocol.eip712 import Domain, Signer, Verified
from tallystick.protocol.messages import Ask, Outcome, Receipt, Terms
from tallystick.protocol.pricing import Usage
from tallystick.protocol.sealing import X25519, SealingKey
from tallystick.protocol.tab import ProviderTab
from tallystick.protocol.types import ZERO_HASH, Address, Amount, JobId
from tests.builders import build_ask, receipt_for

DOMAIN = Domain(31337, Address("0x" + "ab" * 20))
MODEL = "stand-in/small"


def signer(name: str) -> Signer:
    """A key made from a name."""
    return Signer(name.encode().rjust(32, b"\1"))


@dataclass
class Provider:
    """A provider with its keys, its ask, and its side of the tab."""

    signer: Signer
    sealing: SealingKey
    ask: Verified[Ask]
    tab: ProviderTab = field(default_factory=ProviderTab)

    @property
    def address(self) -> Address:
        return self.signer.address

    @classmethod
    def make(cls, name: str, **changes: Any) -> Provider:
        key = signer(name)
        sealing = SealingKey(X25519, name.encode().rjust(32, b"\2"))
        values: dict[str, Any] = {
            "model": MODEL,
            "input_price": 100_000,
            "cached_input_price": 50_000,
            "output_price": 400_000,
            "context_tokens": 32_768,
            "max_output_tokens": 8_192,
            "sealing_key": sealing.public,
        }
        return cls(key, sealing, key.sign(build_ask(key.address, **(values | changes)), DOMAIN))


PAYER = signer("payer")
ALICE, BOB = Provider.make("alice"), Provider.make("bob")
COORDINATOR = signer("coordinator").address
POLICY = OrderPolicy(Amount(1_000_000), 60, 3_600, 86_400, 100)
NOW = 1_700_000_000_000_000_000
NOW_S = NOW // 10**9
JOB = JobId(bytes(16))
NEW, SOME = Tab(), Usage(10, 0, 5)


def place(tab: Tab = NEW, *, output: int = 100, body: int = 200, now_ns: int = NOW, job: JobId = JOB) -> PlacedOrder:
    """Returns an order on Alice."""
    terms = terms_for(ALICE.ask, job=job, commitment=ZERO_HASH, output_tokens=output, body_bytes=body)
    return sign_order(
        tab,
        terms,
        signer=PAYER,
        provider=ALICE.address,
        coordinator=COORDINATOR,
        domain=DOMAIN,
        policy=POLICY,
        now_ns=now_ns,
    )


def bill(placed: PlacedOrder, usage: Usage = SOME, outcome: Outcome = Outcome.COMPLETED, **changes: Any) -> Receipt:
    """Returns an honest first receipt for an order, with changes."""
    return receipt_for(placed.order, placed.terms, usage, outcome, **changes)


def sign(tab: Tab, provider: Address, terms: Terms) -> PlacedOrder:
    """Signs as the SDK does."""
    return sign_order(
        tab,
        terms,
        signer=PAYER,
        provider=provider,
        coordinator=COORDINATOR,
        domain=DOMAIN,
        policy=POLICY,
        now_ns=NOW,
    )


async def take(ledger: Ledger, *providers: Provider, at: int = NOW_S, domain: Domain = DOMAIN) -> tuple[JobId, list[PlacedOrder]]:
    """Takes orders for one new job."""
    job = JobId(os.urandom(16))
    new = NewJob(domain, PAYER.address, job, "model", "/v1/chat/completions", b"k" * 32, at)
    drafts = [
        (p.address, terms_for(p.ask, job=job, commitment=ZERO_HASH, output_tokens=100, body_bytes=200))
        for p in providers or (ALICE,)
    ]
    return job, await ledger.sign_orders(new, drafts, sign)
