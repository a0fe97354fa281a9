from __future__ import annotations

from typing import Any

import rlp
from eth_account import Account
from hypothesis import given, settings
from hypothesis import strategies as st

from tallystick.chain.transactions import Call, Fees, Nonces, _rlp, sign
from tallystick.protocol.types import Address
from tests.chain.harness import person

KEY = person("key")
wei = st.integers(0, 2**128)


@given(
    st.none() | st.binary(min_size=20, max_size=20),
    st.binary(max_size=300),
    st.tuples(wei, st.integers(1, 2**53), st.integers(0, 2**63), st.integers(21_000, 2**24), wei, wei),
)
@settings(max_examples=60, deadline=None)
def test_a_transaction_is_signed_as_everybody_signs_it(to: bytes | None, data: bytes, numbers: tuple[int, ...]) -> None:
    """Hash and bytes equal those of eth_account, for calls and contract creations of any content."""
    value, chain_id, nonce, gas, tip, more = numbers
    fees = Fees(tip, tip + more)
    call = Call(KEY.address, Address("0x" + to.hex()) if to else None, data, value)
    made = sign(KEY, call, chain_id=chain_id, nonce=nonce, gas=gas, fees=fees)
    fields: dict[str, Any] = {"type": 2, "chainId": chain_id, "nonce": nonce, "gas": gas, "value": value, "data": data}
    fields |= {"maxPriorityFeePerGas": fees.tip, "maxFeePerGas": fees.maximum} | ({"to": to} if to else {})
    reference = Account.sign_transaction(fields, KEY.secret)
    assert (made.raw, made.hash) == ("0x" + reference.raw_transaction.hex(), "0x" + reference.hash.hex())


sizes = st.sampled_from([0, 1, 2, 54, 55, 56, 57, 255, 256, 257, 65_535, 65_536])
items = st.recursive(wei | st.integers(0, 257) | sizes.map(bytes) | st.binary(max_size=3), st.lists, max_leaves=8)


@given(items)
def test_numbers_bytes_and_lists_are_encoded_as_everybody_encodes_them(item: Any) -> None:
    """RLP of every kind of item, at each boundary of its heads, equals that of the package rlp."""
    assert _rlp(item) == rlp.encode(item)


@given(wei, wei, wei, wei)
@settings(max_examples=100, deadline=None)
def test_a_replacement_pays_a_tenth_more_of_both(tip: int, more: int, fresh_tip: int, fresh_more: int) -> None:
    """In any market, a replacement raises both fees by more than 10 %, stays at or above the market, and its tip is below
    its fee.
    """
    old, fresh = Fees(tip, tip + more), Fees(fresh_tip, fresh_tip + fresh_more)
    new = old.raised(fresh)
    assert 10 * new.tip > 11 * old.tip
    assert 10 * new.maximum > 11 * old.maximum
    assert fresh.tip <= new.tip <= new.maximum >= fresh.maximum
    capped = new.capped(10**9)
    assert capped.tip <= capped.maximum <= max(10**9, 0)
    assert new.capped(None) == new


def test_the_lowest_free_nonce_goes_first() -> None:
    """The lowest unused nonce is next; pending nonces and those of other programs are skipped."""
    nonces = Nonces()
    assert [nonces.take(5) for _ in range(3)] == [5, 6, 7]
    nonces.release(6)
    assert nonces.take(5) == 6
    nonces.mark_mined(5)
    assert nonces.take(5, busy={8}) == 9
    assert nonces.floor == 6


def test_an_abandoned_nonce_goes_to_the_next_transaction() -> None:
    """The nonce of an abandoned transaction goes to the next one, which must exceed its fees unless it was mined."""
    nonces = Nonces()
    first, second = nonces.take(5), nonces.take(5)
    nonces.abandon(first, Fees(1, 2))
    nonces.abandon(second, Fees(3, 4))
    nonces.forget_abandoned_below(6)
    assert nonces.take(7) == 6
    assert nonces.pop_abandoned_fees(6) == Fees(3, 4)
    assert not nonces.any_abandoned
    assert nonces.take(7) == 7
    assert nonces.pop_abandoned_fees(7) is None


def test_a_lower_gap_precedes_an_abandoned_nonce() -> None:
    """If the chain lost a transaction, its nonce is used first, since all later ones wait for it."""
    nonces = Nonces()
    assert nonces.take(10) == 10
    nonces.abandon(10, Fees(1, 1))
    nonces.floor = 10
    nonces.lower_floor(8)
    assert [nonces.take(8) for _ in range(3)] == [8, 9, 10]


def test_a_transaction_that_nobody_follows_keeps_its_nonce() -> None:
    """Where the chain does not count pending transactions, those that were sent and no longer followed are counted until they are
    mined.
    """
    nonces = Nonces()
    assert [nonces.take(5) for _ in range(3)] == [5, 6, 7]
    nonces.leave(5, Fees(1, 2))
    nonces.leave(6, Fees(1, 2))
    assert nonces.after_unfollowed(5) == 7
    assert nonces.after_unfollowed(6) == 7
    assert nonces.after_unfollowed(5) == 5, "a nonce that was mined is forgotten for good, also if the chain drops its block"
    assert nonces.take(nonces.after_unfollowed(6)) == 8


def test_a_lost_transaction_below_an_abandoned_one_frees_its_nonce() -> None:
    """If a transaction is not mined in time, the nonces below it that nobody follows were lost, and are used first."""
    nonces = Nonces()
    assert [nonces.take(5) for _ in range(3)] == [5, 6, 7]
    nonces.leave(5, Fees(1, 2))
    nonces.leave(7, Fees(7, 8))
    nonces.abandon(6, Fees(3, 4))
    assert [nonces.take(nonces.after_unfollowed(5)), nonces.pop_abandoned_fees(5)] == [5, Fees(1, 2)]
    assert [nonces.take(nonces.after_unfollowed(5)), nonces.pop_abandoned_fees(6)] == [6, Fees(3, 4)]
    assert nonces.take(nonces.after_unfollowed(7)) == 8, "the nonce above is still in use"
