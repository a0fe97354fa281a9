"""The gas of every call of the escrow: whole transactions on the real bytecode, in the steady state of a running market.
`scripts/bench gas` prints it; contracts/gas.json has the figures announced last.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from eth.vm import opcode_values
from eth.vm.forks.prague.computation import PragueComputation

from tallystick.chain.claims import ClaimBatch
from tallystick.chain.rpc import MAX_TRANSACTION_GAS
from tallystick.chain.token import Permit, ReceiveWithAuthorization, split_signature
from tallystick.protocol.codecs import keccak
from tallystick.protocol.eip712 import Domain, Message, Signer
from tallystick.protocol.messages import Bind, Claim, ClaimRow, Release
from tallystick.protocol.types import ZERO_HASH, Amount, Hash
from tests.contracts.evm_harness import START, Executed
from tests.contracts.market_harness import DOLLAR, RULES, Market, person

QUOTED = {"x402_row_1": 48_333, "x402_row_10": 23_824, "x402_row_100": 21_413, "x402_deposit_per_pair": 82_000}
"""x402 batch channels, as PERFORMANCE.md quotes them; deposits there cost up to 99,000 a pair."""
TARGETS = {"settle_row_1": 57_700, "settle_row_100": 20_400, "settle_row_100_with_fee": 20_900, "settle_row_dense": 13_000}

OWNER, RELAY, COORDINATOR, REPORTER = (person(n) for n in ("owner", "relay", "coordinator", "reporter"))
_DAY = 86_400


class Bench(Market):
    """A market with realistic messages: amounts of some cents, present times, and commitments without zero bytes."""

    def __init__(self, payers: int, providers: int, *, fee: bool = False) -> None:
        super().__init__()
        self.payers = [person(f"payer {n}") for n in range(payers)]
        self.providers = [person(f"provider {n}") for n in range(providers)]
        self.fee, self.total = fee, 0
        self.fund(OWNER.address, 1_000 * DOLLAR * payers)
        for payer in self.payers:
            self.call(payer.address, "open", payer.address, OWNER.address, b"")
            self.call(OWNER.address, "deposit", payer.address, 1_000 * DOLLAR)
        self.call(COORDINATOR.address, "setFee", 100)

    def claims(self) -> list[ClaimBatch]:
        """The next row of every payer with every provider: another 0.12 dollars, and the reservation filled up again."""
        self.total += 123_457
        return [self.claim(provider, *(self.next_row(payer, provider) for payer in self.payers)) for provider in self.providers]

    def next_row(self, payer: Signer, provider: Signer) -> Any:
        """A row under the order's terms on an existing tab."""
        terms: dict[str, Any] = {
            "reserve_target": Amount(DOLLAR),
            "deadline": START + 600,
            "claim_by": START + 7 * _DAY,
            "terms_hash": Hash(keccak(b"%d" % self.seq)),
        }
        if self.fee:
            terms |= {"coordinator": COORDINATOR.address, "max_fee_bps": 100}
        return self.row(payer, provider.address, self.total + DOLLAR // 2, self.total, **terms)

    def batch(self) -> Executed:
        """Settles everything in one transaction, which costs the same for any sender."""
        return self.send(RELAY.address, "settle", self.claims())


def rows(payers: int, providers: int = 1, *, fee: bool = False) -> int:
    """Gas per row of the third settlement between this many payers and providers."""
    bench = Bench(payers, providers, fee=fee)
    for _ in range(2):
        bench.batch()
    return round(bench.batch().gas / (payers * providers))


def settling() -> dict[str, int]:
    """Settlement gas per row, without and with a coordinator's fee."""
    return {
        "settle_row_1": rows(1),
        "settle_row_1_with_fee": rows(1, fee=True),
        "settle_row_10": rows(10),
        "settle_row_100": rows(100),
        "settle_row_100_with_fee": rows(100, fee=True),
        "settle_row_dense": rows(20, 20),
        "settle_row_dense_with_fee": rows(20, 20, fee=True),
        "erc20_transfer": _transfer(),
    }


def _transfer() -> int:
    bench = Bench(1, 1)
    for account in (OWNER, RELAY):
        bench.fund(account.address, DOLLAR)
    return bench.coin(OWNER.address, "transfer", RELAY.address, 123_457).gas


def largest_batch() -> int:
    """The number of rows of distinct payers under one signed claim that fit a transaction (EIP-7825)."""
    size = 1 + MAX_TRANSACTION_GAS // rows(100)
    bench = Bench(size, 1)
    for _ in range(2):
        claims = bench.claims()[0].rows
        for start in range(0, size, 200):
            bench.collect(bench.providers[0], *claims[start : start + 200])
    mark, payers = bench.chain.snapshot(), bench.payers
    while True:
        gas = bench.batch().gas
        if gas <= MAX_TRANSACTION_GAS:
            return size
        size -= max(1, (gas - MAX_TRANSACTION_GAS) // 22_000)
        bench.payers = payers[:size]
        bench.chain.restore(mark)


# ------------------------------------------------------------------------------------------------------------- every call


def calls() -> dict[str, int]:
    """Gas of every other call, in the order in which a market makes them; "first" marks a storage word's first write."""
    bench = Bench(1, 2)
    gas_by_call: dict[str, int] = {}

    def take(name: str, sender: Signer, function: str, *arguments: object) -> None:
        gas_by_call[name] = bench.send(sender.address, function, *arguments).gas

    _purse_calls(bench, take)
    _tab_calls(bench, take)
    _stake_calls(bench, take)
    return dict(sorted(gas_by_call.items()))


def _purse_calls(bench: Bench, take: Any) -> None:
    key, other = person("key"), person("other key")
    coin = Domain(chain_id=bench.domain.chain_id, contract=bench.token, name="Test USD", version="1")

    def sign(message: Message) -> tuple[int, bytes, bytes]:
        return split_signature(OWNER.sign_digest(message.digest(coin)))

    take("open", key, "open", key.address, OWNER.address, b"")
    bind = Bind(key=other.address, owner=OWNER.address)
    take("open_signed", RELAY, "open", other.address, OWNER.address, other.sign_digest(bind.digest(bench.domain)))
    bench.fund(OWNER.address, 100 * DOLLAR)
    take("deposit", OWNER, "deposit", key.address, 5 * DOLLAR)
    until = START + _DAY
    text = Permit(owner=OWNER.address, spender=bench.escrow, value=5 * DOLLAR, nonce=0, deadline=until)
    take("deposit_with_permit", OWNER, "depositWithPermit", key.address, 5 * DOLLAR, until, *sign(text))
    salt = keccak(b"salt")
    (nonce,) = bench.ask("authorizationNonce", key.address, salt)
    fetch = ReceiveWithAuthorization(
        from_=OWNER.address, to=bench.escrow, value=5 * DOLLAR, valid_after=0, valid_before=until, nonce=nonce
    )
    arguments = (key.address, 5 * DOLLAR, 0, until, salt, *sign(fetch))
    take("deposit_with_authorization", RELAY, "depositWithAuthorization", *arguments)
    take("thaw", OWNER, "thaw", key.address, DOLLAR)
    take("cancel_thaw", OWNER, "cancelThaw", key.address)
    bench.call(OWNER.address, "thaw", key.address, DOLLAR)
    bench.chain.now += RULES.thaw
    take("withdraw", OWNER, "withdraw", key.address)


def _tab_calls(bench: Bench, take: Any) -> None:
    (payer,), (provider, second) = bench.payers, bench.providers
    take("reserve_first", OWNER, "reserve", payer.address, provider.address, DOLLAR)
    take("reserve", OWNER, "reserve", payer.address, provider.address, DOLLAR)
    terms: dict[str, Any] = {"deadline": START + _DAY, "claim_by": START + _DAY, "terms_hash": keccak(b"terms")}
    order = bench.order(payer, second.address, DOLLAR, reserve_target=Amount(DOLLAR), **terms)
    take("secure_first", RELAY, "secure", order.message, order.signature)
    take("settle_opening_a_tab", person("new"), "settle", [_opening(bench, payer)])
    take("release", OWNER, "release", payer.address, provider.address)
    bench.chain.now += RULES.release
    take("finish_release", OWNER, "finishRelease", payer.address, provider.address)
    take("give_back", second, "giveBack", payer.address, DOLLAR // 2)
    consent = Release(payer=payer.address, provider=second.address, floor=Amount(DOLLAR // 4), deadline=START + _DAY)
    take("give_back_signed", RELAY, "giveBackSigned", consent, second.sign_digest(consent.digest(bench.domain)))
    bench.collect(provider, bench.row(payer, provider.address, DOLLAR))
    take("cash_out_first", RELAY, "cashOut", provider.address)
    bench.collect(provider, bench.row(payer, provider.address, 2 * DOLLAR))
    take("cash_out", RELAY, "cashOut", provider.address)
    take("set_payout", provider, "setPayout", RELAY.address)
    take("set_fee", COORDINATOR, "setFee", 250)


def _opening(bench: Bench, payer: Signer) -> ClaimBatch:
    new = person("new")
    return bench.claim(new, bench.row(payer, new.address, 123_457, reserve_target=Amount(DOLLAR)))


def _stake_calls(bench: Bench, take: Any) -> None:
    provider, payer = bench.providers[0], bench.payers[0].address
    bench.fund(provider.address, 100 * DOLLAR)
    take("stake_first", provider, "stake", 50 * DOLLAR)
    take("stake", provider, "stake", 50 * DOLLAR)
    take("unstake", provider, "unstake", 5 * DOLLAR)
    pair = [bench.receipt(provider, payer, 1, total) for total in (DOLLAR, 2 * DOLLAR)]
    take("slash_equivocation", REPORTER, "slashEquivocation", *(part for r in pair for part in (r.message, r.signature)))
    claimed = (ClaimRow(payer=payer, order_hash=ZERO_HASH, seq=1, cumulative_cost=Amount(3 * DOLLAR)),)
    claim = provider.sign(Claim(provider=provider.address, rows=claimed), bench.domain)
    evidence = (claim.message, 0, claim.signature, pair[0].message, pair[0].signature)
    take("slash_overclaim", REPORTER, "slashOverclaim", *evidence)
    bench.chain.now += RULES.unstake
    take("withdraw_stake", provider, "withdrawStake")


# -------------------------------------------------------------------------------------------------------------- the floor


@contextmanager
def _spending() -> Iterator[Counter[str]]:
    """Gas by instruction of the calls in the block."""
    names = {value: name for name, value in vars(opcode_values).items() if isinstance(value, int)}
    spent: Counter[str] = Counter()

    def watched(name: str, run: Any) -> Any:
        def run_and_count(computation: Any) -> Any:
            before = computation._gas_meter.gas_remaining
            try:
                return run(computation)
            finally:
                spent[name] += before - computation._gas_meter.gas_remaining

        return run_and_count

    plain = PragueComputation.opcodes
    PragueComputation.opcodes = {value: watched(names.get(value, ""), run) for value, run in plain.items()}
    try:
        yield spent
    finally:
        PragueComputation.opcodes = plain


def floor() -> dict[str, int]:
    """The gas of a row of the dense batch: each unavoidable item, and the rest."""
    bench = Bench(20, 20)
    for _ in range(2):
        bench.batch()
    with _spending() as spent:
        done = bench.batch()
    kinds = {"SSTORE": "storage written", "STATICCALL": "signatures recovered", "SLOAD": "storage read", "SHA3": "hashes"}
    items = {name: spent[code] / 400 for code, name in kinds.items()}
    items["event"] = sum(gas for name, gas in spent.items() if name.startswith("LOG")) / 400
    items["base and calldata"] = (done.gas - sum(spent.values())) / 400
    items["everything else"] = done.gas / 400 - sum(items.values())
    return {name: round(gas) for name, gas in items.items()}
