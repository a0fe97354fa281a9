"""Bad input to every entry point gives a named error and changes nothing."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from tallystick.chain.codec import ContractError
from tallystick.chain.token import split_signature
from tallystick.protocol.messages import Claim, ClaimRow, Release
from tallystick.protocol.types import ZERO_ADDRESS, ZERO_HASH, Address, Amount
from tests.contracts.market_harness import DOLLAR, FAR, RULES, U96, Market, person

KEY, OWNER, PROVIDER, STRANGER = (person(n) for n in ("key", "owner", "provider", "stranger"))
NOTHING = split_signature(bytes(64) + b"\x1b")
SALT = bytes(32)


@cache
def _market() -> Market:
    """A purse with free, reserved, thawing and releasing money; a stake that is partly leaving; credit."""
    market = Market()
    market.purse(KEY, OWNER.address, 10 * DOLLAR)
    market.stake(PROVIDER.address, 10 * DOLLAR)
    market.call(OWNER.address, "reserve", KEY.address, PROVIDER.address, 3 * DOLLAR)
    market.collect(PROVIDER, market.row(KEY, PROVIDER.address, DOLLAR))
    market.call(OWNER.address, "release", KEY.address, PROVIDER.address)
    market.call(OWNER.address, "thaw", KEY.address, DOLLAR)
    market.call(PROVIDER.address, "unstake", DOLLAR)
    return market


def _messages(market: Market) -> dict[str, Any]:
    """Signed messages with one fault each, by name."""
    now = market.chain.now
    orders = {
        "own order": market.order(PROVIDER, PROVIDER.address, DOLLAR),
        "late order": market.order(KEY, PROVIDER.address, DOLLAR, deadline=now - 1),
        "strange order": market.order(STRANGER, PROVIDER.address, DOLLAR, reserve_target=Amount(1)),
        "order": market.order(KEY, PROVIDER.address, DOLLAR, reserve_target=Amount(9 * DOLLAR)),
        "other order": market.order(KEY, STRANGER.address, DOLLAR, reserve_target=Amount(9 * DOLLAR)),
    }
    consents = {
        "late consent": Release(payer=KEY.address, provider=PROVIDER.address, floor=Amount(0), deadline=now - 1),
        "high consent": Release(payer=KEY.address, provider=PROVIDER.address, floor=Amount(2 * DOLLAR), deadline=FAR),
    }
    receipts = {f"receipt {n}": market.receipt(PROVIDER, KEY.address, 1, n) for n in (1, 2)}
    rows = (ClaimRow(payer=KEY.address, order_hash=ZERO_HASH, seq=1, cumulative_cost=Amount(2)),)
    claim = PROVIDER.sign(Claim(provider=PROVIDER.address, rows=rows), market.domain)
    signed = {name: PROVIDER.sign(consent, market.domain) for name, consent in consents.items()}
    return orders | signed | receipts | {"claim": claim}


CASES: list[tuple[str, Address, tuple[object, ...], str]] = [
    ("open", KEY.address, (ZERO_ADDRESS, OWNER.address, b""), "ZeroAddress"),
    ("open", STRANGER.address, (STRANGER.address, ZERO_ADDRESS, b""), "ZeroAddress"),
    ("open", KEY.address, (KEY.address, STRANGER.address, b""), "PurseExists"),
    ("open", OWNER.address, (STRANGER.address, OWNER.address, bytes(65)), "BadSignature"),
    ("deposit", OWNER.address, (KEY.address, 0), "ZeroAmount"),
    ("deposit", OWNER.address, (KEY.address, U96 + 1), "AmountTooLarge"),
    ("deposit", OWNER.address, (KEY.address, (1 << 256) - 1), "AmountTooLarge"),
    ("deposit", OWNER.address, (KEY.address, DOLLAR), "ERC20InsufficientBalance"),
    ("deposit", OWNER.address, (STRANGER.address, DOLLAR), "UnknownPurse"),
    ("deposit", STRANGER.address, (KEY.address, DOLLAR), "NotOwner"),
    ("depositWithPermit", OWNER.address, (KEY.address, 0, FAR, *NOTHING), "ZeroAmount"),
    ("depositWithPermit", OWNER.address, (KEY.address, U96 + 1, FAR, *NOTHING), "AmountTooLarge"),
    ("depositWithPermit", OWNER.address, (STRANGER.address, 1, FAR, *NOTHING), "UnknownPurse"),
    ("depositWithPermit", STRANGER.address, (KEY.address, 1, FAR, *NOTHING), "NotOwner"),
    ("depositWithAuthorization", STRANGER.address, (KEY.address, 0, 0, FAR, SALT, *NOTHING), "ZeroAmount"),
    ("depositWithAuthorization", STRANGER.address, (KEY.address, U96 + 1, 0, FAR, SALT, *NOTHING), "AmountTooLarge"),
    ("depositWithAuthorization", STRANGER.address, (STRANGER.address, 1, 0, FAR, SALT, *NOTHING), "UnknownPurse"),
    ("depositWithAuthorization", STRANGER.address, (KEY.address, 1, 0, FAR, SALT, *NOTHING), "BadAuthorization"),
    ("thaw", OWNER.address, (KEY.address, 0), "ZeroAmount"),
    ("thaw", OWNER.address, (KEY.address, U96 + 1), "AmountTooLarge"),
    ("thaw", OWNER.address, (KEY.address, 7 * DOLLAR + 1), "InsufficientFree"),
    ("thaw", OWNER.address, (STRANGER.address, 1), "UnknownPurse"),
    ("thaw", KEY.address, (KEY.address, 1), "NotOwner"),
    ("cancelThaw", OWNER.address, (STRANGER.address,), "UnknownPurse"),
    ("cancelThaw", KEY.address, (KEY.address,), "NotOwner"),
    ("withdraw", OWNER.address, (KEY.address,), "TooEarly"),
    ("withdraw", OWNER.address, (STRANGER.address,), "UnknownPurse"),
    ("withdraw", KEY.address, (KEY.address,), "NotOwner"),
    ("reserve", OWNER.address, (KEY.address, PROVIDER.address, 0), "ZeroAmount"),
    ("reserve", OWNER.address, (KEY.address, PROVIDER.address, U96 + 1), "AmountTooLarge"),
    ("reserve", OWNER.address, (KEY.address, PROVIDER.address, 6 * DOLLAR + 1), "InsufficientFree"),
    ("reserve", OWNER.address, (KEY.address, ZERO_ADDRESS, 1), "ZeroAddress"),
    ("reserve", OWNER.address, (KEY.address, KEY.address, 1), "SelfDealing"),
    ("reserve", OWNER.address, (KEY.address, OWNER.address, 1), "SelfDealing"),
    ("reserve", OWNER.address, (STRANGER.address, PROVIDER.address, 1), "UnknownPurse"),
    ("reserve", KEY.address, (KEY.address, PROVIDER.address, 1), "NotOwner"),
    ("secure", STRANGER.address, ("own order",), "SelfDealing"),
    ("secure", STRANGER.address, ("late order",), "Expired"),
    ("secure", STRANGER.address, ("strange order",), "UnknownPurse"),
    ("secure", STRANGER.address, ("order",), "Thawing"),
    ("release", OWNER.address, (KEY.address, STRANGER.address), "NothingReserved"),
    ("release", OWNER.address, (KEY.address, PROVIDER.address), "Releasing"),
    ("release", OWNER.address, (STRANGER.address, PROVIDER.address), "UnknownPurse"),
    ("release", KEY.address, (KEY.address, PROVIDER.address), "NotOwner"),
    ("finishRelease", OWNER.address, (KEY.address, STRANGER.address), "NotReleasing"),
    ("finishRelease", OWNER.address, (KEY.address, PROVIDER.address), "TooEarly"),
    ("finishRelease", OWNER.address, (STRANGER.address, PROVIDER.address), "UnknownPurse"),
    ("finishRelease", KEY.address, (KEY.address, PROVIDER.address), "NotOwner"),
    ("giveBack", PROVIDER.address, (KEY.address, 2 * DOLLAR), "NothingReserved"),
    ("giveBack", PROVIDER.address, (KEY.address, (1 << 256) - 1), "NothingReserved"),
    ("giveBack", STRANGER.address, (KEY.address, 0), "NothingReserved"),
    ("giveBack", PROVIDER.address, (STRANGER.address, 0), "NothingReserved"),
    ("giveBackSigned", STRANGER.address, ("late consent",), "Expired"),
    ("giveBackSigned", STRANGER.address, ("high consent",), "NothingReserved"),
    ("settle", STRANGER.address, ([],), "EmptyBatch"),
    ("cashOut", STRANGER.address, (STRANGER.address,), "NoCredit"),
    ("cashOut", STRANGER.address, (ZERO_ADDRESS,), "NoCredit"),
    ("setPayout", PROVIDER.address, ("escrow",), "BadPayee"),
    ("setPayout", PROVIDER.address, ("token",), "BadPayee"),
    ("setFee", STRANGER.address, (10_001,), "FeeTooHigh"),
    ("setFee", STRANGER.address, ((1 << 256) - 1,), "FeeTooHigh"),
    ("stake", PROVIDER.address, (0,), "ZeroAmount"),
    ("stake", PROVIDER.address, (U96 + 1,), "AmountTooLarge"),
    ("stake", PROVIDER.address, (1,), "ERC20InsufficientBalance"),
    ("stake", STRANGER.address, (1,), "ERC20InsufficientAllowance"),
    ("unstake", PROVIDER.address, (10 * DOLLAR + 1,), "InsufficientStake"),
    ("unstake", PROVIDER.address, ((1 << 256) - 1,), "InsufficientStake"),
    ("withdrawStake", PROVIDER.address, (), "TooEarly"),
    ("withdrawStake", STRANGER.address, (), "NotUnstaking"),
    ("slashEquivocation", STRANGER.address, ("receipt 1", "receipt 1"), "NotEvidence"),
    ("slashOverclaim", STRANGER.address, ("claim 1", "receipt 1"), "NotEvidence"),
    ("slashOverclaim", STRANGER.address, ("claim 0", "receipt 2"), "NotEvidence"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]} {case[3]}")
def test_bad_input(case: tuple[str, Address, tuple[object, ...], str]) -> None:
    """The call is refused with a named error, and the state is unchanged."""
    function, sender, wanted, error = case
    market = _market()
    before = market.chain.snapshot()
    with pytest.raises(ContractError) as caught:
        market.call(sender, function, *_filled(market, wanted))
    assert caught.value.name == error, caught.value
    assert market.chain.snapshot() == before


def _filled(market: Market, wanted: tuple[object, ...]) -> list[object]:
    """Returns the arguments, with this market's messages and addresses in place of their names."""
    messages, arguments = _messages(market), list[object]()
    for name in wanted:
        if not isinstance(name, str) or name not in {*messages, "escrow", "token", "claim 0", "claim 1"}:
            arguments.append(name)
        elif name in messages:
            arguments += [messages[name].message, messages[name].signature]
        elif name.startswith("claim "):
            arguments += [messages["claim"].message, int(name.removeprefix("claim ")), messages["claim"].signature]
        else:
            arguments.append(getattr(market, name))
    return arguments


def test_every_entry_has_bad_input() -> None:
    """Every state-changing call of the contract is in the tables."""
    views = {"purse", "tab", "account", "stakeOf", "authorizationNonce", "evidenceUsed", "eip712Domain", "token", "penalty"}
    views |= {"thawPeriod", "releasePeriod", "unstakePeriod", "treasury", "MAX_WAIT", "REPORTER_BPS"}
    assert {case[0] for case in CASES} == set(_market().escrow_abi._functions) - views


def test_errors_in_the_order_of_their_causes() -> None:
    """With several faults, a call is refused for the first, and after its correction for the next."""
    market = _market()
    mark = market.chain.snapshot()
    market.call(OWNER.address, "cancelThaw", KEY.address)
    messages = _messages(market)
    for name, error in (("order", "Releasing"), ("other order", None), ("other order", "NothingToReserve")):
        if error is None:
            market.call(STRANGER.address, "secure", messages[name].message, messages[name].signature)
            continue
        with pytest.raises(ContractError) as caught:
            market.call(STRANGER.address, "secure", messages[name].message, messages[name].signature)
        assert caught.value.name == error
    with pytest.raises(ContractError, match="NotThawing"):
        market.call(OWNER.address, "cancelThaw", KEY.address)
    with pytest.raises(ContractError, match="NotThawing"):
        market.call(OWNER.address, "withdraw", KEY.address)
    market.chain.now += RULES.release
    market.call(OWNER.address, "finishRelease", KEY.address, PROVIDER.address)
    market.chain.restore(mark)
