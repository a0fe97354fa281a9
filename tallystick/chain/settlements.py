"""Looking a payment up: the transactions that settled a tab, and the signatures in them.

An endpoint can claim any balance, but no signature. Where a chain says that a provider was paid more than a payer knows of, the
payer asks here for the order of its own key that allowed the payment; where a provider collected more than its receipts say, for
the claim that it signed.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass

from tallystick.chain.calldata import MAX_CALLDATA, CalldataClaim, find_claims, find_orders
from tallystick.chain.codec import load_abi
from tallystick.chain.endpoint import RpcError
from tallystick.chain.escrow import Escrow
from tallystick.chain.events import RowSkipped, Settled, read_logs
from tallystick.chain.hex_encoding import InvalidParams, parse_data
from tallystick.protocol.eip712 import Verified
from tallystick.protocol.errors import Code, TallyError, Unavailable
from tallystick.protocol.messages import Order
from tallystick.protocol.types import Address, Amount

MAX_TRANSACTIONS = 16
"""Transactions whose calldata one search reads, the newest."""
MAX_REQUESTS = 64
"""Ranges of blocks that one search asks for; each is twice as long as the one before, as long as the endpoint gives so much."""
FIRST_SPAN = 2_000


@dataclass(frozen=True, slots=True)
class SettlingOrder:
    """An order of the payer's key, from a transaction that settled its tab. `cumulative_cost` and `seq` are what the provider
    collected on it: the provider's word. `order.message.ceiling` is the payer's.
    """

    order: Verified[Order]
    seq: int
    cumulative_cost: Amount
    transaction: str
    block: int


@dataclass(frozen=True, slots=True)
class SettlingClaim:
    """A claim of the provider that has a row of the payer, from a transaction that carried it, whether or not it paid."""

    calldata_claim: CalldataClaim
    transaction: str
    block: int


@dataclass(frozen=True, slots=True)
class _Touch:
    transaction: str
    block: int


async def settling_orders(
    escrow: Escrow, payer: Address, provider: Address, *, enough: Amount | None = None, most: int = MAX_TRANSACTIONS
) -> list[SettlingOrder]:
    """The orders on which a provider was paid by this payer, each verified with the payer's key; newest transaction first.

    The last payment's order allows all that was settled: with `enough` (base units) the search ends at the first order whose
    ceiling is not below it. At most `most` transactions are read. An empty list: the endpoint shows no order, so nothing that it
    says of the tab is proved. Raises Unavailable.
    """
    found: list[SettlingOrder] = []
    async for touch in _touching(escrow, payer, provider, most=most, paid_only=True):
        for call in await _calls(escrow, touch.transaction):
            for one in find_orders(call, payer, provider, escrow.deployment.domain):
                row = one.row
                found.append(SettlingOrder(one.order, row.seq, row.cumulative_cost, touch.transaction, touch.block))
        if enough is not None and any(one.order.message.ceiling >= enough for one in found):
            break
    return found


async def settling_claims(
    escrow: Escrow, payer: Address, provider: Address, *, most: int = MAX_TRANSACTIONS
) -> list[SettlingClaim]:
    """The claims that a provider signed with a row of this payer, out of the newest `most` transactions. Raises Unavailable."""
    found: list[SettlingClaim] = []
    async for touch in _touching(escrow, payer, provider, most=most, paid_only=False):
        found += await claims_in(escrow, touch.transaction, payer, provider, block=touch.block)
    return found


async def claims_in(
    escrow: Escrow, transaction: str, payer: Address, provider: Address, *, block: int = 0
) -> list[SettlingClaim]:
    """The claims that a provider signed with a row of this payer, out of one transaction. Raises Unavailable."""
    calls = await _calls(escrow, transaction)
    found = [one for call in calls for one in find_claims(call, provider, payer, escrow.deployment.domain)]
    return [SettlingClaim(one, transaction, block) for one in found]


async def _touching(escrow: Escrow, payer: Address, provider: Address, *, most: int, paid_only: bool) -> AsyncIterator[_Touch]:
    """The transactions with a row of this tab, the newest first, within MAX_REQUESTS. Raises Unavailable."""
    (event,) = (key for key, entry in load_abi("Escrow").events.items() if entry.name == "RowsSettled")
    topics = ["0x" + event.hex(), "0x" + provider[2:].rjust(64, "0")]
    last, span, seen = await escrow.rpc.block_number(), FIRST_SPAN, set[str]()
    first = escrow.deployment.block
    for _ in range(MAX_REQUESTS):
        if last < first:
            return
        since = max(first, last - span + 1)
        wanted = {"address": escrow.deployment.escrow, "topics": topics, "fromBlock": hex(since), "toBlock": hex(last)}
        try:
            logs = await escrow.rpc.request("eth_getLogs", wanted)
        except RpcError:  # more facts, or more blocks, than the node gives at once
            if span == 1:
                raise
            span //= 2
            continue
        rows = [one for one in read_logs(logs, escrow.deployment.escrow) if isinstance(one, Settled | RowSkipped)]
        for row in sorted(rows, key=lambda one: one.at, reverse=True):
            if (row.payer, row.provider) != (payer, provider) or (paid_only and isinstance(row, RowSkipped)):
                continue
            if row.at.transaction in seen:
                continue
            if len(seen) == most:
                return
            seen.add(row.at.transaction)
            yield _Touch(row.at.transaction, row.at.block)
        last, span = since - 1, span * 2


async def _calls(escrow: Escrow, transaction: str) -> list[bytes]:
    """The calldata of a transaction, and of the calls of the escrow in it where the endpoint can trace: a contract may have made
    them from nothing that the transaction's own calldata shows. Raises Unavailable.
    """
    raw = await escrow.rpc.request("eth_getTransactionByHash", transaction)
    if raw is None:
        return []
    calls = [_bytes(raw.get("input") if isinstance(raw, dict) else None, escrow)]
    if str(raw.get("to")).lower() == escrow.deployment.escrow:
        return calls
    try:
        trace = await escrow.rpc.request("debug_traceTransaction", transaction, {"tracer": "callTracer"})
    except TallyError:  # few endpoints trace
        return calls
    return calls + [_bytes(call, escrow) for call in _inner(trace, escrow.deployment.escrow)]


def _inner(trace: object, escrow: Address) -> list[object]:
    """The calldata of each call of the escrow in a callTracer's answer, however deep."""
    found, waiting = list[object](), [trace]
    while waiting:
        call = waiting.pop()
        if isinstance(call, dict):
            found += [call.get("input")] if str(call.get("to")).lower() == escrow else []
            waiting += inner if isinstance(inner := call.get("calls"), list) else []
    return found


def _bytes(raw: object, escrow: Escrow) -> bytes:
    try:
        return parse_data(raw)[:MAX_CALLDATA]
    except InvalidParams as error:
        raise Unavailable(
            Code.CHAIN_UNAVAILABLE, f"the chain at {escrow.rpc.url} answered with calldata that is none: {error}"
        ) from None
