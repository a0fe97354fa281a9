"""Attacks by name: what the attacker tries, and what the attack gains."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
from eth_account import Account

from tallystick.chain.calldata import find_claims
from tallystick.chain.claims import ClaimBatch
from tallystick.chain.codec import ContractError
from tallystick.chain.events import Settled, SkipReason, Slashed
from tallystick.chain.token import Permit, split_signature
from tallystick.protocol.eip712 import Domain, Signed
from tallystick.protocol.errors import Refusal
from tallystick.protocol.messages import Bind, Release
from tallystick.protocol.signatures import checksum
from tallystick.protocol.types import Amount
from tests.chain.harness import World
from tests.contracts.artifacts import load
from tests.contracts.market_harness import DOLLAR, FAR, RULES, U96, Market, N, paid, person, skipped

KEY, OWNER, PROVIDER, COORDINATOR = (person(n) for n in ("key", "owner", "provider", "coordinator"))
SYBIL, THIEF, REPORTER = (person(n) for n in ("sybil", "thief", "reporter"))


@contextmanager
def refused(name: str, **values: object) -> Iterator[None]:
    """Asserts that the block raises the contract's error of this name."""
    with pytest.raises(ContractError) as caught:
        yield
    assert caught.value.name == name, caught.value
    assert values.items() <= caught.value.values.items()


@pytest.fixture
def market() -> Market:
    """A payer with ten dollars."""
    made = Market()
    made.purse(KEY, OWNER.address, 10 * DOLLAR)
    return made


# ------------------------------------------------------------------------------------------------- by payers on providers


def test_drain_through_a_sybil_payee(market: Market) -> None:
    """A payer that pays everything to its own sybil takes nothing from an honest provider's reservation."""
    market.call(OWNER.address, "reserve", KEY.address, PROVIDER.address, 4 * DOLLAR)
    drained = market.collect(SYBIL, market.row(KEY, SYBIL.address, U96, reserve_target=Amount(U96)))
    assert paid(drained) == [6 * DOLLAR]
    assert paid(market.collect(PROVIDER, market.row(KEY, PROVIDER.address, 4 * DOLLAR))) == [4 * DOLLAR]


def test_thaw_race(market: Market) -> None:
    """An owner that withdraws in the first possible second leaves a provider exactly its reservation."""
    market.call(OWNER.address, "reserve", KEY.address, PROVIDER.address, 3 * DOLLAR)
    with refused("InsufficientFree", available=7 * DOLLAR, wanted=7 * DOLLAR + 1):
        market.call(OWNER.address, "thaw", KEY.address, 7 * DOLLAR + 1)
    market.call(OWNER.address, "thaw", KEY.address, 7 * DOLLAR)
    market.chain.now += RULES.thaw - 1
    with refused("TooEarly", readyAt=market.chain.now + 1):
        market.call(OWNER.address, "withdraw", KEY.address)
    market.chain.now += 1
    market.call(OWNER.address, "withdraw", KEY.address)
    row = market.row(KEY, PROVIDER.address, 9 * DOLLAR)
    assert paid(market.collect(PROVIDER, row)) == [3 * DOLLAR]
    assert skipped(market.collect(PROVIDER, row)) == [SkipReason.UNFUNDED]


def test_thaw_race_won_by_the_provider(market: Market) -> None:
    """Money that a provider collects before the withdrawal is not withdrawn again."""
    market.call(OWNER.address, "thaw", KEY.address, 10 * DOLLAR)
    market.chain.now += RULES.thaw
    assert paid(market.collect(PROVIDER, market.row(KEY, PROVIDER.address, 9 * DOLLAR))) == [9 * DOLLAR]
    market.call(OWNER.address, "withdraw", KEY.address)
    assert market.balance(OWNER.address) == DOLLAR
    assert market.balance(market.escrow) == market.credit(PROVIDER.address) == 9 * DOLLAR


def test_an_early_thaw_is_no_stock_of_freedom(market: Market) -> None:
    """An old thaw of a small amount releases only that amount; more needs a new announcement with a new wait."""
    market.call(OWNER.address, "thaw", KEY.address, 1)
    market.chain.now += 10 * RULES.thaw
    market.call(OWNER.address, "thaw", KEY.address, 10 * DOLLAR)
    with refused("TooEarly", readyAt=market.chain.now + RULES.thaw):
        market.call(OWNER.address, "withdraw", KEY.address)


def test_release_of_what_was_just_earned(market: Market) -> None:
    """A payer cannot take a reservation back before its provider can collect from it."""
    market.call(OWNER.address, "reserve", KEY.address, PROVIDER.address, 10 * DOLLAR)
    market.call(OWNER.address, "release", KEY.address, PROVIDER.address)
    market.chain.now += RULES.release - 1
    with refused("TooEarly", readyAt=market.chain.now + 1):
        market.call(OWNER.address, "finishRelease", KEY.address, PROVIDER.address)
    assert paid(market.collect(PROVIDER, market.row(KEY, PROVIDER.address, 10 * DOLLAR))) == [10 * DOLLAR]


DELEGATED = {
    "says yes to every signature": "631626ba7e60e01b5f5260205ff3",
    "says no to every signature": "5f5f5260205ff3",
    "reverts": "5f5ffd",
}


@pytest.mark.parametrize("code", DELEGATED.values(), ids=DELEGATED)
@pytest.mark.parametrize("delegation", [True, False], ids=["delegated", "code of its own"])
def test_a_payer_key_with_code(market: Market, code: str, delegation: bool) -> None:
    """EIP-7702: code at a payer's address neither voids its signed orders nor signs others."""
    wallet = person("a wallet implementation").address
    signed = market.row(KEY, PROVIDER.address, DOLLAR)
    order = market.row(KEY, PROVIDER.address, 5 * DOLLAR, reserve_target=Amount(DOLLAR)).order.message
    forged = Signed(order, THIEF.sign_digest(order.digest(market.domain)))
    market.chain.etch(wallet, bytes.fromhex(code))
    market.chain.etch(KEY.address, b"\xef\x01\x00" + bytes.fromhex(wallet[2:]) if delegation else bytes.fromhex(code))
    events = market.collect(PROVIDER, replace(signed, order=forged, cumulative_cost=Amount(5 * DOLLAR)), signed)
    assert (skipped(events), paid(events)) == ([SkipReason.BAD_SIGNATURE], [DOLLAR])
    with refused("BadSignature", signer=KEY.address):
        market.call(THIEF.address, "secure", order, forged.signature)
    market.call(THIEF.address, "secure", order, KEY.sign_digest(order.digest(market.domain)))
    assert market.tab(KEY.address, PROVIDER.address) == (DOLLAR, DOLLAR)


async def test_eip_7702_delegated_payer_key(world: World) -> None:
    """With a real delegation (a type-4 transaction), the payer's key becomes a smart account, and its order pays."""
    key = person("smart account")  # a separate key, since the chain is shared and this key no longer accepts coins
    await world.purse(key, OWNER, 10 * DOLLAR)
    row = world.row(key, PROVIDER.address, DOLLAR)
    await world.sender(THIEF)
    chain = {"chainId": world.deployment.chain_id}
    authorization = Account.sign_authorization(chain | {"address": checksum(world.deployment.token), "nonce": 0}, key.secret)
    nonce = int(await world.rpc.request("eth_getTransactionCount", THIEF.address, "latest"), 16)
    fees = {"gas": 200_000, "maxFeePerGas": 10**11, "maxPriorityFeePerGas": 10**9}
    fields = chain | fees | {"type": 4, "nonce": nonce, "to": checksum(THIEF.address), "value": 0, "data": b"", "accessList": []}
    raw = Account.sign_transaction(fields | {"authorizationList": [authorization]}, THIEF.secret).raw_transaction
    await world.rpc.request("eth_sendRawTransaction", "0x" + bytes(raw).hex())
    assert await world.rpc.request("eth_getCode", key.address, "latest") == "0xef0100" + world.deployment.token[2:]
    (fact,) = (await world.settle(await world.sender(PROVIDER), row)).of(Settled)
    assert fact.paid == DOLLAR


# ------------------------------------------------------------------------------------------------- by providers on payers


def test_refill_during_a_thaw(market: Market) -> None:
    """A provider with an old order for a huge reservation cannot hold back money that is announced for withdrawal."""
    greedy = {"reserve_target": Amount(U96)}
    market.call(OWNER.address, "thaw", KEY.address, DOLLAR)
    order = market.order(KEY, PROVIDER.address, DOLLAR, **greedy)
    with refused("Thawing", key=KEY.address):
        market.call(PROVIDER.address, "secure", order.message, order.signature)
    market.collect(PROVIDER, market.row(KEY, PROVIDER.address, DOLLAR, None, **greedy))
    assert market.tab(KEY.address, PROVIDER.address) == (DOLLAR, 0)
    market.call(OWNER.address, "thaw", KEY.address, 9 * DOLLAR)
    market.chain.now += RULES.thaw
    market.call(OWNER.address, "withdraw", KEY.address)
    assert market.balance(OWNER.address) == 9 * DOLLAR


def test_reserving_released_money_again(market: Market) -> None:
    """An owner with everything reserved can withdraw, although a provider has an order that would reserve it again."""
    order = market.order(KEY, PROVIDER.address, DOLLAR, reserve_target=Amount(U96))
    market.call(PROVIDER.address, "secure", order.message, order.signature)
    market.call(OWNER.address, "release", KEY.address, PROVIDER.address)
    market.fund(OWNER.address, 1)
    market.call(OWNER.address, "deposit", KEY.address, 1)
    market.call(OWNER.address, "thaw", KEY.address, 1)
    market.chain.now += RULES.release
    market.call(OWNER.address, "finishRelease", KEY.address, PROVIDER.address)
    with refused("Thawing", key=KEY.address):
        market.call(PROVIDER.address, "secure", order.message, order.signature)
    market.call(OWNER.address, "thaw", KEY.address, 10 * DOLLAR + 1)
    market.chain.now += RULES.thaw
    market.call(OWNER.address, "withdraw", KEY.address)
    assert market.balance(OWNER.address) == 10 * DOLLAR + 1


def test_claim_at_the_edge_of_claim_by(market: Market) -> None:
    """A row pays in the last second of claimBy and not in the next; no later order is affected by an expired one."""
    edge = market.row(KEY, PROVIDER.address, 2 * DOLLAR, DOLLAR, claim_by=market.chain.now + 50)
    market.chain.now += 50
    assert paid(market.collect(PROVIDER, edge)) == [DOLLAR]
    market.chain.now += 1
    rest = replace(edge, cumulative_cost=Amount(2 * DOLLAR))
    assert skipped(market.collect(PROVIDER, rest)) == [SkipReason.EXPIRED]
    assert paid(market.collect(PROVIDER, market.row(KEY, PROVIDER.address, 2 * DOLLAR))) == [DOLLAR]


def test_one_order_claimed_many_times(market: Market) -> None:
    """The same row pays once in one claim, in many claims and in many transactions; so do two orders with one ceiling."""
    row, second_row = (market.row(KEY, PROVIDER.address, DOLLAR) for _ in range(2))
    claim = market.claim(PROVIDER, row, second_row, row)
    assert sum(paid(market.settle(THIEF.address, claim, claim, market.claim(PROVIDER, second_row)))) == DOLLAR
    assert paid(market.settle(THIEF.address, claim)) == []


def test_an_equivocating_provider(market: Market) -> None:
    """Two receipts with one number cost the stake, also a leaving one, until the last second of its wait."""
    market.stake(PROVIDER.address, 8 * DOLLAR)
    pair = [market.receipt(PROVIDER, KEY.address, 7, total) for total in (DOLLAR, 2 * DOLLAR)]
    evidence = [part for receipt in pair for part in (receipt.message, receipt.signature)]
    market.call(PROVIDER.address, "unstake", 8 * DOLLAR)
    market.chain.now += RULES.unstake - 1
    with refused("TooEarly"):
        market.call(PROVIDER.address, "withdrawStake")
    (slashed,) = market.call(REPORTER.address, "slashEquivocation", *evidence)
    assert isinstance(slashed, Slashed)
    assert (slashed.amount, slashed.reward) == (8 * DOLLAR, 8 * DOLLAR // 5)
    with refused("NothingAtStake"):
        market.call(REPORTER.address, "slashEquivocation", *evidence)
    with refused("NotUnstaking"):
        market.call(PROVIDER.address, "withdrawStake")


def test_self_slash_to_unstake_early(market: Market) -> None:
    """A provider that reports itself gets a fifth at once and loses the rest; waiting would have returned everything."""
    market.stake(PROVIDER.address, 10 * DOLLAR)
    pair = [market.receipt(PROVIDER, KEY.address, 1, total) for total in (1, 2)]
    market.call(PROVIDER.address, "slashEquivocation", *(part for r in pair for part in (r.message, r.signature)))
    market.call(PROVIDER.address, "cashOut", PROVIDER.address)
    assert market.balance(PROVIDER.address) == 2 * DOLLAR
    assert market.credit(RULES.treasury) == 8 * DOLLAR


def test_evidence_worn_out_before_staking(market: Market) -> None:
    """Reporting oneself with almost no stake does not use up the evidence."""
    pairs = [[market.receipt(PROVIDER, KEY.address, seq, total) for total in (1, 2)] for seq in (1, 2)]
    evidence = [[part for r in pair for part in (r.message, r.signature)] for pair in pairs]
    with refused("NothingAtStake"):
        market.call(PROVIDER.address, "slashEquivocation", *evidence[0])
    market.stake(PROVIDER.address, 1)
    market.call(PROVIDER.address, "slashEquivocation", *evidence[0])
    market.stake(PROVIDER.address, 100 * DOLLAR)
    (slashed,) = market.call(REPORTER.address, "slashEquivocation", *evidence[0])
    assert isinstance(slashed, Slashed)
    assert slashed.amount == RULES.penalty - 1
    with refused("EvidenceUsed", evidence=slashed.evidence):
        market.call(REPORTER.address, "slashEquivocation", *evidence[0])
    market.call(REPORTER.address, "slashEquivocation", *evidence[1])


# ------------------------------------------------------------------------------------------------------ by the one between


def test_fee_above_the_signed_limit(market: Market) -> None:
    """A coordinator that raises its rate to 100 % just before it settles gets only the fee that the payer signed."""
    terms: dict[str, Any] = {"coordinator": COORDINATOR.address, "max_fee_bps": 100}
    claim = market.claim(PROVIDER, market.row(KEY, PROVIDER.address, DOLLAR, **terms))
    market.call(COORDINATOR.address, "setFee", 10_000)
    (fact, *_) = [e for e in market.settle(COORDINATOR.address, claim) if isinstance(e, Settled)]
    assert (fact.paid, fact.fee) == (DOLLAR, DOLLAR // 100)
    assert market.credit(PROVIDER.address) == DOLLAR - DOLLAR // 100


def test_a_coordinator_redirects_a_claim(market: Market) -> None:
    """Rows with another payee, or with another coordinator's name, pay nobody."""
    terms: dict[str, Any] = {"coordinator": COORDINATOR.address, "max_fee_bps": 100}
    row = market.row(KEY, PROVIDER.address, DOLLAR, **terms)
    claim = market.claim(PROVIDER, row)
    assert skipped(market.settle(THIEF.address, replace(claim, provider=SYBIL.address))) == [SkipReason.BAD_CLAIM]
    assert skipped(market.collect(SYBIL, row)) == [SkipReason.BAD_SIGNATURE]
    renamed = replace(row.order.message, coordinator=THIEF.address)
    redirected = replace(row, order=Signed(renamed, row.order.signature))
    assert skipped(market.settle(THIEF.address, replace(claim, rows=(redirected,)))) == [SkipReason.BAD_CLAIM]
    assert skipped(market.collect(PROVIDER, redirected)) == [SkipReason.BAD_SIGNATURE]


def test_an_inflated_claim(market: Market) -> None:
    """A provider's signature for one receipt is valid neither for a larger amount nor for another receipt."""
    claim = market.claim(PROVIDER, market.row(KEY, PROVIDER.address, 5 * DOLLAR, DOLLAR))
    for change in ({"cumulative_cost": Amount(2 * DOLLAR)}, {"seq": 2}):
        inflated = replace(claim, rows=(replace(claim.rows[0], **change),))
        assert skipped(market.settle(COORDINATOR.address, inflated)) == [SkipReason.BAD_CLAIM]
    assert paid(market.settle(COORDINATOR.address, claim)) == [DOLLAR]


def test_a_provider_cannot_collect_above_its_receipts_and_leave_no_evidence(market: Market) -> None:
    """Without its signature a provider's transaction pays nothing; with it, the transaction is the evidence that costs the
    stake.
    """
    market.stake(PROVIDER.address, 10 * DOLLAR)
    receipt = market.receipt(PROVIDER, KEY.address, 1, 1)
    row = market.row(KEY, PROVIDER.address, 5 * DOLLAR)
    assert skipped(market.settle(PROVIDER.address, ClaimBatch(PROVIDER.address, (row,)))) == [SkipReason.BAD_CLAIM]
    claim = market.claim(PROVIDER, market.row(KEY, PROVIDER.address, DOLLAR), row)
    calldata = market.escrow_abi.call("settle", [claim.encode()])
    assert market.chain.send(PROVIDER.address, market.escrow, calldata).events(market.escrow)
    (calldata_claim,) = find_claims(calldata, PROVIDER.address, KEY.address, market.domain)
    evidence = (calldata_claim.claim.message, 1, calldata_claim.claim.signature, receipt.message, receipt.signature)
    market.call(THIEF.address, "slashOverclaim", *evidence)
    assert market.ask("stakeOf", PROVIDER.address)[0] == 0
    assert market.credit(THIEF.address) == 2 * DOLLAR


# ------------------------------------------------------------------------------------------------- replays and signatures


def test_order_replay_on_a_fork(market: Market) -> None:
    """After a fork with a new chain id, earlier signatures are void on the fork, and new ones for it are valid."""
    order = market.order(KEY, PROVIDER.address, DOLLAR, reserve_target=Amount(DOLLAR))
    row = market.row(KEY, PROVIDER.address, DOLLAR)
    bind = Bind(key=SYBIL.address, owner=OWNER.address)
    consent = Release(payer=KEY.address, provider=PROVIDER.address, floor=Amount(0), deadline=FAR)
    claim = market.claim(PROVIDER, row)
    pair = [market.receipt(PROVIDER, KEY.address, 1, total) for total in (1, 2)]
    market.stake(PROVIDER.address, DOLLAR)
    market.call(OWNER.address, "reserve", KEY.address, PROVIDER.address, DOLLAR)
    market.chain.fork(1)
    fork_batch = ClaimBatch.sign(PROVIDER, [row], Domain(chain_id=1, contract=market.escrow))
    assert skipped(market.settle(PROVIDER.address, *fork_batch)) == [SkipReason.BAD_SIGNATURE]
    assert skipped(market.settle(THIEF.address, claim)) == [SkipReason.BAD_CLAIM]
    for function, *arguments in (
        ("secure", order.message, order.signature),
        ("open", SYBIL.address, OWNER.address, SYBIL.sign_digest(bind.digest(market.domain))),
        ("giveBackSigned", consent, PROVIDER.sign_digest(consent.digest(market.domain))),
        ("slashEquivocation", *(part for r in pair for part in (r.message, r.signature))),
    ):
        with refused("BadSignature"):
            market.call(THIEF.address, str(function), *arguments)
    market.domain = Domain(chain_id=1, contract=market.escrow)
    assert paid(market.settle(THIEF.address, market.claim(PROVIDER, market.row(KEY, PROVIDER.address, DOLLAR)))) == [DOLLAR]


def test_order_replay_on_another_contract(market: Market) -> None:
    """An order pays only at the contract for which it was signed, and at no identical contract on the same chain."""
    other_escrow = Market(market.chain)
    other_escrow.purse(KEY, OWNER.address, 10 * DOLLAR)
    row = market.row(KEY, PROVIDER.address, DOLLAR)
    assert skipped(other_escrow.collect(PROVIDER, row)) == [SkipReason.BAD_SIGNATURE]
    assert skipped(other_escrow.settle(THIEF.address, market.claim(PROVIDER, row))) == [SkipReason.BAD_CLAIM]
    assert paid(market.collect(PROVIDER, row)) == [DOLLAR]


def test_malleable_signature(market: Market) -> None:
    """The high-s form of a signature, which recovers the same key, is refused everywhere."""
    order = market.order(KEY, PROVIDER.address, DOLLAR, reserve_target=Amount(DOLLAR))
    with refused("BadSignature", signer=KEY.address):
        market.call(THIEF.address, "secure", order.message, _mirror(order.signature))
    claim = market.claim(PROVIDER, market.row(KEY, PROVIDER.address, DOLLAR))
    assert skipped(market.settle(THIEF.address, replace(claim, signature=_mirror(claim.signature)))) == [SkipReason.BAD_CLAIM]
    *words, r, _ = claim.rows[0].encode()
    mirrored = _mirror(claim.rows[0].order.signature)
    for parity in (0, 1 << 255):
        vs = (int.from_bytes(mirrored[32:64], "big") | parity).to_bytes(32, "big")
        events = market.call(PROVIDER.address, "settle", [(PROVIDER.address, [(*words, r, vs)], claim.signature)])
        assert skipped(events) == [SkipReason.BAD_SIGNATURE]


def _mirror(signature: bytes) -> bytes:
    s = N - int.from_bytes(signature[32:64], "big")
    return signature[:32] + s.to_bytes(32, "big") + bytes((55 - signature[64],))


def test_unsigned_bits(market: Market) -> None:
    """The unused bits of a row have no meaning: with them set, the row is the same."""
    claim = market.claim(PROVIDER, market.row(KEY, PROVIDER.address, DOLLAR))
    words = list(claim.rows[0].encode())
    words[3] |= ((1 << 144) - 1) << 112
    assert paid(market.call(THIEF.address, "settle", [(PROVIDER.address, [tuple(words)], claim.signature)])) == [DOLLAR]


def test_permit_front_run(market: Market) -> None:
    """If somebody else sends the owner's permit first, the allowance is set, and the deposit succeeds."""
    market.coin(OWNER.address, "mint", OWNER.address, DOLLAR)
    market.coin(OWNER.address, "approve", market.escrow, 0)
    coin = Domain(chain_id=market.domain.chain_id, contract=market.token, name="Test USD", version="1")
    text = Permit(owner=OWNER.address, spender=market.escrow, value=DOLLAR, nonce=0, deadline=FAR)
    rest = split_signature(OWNER.sign_digest(text.digest(coin)))
    market.coin(THIEF.address, "permit", OWNER.address, market.escrow, DOLLAR, FAR, *rest)
    market.call(OWNER.address, "depositWithPermit", KEY.address, DOLLAR, FAR, *rest)
    assert market.free(KEY.address) == 11 * DOLLAR


def test_purse_squatting(market: Market) -> None:
    """Nobody opens a purse for another's key, and a key's signature for one owner opens the purse for no other."""
    bind = SYBIL.sign(Bind(key=SYBIL.address, owner=OWNER.address), market.domain)
    for owner, signature in ((THIEF.address, bind.signature), (THIEF.address, b""), (OWNER.address, bytes(65))):
        with refused("BadSignature", signer=SYBIL.address):
            market.call(THIEF.address, "open", SYBIL.address, owner, signature)
    market.call(THIEF.address, "open", SYBIL.address, OWNER.address, bind.signature)
    with refused("NotOwner", key=SYBIL.address, caller=THIEF.address):
        market.call(THIEF.address, "thaw", SYBIL.address, 1)


# -------------------------------------------------------------------------------------------------------- by the token


@pytest.fixture
def hostile() -> Market:
    """A market whose token obeys the attacker, with a payer of ten units."""
    made = Market(token=load("HostileToken"))
    made.purse(KEY, OWNER.address, 10 * DOLLAR)
    return made


def _sums(market: Market) -> int:
    """The held tokens minus everything that the escrow owes in these tests."""
    people = (PROVIDER.address, SYBIL.address, market.token)
    stakes = sum(sum(market.ask("stakeOf", account)[:2]) for account in people)
    credit = sum(market.credit(account) for account in people)
    pledged = sum(market.tab(key.address, p)[1] for key in (KEY, SYBIL) for p in people)
    return market.balance(market.escrow) - stakes - credit - pledged - market.free(KEY.address) - market.free(SYBIL.address)


def test_fee_on_transfer(hostile: Market) -> None:
    """A fee-taking token is refused on deposit; on payout only the receiver bears its fee."""
    hostile.fund(OWNER.address, DOLLAR)
    hostile.coin(THIEF.address, "setFee", 1)
    for function, arguments in (("deposit", (KEY.address, DOLLAR)), ("stake", (DOLLAR,))):
        with refused("ShortDelivery", expected=DOLLAR, received=DOLLAR - 1):
            hostile.call(OWNER.address, function, *arguments)
    hostile.collect(PROVIDER, hostile.row(KEY, PROVIDER.address, DOLLAR))
    hostile.call(THIEF.address, "cashOut", PROVIDER.address)
    assert hostile.balance(PROVIDER.address) == DOLLAR - 1
    assert _sums(hostile) == 0


def test_reverting_token(hostile: Market) -> None:
    """While the token refuses every transfer, settling works; afterwards all the money is still there."""
    hostile.coin(THIEF.address, "setBlocked", hostile.escrow, True)
    assert paid(hostile.collect(PROVIDER, hostile.row(KEY, PROVIDER.address, DOLLAR))) == [DOLLAR]
    hostile.call(OWNER.address, "thaw", KEY.address, 9 * DOLLAR)
    hostile.chain.now += RULES.thaw
    for sender, function, argument in ((THIEF, "cashOut", PROVIDER.address), (OWNER, "withdraw", KEY.address)):
        with pytest.raises(Refusal):
            hostile.call(sender.address, function, argument)
    hostile.coin(THIEF.address, "setBlocked", hostile.escrow, False)
    hostile.call(THIEF.address, "cashOut", PROVIDER.address)
    hostile.call(OWNER.address, "withdraw", KEY.address)
    assert (hostile.balance(PROVIDER.address), hostile.balance(OWNER.address)) == (DOLLAR, 9 * DOLLAR)


def test_lying_token(hostile: Market) -> None:
    """A token that returns false moves and credits nothing; one that returns nothing is judged by its balances."""
    hostile.fund(OWNER.address, DOLLAR)
    hostile.collect(PROVIDER, hostile.row(KEY, PROVIDER.address, DOLLAR))
    for answer in (1, 2):
        hostile.coin(THIEF.address, "setAnswer", answer)
        for sender, function, arguments in (
            (OWNER, "deposit", (KEY.address, DOLLAR)),
            (THIEF, "cashOut", (PROVIDER.address,)),
        ):
            if answer == 1:
                with refused("SafeERC20FailedOperation", token=hostile.token):
                    hostile.call(sender.address, function, *arguments)
            else:
                hostile.call(sender.address, function, *arguments)
            assert _sums(hostile) == 0
    assert (hostile.free(KEY.address), hostile.balance(PROVIDER.address)) == (10 * DOLLAR, DOLLAR)


def test_a_blacklisted_party_blocks_only_itself(hostile: Market) -> None:
    """An owner, a provider and a coordinator whom the token refuses each lose only their own payout."""
    other = person("other key")
    hostile.purse(other, SYBIL.address, DOLLAR)
    for banned in (OWNER, PROVIDER, COORDINATOR):
        hostile.coin(THIEF.address, "setBlocked", banned.address, True)
    hostile.call(COORDINATOR.address, "setFee", 1_000)
    terms: dict[str, Any] = {"coordinator": COORDINATOR.address, "max_fee_bps": 1_000}
    claims = [hostile.claim(p, hostile.row(KEY, p.address, DOLLAR, **terms)) for p in (PROVIDER, SYBIL)]
    assert paid(hostile.settle(THIEF.address, *claims)) == [DOLLAR, DOLLAR]
    for party in (PROVIDER, COORDINATOR):
        with pytest.raises(Refusal):
            hostile.call(THIEF.address, "cashOut", party.address)
    hostile.call(THIEF.address, "cashOut", SYBIL.address)
    hostile.call(SYBIL.address, "thaw", other.address, DOLLAR)
    hostile.chain.now += RULES.thaw
    hostile.call(SYBIL.address, "withdraw", other.address)
    assert hostile.balance(SYBIL.address) == DOLLAR + DOLLAR * 9 // 10
    hostile.call(PROVIDER.address, "setPayout", REPORTER.address)
    hostile.call(THIEF.address, "cashOut", PROVIDER.address)
    assert hostile.balance(REPORTER.address) == DOLLAR * 9 // 10


def test_dust_sent_to_the_escrow(hostile: Market) -> None:
    """Tokens that arrive without a call are credited to nobody and block no deposit."""
    hostile.fund(THIEF.address, 5)
    hostile.coin(THIEF.address, "transfer", hostile.escrow, 5)
    hostile.fund(OWNER.address, DOLLAR)
    hostile.call(OWNER.address, "deposit", KEY.address, DOLLAR)
    assert (hostile.free(KEY.address), _sums(hostile)) == (11 * DOLLAR, 5)


CALLS = ["deposit", "stake", "withdraw", "withdrawStake", "cashOut"]


def _call(market: Market, function: str) -> bytes:
    """One of the calls that move tokens, made by the token for itself."""
    arguments: dict[str, tuple[object, ...]] = {
        "deposit": (SYBIL.address, 3),
        "stake": (4,),
        "withdraw": (SYBIL.address,),
        "withdrawStake": (),
        "cashOut": (market.token,),
    }
    return market.escrow_abi.call(function, *arguments[function])


@pytest.mark.parametrize("patient", [True, False], ids=["patient", "impatient"])
@pytest.mark.parametrize("inner", [*CALLS, "settle"])
@pytest.mark.parametrize("outer", CALLS)
def test_reentrant_token(hostile: Market, outer: str, inner: str, patient: bool) -> None:
    """A token that is owner, coordinator and payee, and re-enters during its own transfers, gets nothing twice."""
    token = hostile.token

    def act(data: bytes) -> None:
        hostile.coin(THIEF.address, "act", hostile.escrow, data)

    hostile.coin(THIEF.address, "mint", token, 100)
    hostile.coin(THIEF.address, "act", token, hostile.token_abi.call("approve", hostile.escrow, U96))
    hostile.call(SYBIL.address, "open", SYBIL.address, token, b"")
    for data in (_call(hostile, "deposit"), _call(hostile, "stake")):
        act(data)
    act(hostile.escrow_abi.call("thaw", SYBIL.address, 2))
    act(hostile.escrow_abi.call("unstake", 4))
    act(hostile.escrow_abi.call("setFee", 10_000))
    fee: dict[str, Any] = {
        "coordinator": token,
        "max_fee_bps": 10_000,
    }  # it signs no claim, but may be paid
    act(hostile.escrow_abi.call("settle", [hostile.claim(PROVIDER, hostile.row(KEY, PROVIDER.address, 6, **fee)).encode()]))
    hostile.chain.now += RULES.unstake
    before, mark = (hostile.balance(token), hostile.free(SYBIL.address)), hostile.chain.snapshot()

    act(_call(hostile, outer))
    alone = (hostile.balance(token), hostile.free(SYBIL.address), hostile.credit(token), hostile.ask("stakeOf", token))
    hostile.chain.restore(mark)
    claim = hostile.claim(PROVIDER, hostile.row(KEY, PROVIDER.address, 7, **fee))
    more = hostile.escrow_abi.call("settle", [claim.encode()])
    hostile.coin(THIEF.address, "setCallback", hostile.escrow, more if inner == "settle" else _call(hostile, inner), patient)
    if inner != "settle" and not patient:
        with refused("ReentrancyGuardReentrantCall"):
            act(_call(hostile, outer))
        assert (hostile.balance(token), hostile.free(SYBIL.address)) == before
    else:
        act(_call(hostile, outer))
        credit = hostile.credit(token) - (1 if inner == "settle" else 0)
        now = (hostile.balance(token), hostile.free(SYBIL.address), credit, hostile.ask("stakeOf", token))
        assert now == alone
    assert _sums(hostile) == 0


def test_a_token_that_takes_back(hostile: Market) -> None:
    """A transfer that makes the escrow poorer is refused by name and undone."""
    hostile.fund(OWNER.address, DOLLAR)
    theft = hostile.token_abi.call("burn", hostile.escrow, 2 * DOLLAR)
    hostile.coin(THIEF.address, "setCallback", hostile.token, theft, False)
    with refused("ShortDelivery", expected=DOLLAR, received=0):
        hostile.call(OWNER.address, "deposit", KEY.address, DOLLAR)
    assert _sums(hostile) == 0
