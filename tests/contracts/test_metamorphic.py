"""The same messages pay the same in any arrangement, and bad messages among them do not affect the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tallystick.chain.claims import SettleRow
from tallystick.chain.events import SkipReason
from tallystick.protocol.eip712 import Domain, Signed, Signer
from tallystick.protocol.types import ZERO_ADDRESS, Address, Amount, Hash
from tests.contracts.artifacts import load
from tests.contracts.market_harness import DOLLAR, U96, Market, paid, person, skipped

OWNER, RELAY, COORDINATOR, STRANGER = (person(n) for n in ("owner", "relay", "coordinator", "stranger"))
PAYERS, PROVIDERS = [person(f"payer {n}") for n in range(3)], [person(f"provider {n}") for n in range(3)]
CENT = 10_000
some = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))


@cache
def _made() -> tuple[Market, tuple[bytes, int]]:
    market = Market()
    for payer in PAYERS:
        market.purse(payer, OWNER.address, 100 * DOLLAR)
    market.call(COORDINATOR.address, "setFee", 200)
    return market, market.chain.snapshot()


@pytest.fixture
def market() -> Market:
    """Three solvent payers, and a coordinator that takes 2 %."""
    return _fresh()


def _fresh() -> Market:
    made, mark = _made()
    made.chain.restore(mark)
    return made


def _state(market: Market) -> list[Any]:
    """All state that settling can change."""
    tabs = [market.ask("tab", payer.address, provider.address) for payer in PAYERS for provider in PROVIDERS]
    accounts = [market.ask("account", person.address) for person in (*PROVIDERS, COORDINATOR)]
    return [market.ask("purse", payer.address) for payer in PAYERS] + tabs + accounts


def _row(market: Market, payer: Signer, provider: Signer, total: int) -> SettleRow:
    """A row of the tab between these two, with the same terms for all its rows."""
    place = PAYERS.index(payer) + 3 * PROVIDERS.index(provider)
    terms: dict[str, Any] = {
        "reserve_target": Amount(place * CENT),
        "max_fee_bps": 100 * place,
        "coordinator": COORDINATOR.address,
    }
    return market.row(payer, provider.address, total, **terms)


@st.composite
def _arrangements(draw: st.DrawFn) -> tuple[dict[tuple[int, int], list[int]], Callable[[Sequence[Any]], list[list[Any]]]]:
    """The totals of some tabs, and a way to order, repeat and split the rows."""
    tabs = st.tuples(st.integers(0, 2), st.integers(0, 2))
    totals = draw(st.dictionaries(tabs, st.lists(st.integers(1, 400), min_size=1, max_size=3), min_size=1, max_size=5))
    random = draw(st.randoms(use_true_random=False))

    def cut(things: Sequence[Any]) -> list[list[Any]]:
        shuffled = [*things, *random.sample(list(things), random.randint(0, len(things)))]
        random.shuffle(shuffled)
        parts: list[list[Any]] = [[] for _ in range(random.randint(1, 3))]
        for thing in shuffled:
            random.choice(parts).append(thing)
        return [part for part in parts if part]

    return totals, cut


@some
@given(arrangement=_arrangements())
def test_order_repetition_and_cuts_do_not_matter(arrangement: Any) -> None:
    """Rows permuted, repeated, and split into claims and batches end in the same state as each tab's last row alone."""
    totals, cut = arrangement
    market = _fresh()
    ends = [_row(market, PAYERS[i], PROVIDERS[j], max(costs) * CENT) for (i, j), costs in totals.items()]
    for (_, j), row in zip(totals, ends, strict=True):
        market.collect(PROVIDERS[j], row)
    wanted = _state(market)

    market = _fresh()
    rows = {j: [(PAYERS[i], cost * CENT) for (i, at), costs in totals.items() if at == j for cost in costs] for j in range(3)}
    parts = [(PROVIDERS[j], part) for j, provider_rows in rows.items() if provider_rows for part in cut(provider_rows)]
    claims = [market.claim(p, *(_row(market, payer, p, total) for payer, total in part)) for p, part in parts]
    for batch in cut(claims):
        market.settle(RELAY.address, *batch)
    assert _state(market) == wanted


@some
@given(arrangement=_arrangements(), left_out=st.randoms(use_true_random=False))
def test_earlier_rows_may_be_left_out(arrangement: Any, left_out: Any) -> None:
    """Only the highest of a tab's rows counts: leaving out any others changes nothing."""
    totals, _ = arrangement

    def collect(keep: Callable[[], bool]) -> list[Any]:
        market = _fresh()
        for (i, j), costs in totals.items():
            kept = [cost for cost in costs if cost == max(costs) or keep()]
            rows = tuple(_row(market, PAYERS[i], PROVIDERS[j], cost * CENT) for cost in kept)
            market.collect(PROVIDERS[j], *rows)
        return _state(market)

    assert collect(lambda: True) == collect(lambda: left_out.random() < 0.5)


def _signed_by(market: Market, row: SettleRow, signer: Signer, domain: Domain | None = None) -> SettleRow:
    digest = row.order.message.digest(domain or market.domain)
    return replace(row, order=Signed(row.order.message, signer.sign_digest(digest)))


def _altered(row: SettleRow, **changes: Any) -> SettleRow:
    return replace(row, order=Signed(replace(row.order.message, **changes), row.order.signature))


def _poison(market: Market, name: str, provider: Signer) -> tuple[SettleRow, SkipReason]:
    """An unpayable row and the reason."""
    payer, provider_address = PAYERS[0], provider.address
    good = market.row(payer, provider_address, 9 * DOLLAR)
    domain = market.domain
    made: dict[str, Callable[[], tuple[SettleRow, SkipReason]]] = {
        "no signature": lambda: (replace(good, order=Signed(good.order.message, bytes(64) + b"\x1b")), SkipReason.BAD_SIGNATURE),
        "a stranger's key": lambda: (_signed_by(market, good, STRANGER), SkipReason.BAD_SIGNATURE),
        "the provider's key": lambda: (_signed_by(market, good, provider), SkipReason.BAD_SIGNATURE),
        "a higher ceiling": lambda: (_altered(good, ceiling=Amount(U96)), SkipReason.BAD_SIGNATURE),
        "another fee": lambda: (_altered(good, max_fee_bps=65_535), SkipReason.BAD_SIGNATURE),
        "another payer": lambda: (_altered(good, payer=PAYERS[1].address), SkipReason.BAD_SIGNATURE),
        "nobody as payer": lambda: (_altered(good, payer=ZERO_ADDRESS), SkipReason.BAD_SIGNATURE),
        "the greatest of everything": lambda: (_greatest(good), SkipReason.BAD_SIGNATURE),
        "another provider's order": lambda: (market.row(payer, STRANGER.address, 9 * DOLLAR), SkipReason.BAD_SIGNATURE),
        "another chain": lambda: (_signed_by(market, good, payer, Domain(1, domain.contract)), SkipReason.BAD_SIGNATURE),
        "another contract": lambda: (
            _signed_by(market, good, payer, Domain(domain.chain_id, market.token)),
            SkipReason.BAD_SIGNATURE,
        ),
        "no cost": lambda: (replace(good, cumulative_cost=Amount(0)), SkipReason.NOTHING_OWED),
        "no ceiling": lambda: (market.row(payer, provider_address, 0, U96), SkipReason.NOTHING_OWED),
        "too late": lambda: (market.row(payer, provider_address, 9 * DOLLAR, claim_by=market.chain.now - 1), SkipReason.EXPIRED),
        "in the year 1970": lambda: (market.row(payer, provider_address, 9 * DOLLAR, claim_by=0), SkipReason.EXPIRED),
        "no purse": lambda: (market.row(STRANGER, provider_address, 9 * DOLLAR), SkipReason.UNKNOWN_PURSE),
        "no purse and no bounds": lambda: (
            market.row(STRANGER, provider_address, U96, reserve_target=Amount(U96)),
            SkipReason.UNKNOWN_PURSE,
        ),
        "an empty purse": lambda: (market.row(person("poor"), provider_address, 9 * DOLLAR), SkipReason.UNFUNDED),
        "its own payer": lambda: (market.row(provider, provider_address, 9 * DOLLAR), SkipReason.SELF_DEALING),
    }
    return made[name]()


def _greatest(row: SettleRow) -> SettleRow:
    numbers = {"ceiling": Amount(U96), "reserve_target": Amount(U96), "max_fee_bps": 0xFFFF, "seq": 2**64 - 1}
    extremes = {"deadline": 2**64 - 1, "claim_by": 2**64 - 1, "coordinator": Address("0x" + "ff" * 20)}
    worst = _altered(row, **numbers, **extremes, terms_hash=Hash(b"\xff" * 32))
    signature = b"\xff" * 32 + b"\x7f" + b"\xff" * 31 + b"\x1c"
    return SettleRow(Signed(worst.order.message, signature), 2**64 - 1, Amount(U96))


POISONS = [
    "no signature", "a stranger's key", "the provider's key", "a higher ceiling", "another fee", "another payer",
    "nobody as payer", "the greatest of everything", "another provider's order", "another chain", "another contract",
    "no cost", "no ceiling", "too late", "in the year 1970", "no purse", "no purse and no bounds", "an empty purse",
    "its own payer",
]  # fmt: skip


@pytest.mark.parametrize("name", POISONS)
def test_a_poisoned_row_harms_only_itself(market: Market, name: str) -> None:
    """A bad row first, between others, last, or twice: the good rows pay exactly the same as without it."""
    market.call(person("poor").address, "open", person("poor").address, OWNER.address, b"")
    provider, mark = PROVIDERS[0], market.chain.snapshot()
    poison, reason = _poison(market, name, provider)
    good = [_row(market, payer, provider, (n + 1) * DOLLAR) for n, payer in enumerate(PAYERS)]
    assert len(paid(market.collect(provider, *good))) == len(good)
    wanted = _state(market)
    for place in range(len(good) + 1):
        market.chain.restore(mark)
        events = market.collect(provider, *good[:place], poison, *good[place:], poison)
        assert (paid(events), skipped(events)) == ([DOLLAR, 2 * DOLLAR, 3 * DOLLAR], [reason, reason])
        assert _state(market) == wanted


@pytest.mark.parametrize(
    "poison", ["no signature", "a stranger's", "half a signature", "a signature of nothing", "of other rows"]
)
def test_a_poisoned_claim_harms_only_itself(market: Market, poison: str) -> None:
    """A claim that its provider did not sign pays nothing, and the claims around it pay."""
    rows = [_row(market, PAYERS[0], provider, DOLLAR) for provider in PROVIDERS]
    first, bad, last = (market.claim(provider, row) for provider, row in zip(PROVIDERS, rows, strict=True))
    signature = {
        "no signature": b"",
        "a stranger's": STRANGER.sign_digest(bad.claim(market.domain).digest(market.domain)),
        "half a signature": bad.signature[:64],
        "a signature of nothing": bytes(65),
        "of other rows": market.claim(PROVIDERS[1], rows[1], rows[1]).signature,
    }[poison]
    market.settle(RELAY.address, first, last)
    wanted, mark = _state(market), _made()[1]
    market.chain.restore(mark)
    events = market.settle(RELAY.address, first, replace(bad, signature=signature), last)
    assert (paid(events), skipped(events)) == ([DOLLAR, DOLLAR], [SkipReason.BAD_CLAIM])
    assert _state(market) == wanted


def test_a_blacklisted_payee_harms_only_itself() -> None:
    """Settling transfers no tokens, so an account that the token refuses does not affect the batch."""
    market = Market(token=load("HostileToken"))
    market.purse(PAYERS[0], OWNER.address, 10 * DOLLAR)
    for banned in (PROVIDERS[0].address, COORDINATOR.address, PAYERS[0].address, OWNER.address, market.escrow):
        market.coin(STRANGER.address, "setBlocked", banned, True)
    terms: dict[str, Any] = {"coordinator": COORDINATOR.address, "max_fee_bps": 100}
    claims = [market.claim(p, market.row(PAYERS[0], p.address, DOLLAR, **terms)) for p in PROVIDERS]
    assert paid(market.settle(RELAY.address, *claims)) == [DOLLAR] * 3


@some
@given(
    owed=st.integers(1, 60),
    reserved=st.integers(0, 20),
    deposits=st.lists(st.integers(1, 30), min_size=1, max_size=5),
    again=st.integers(1, 3),
)
def test_a_partial_payment_is_completed_exactly_once(owed: int, reserved: int, deposits: list[int], again: int) -> None:
    """However often a row is repeated between top-ups, it pays the debt up to the available money, and no more."""
    market, mark = _made()
    market.chain.restore(mark)
    payer, provider = person("slow payer"), PROVIDERS[0]
    market.purse(payer, OWNER.address, 20)
    market.call(OWNER.address, "reserve", payer.address, provider.address, reserved) if reserved else ()
    row, available, total = market.row(payer, provider.address, owed), 20, 0
    for amount in [0, *deposits]:
        if amount:
            market.fund(OWNER.address, amount)
            market.call(OWNER.address, "deposit", payer.address, amount)
        available += amount
        for _ in range(again):
            total += sum(paid(market.collect(provider, row)))
        assert total == min(owed, available) == market.credit(provider.address)
        assert sum(market.tab(payer.address, provider.address)[1:], market.free(payer.address)) == available - total
