"""Search of the transactions that settled a tab, for the signed orders and claims in them.

An endpoint can report any balance, but cannot forge a signature. If the chain reports a higher payment than a payer knows of, the
payer searches for the order of its own key that allowed it. If a provider collected more than its receipts say, the payer
searches for the claim that the provider signed.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass

from tallystick.chain.calldata import MAX_CALLDATA, CalldataClaim, find_claims, find_orders
from tallystick.chain.escrow import Escrow
from tallystick.chain.events import RowSkipped, Settled, read_logs, settlement_topics
from tallystick.chain.hex_encoding import InvalidParams, parse_data
from tallystick.chain.rpc_errors import RpcError, refuses_range
from tallystick.protocol.eip712 import Verified
from tallystick.protocol.errors import Code, TallyError, Unavailable
from tallystick.protocol.messages import Order
from tallystick.protocol.types import Address, Amount

MAX_TRANSACTIONS = 16
"""The newest transactions whose calldata one search reads."""
MAX_REQUESTS = 64
"""Block ranges that one search requests. Each is twice as long as the one before, if the endpoint returns that much."""
FIRST_SPAN = 2_000


@dataclass(frozen=True, slots=True)
class SettlingOrder:
    """An order of the payer's key in a transaction that settled its tab.

    `cumulative_cost` (base units) and `seq` are the provider's statement of its collected total. `order.message.ceiling` is
    signed by the payer.
    """

    order: Verified[Order]
    seq: int
    cumulative_cost: Amount
    transaction: str
    block: int


@dataclass(frozen=True, slots=True)
class SettlingClaim:
    """A claim of the provider with a row of the payer, in a transaction that submitted it, whether or not it was paid."""

    calldata_claim: CalldataClaim
    transaction: str
    block: int


@dataclass(frozen=True, slots=True)
class _TabTransaction:
    transaction: str
    block: int


async def settling_orders(
    escrow: Escrow, payer: Address, provider: Address, *, enough: Amount | None = None, most: int = MAX_TRANSACTIONS
) -> list[SettlingOrder]:
    """The orders on which this payer paid a provider, each with the payer's verified signature; newest transaction first.

    The order of the last payment allows everything that was settled. With `enough` (base units) the search ends at the first
    order with at least that ceiling. At most `most` transactions are read. An empty list means that the endpoint shows no order
    and proves nothing about the tab. Raises Unavailable.
    """
    orders: list[SettlingOrder] = []
    async for settlement in _tab_transactions(escrow, payer, provider, most=most, paid_only=True):
        for call in await _calls(escrow, settlement.transaction):
            for match in find_orders(call, payer, provider, escrow.deployment.domain):
                row = match.row
                orders.append(SettlingOrder(match.order, row.seq, row.cumulative_cost, settlement.transaction, settlement.block))
        if enough is not None and any(order.order.message.ceiling >= enough for order in orders):
            break
    return orders


async def settling_claims(
    escrow: Escrow, payer: Address, provider: Address, *, most: int = MAX_TRANSACTIONS
) -> list[SettlingClaim]:
    """The claims of a provider with a row of this payer, in the newest `most` transactions. Raises Unavailable."""
    claims: list[SettlingClaim] = []
    async for settlement in _tab_transactions(escrow, payer, provider, most=most, paid_only=False):
        claims += await claims_in(escrow, settlement.transaction, payer, provider, block=settlement.block)
    return claims


async def claims_in(
    escrow: Escrow, transaction: str, payer: Address, provider: Address, *, block: int = 0
) -> list[SettlingClaim]:
    """The claims of a provider with a row of this payer, in one transaction. Raises Unavailable."""
    calls = await _calls(escrow, transaction)
    claims = [claim for call in calls for claim in find_claims(call, provider, payer, escrow.deployment.domain)]
    return [SettlingClaim(claim, transaction, block) for claim in claims]


async def _tab_transactions(
    escrow: Escrow, payer: Address, provider: Address, *, most: int, paid_only: bool
) -> AsyncIterator[_TabTransaction]:
    """Yields the transactions with a row of this tab, newest first, within MAX_REQUESTS. Raises Unavailable."""
    topics = settlement_topics(provider)
    last, span, seen = await escrow.rpc.block_number(), FIRST_SPAN, set[str]()
    first = escrow.deployment.block
    for _ in range(MAX_REQUESTS):
        if last < first:
            return
        since = max(first, last - min(span, escrow.rpc.log_span.limit) + 1)
        query = {"address": escrow.deployment.escrow, "topics": topics, "fromBlock": hex(since), "toBlock": hex(last)}
        try:
            logs = await escrow.rpc.request("eth_getLogs", query)
        except RpcError as error:
            if since == last or not refuses_range(error):
                raise
            span = escrow.rpc.log_span.refuse(since, last, error.reason)
            continue
        escrow.rpc.log_span.accept(last - since + 1)
        rows = [event for event in read_logs(logs, escrow.deployment.escrow) if isinstance(event, Settled | RowSkipped)]
        for row in sorted(rows, key=lambda event: event.at, reverse=True):
            if (row.payer, row.provider) != (payer, provider) or (paid_only and isinstance(row, RowSkipped)):
                continue
            if row.at.transaction in seen:
                continue
            if len(seen) == most:
                return
            seen.add(row.at.transaction)
            yield _TabTransaction(row.at.transaction, row.at.block)
        last, span = since - 1, span * 2


async def _calls(escrow: Escrow, transaction: str) -> list[bytes]:
    """The calldata of a transaction and, if the endpoint can trace, of the calls of the escrow in it.

    A contract can make such calls from data that the transaction's own calldata does not contain. Raises Unavailable.
    """
    raw = await escrow.rpc.request("eth_getTransactionByHash", transaction)
    if raw is None:
        return []
    calls = [_bytes(raw.get("input") if isinstance(raw, dict) else None, escrow)]
    if str(raw.get("to")).lower() == escrow.deployment.escrow:
        return calls
    try:
        trace = await escrow.rpc.request("debug_traceTransaction", transaction, {"tracer": "callTracer"})
    except TallyError:  # few endpoints support tracing
        return calls
    return calls + [_bytes(call, escrow) for call in _inner(trace, escrow.deployment.escrow)]


def _inner(trace: object, escrow: Address) -> list[object]:
    """The calldata of each call of the escrow in a callTracer result, at any depth."""
    calldata, stack = list[object](), [trace]
    while stack:
        call = stack.pop()
        if isinstance(call, dict):
            calldata += [call.get("input")] if str(call.get("to")).lower() == escrow else []
            stack += inner if isinstance(inner := call.get("calls"), list) else []
    return calldata


def _bytes(raw: object, escrow: Escrow) -> bytes:
    try:
        return parse_data(raw)[:MAX_CALLDATA]
    except InvalidParams as error:
        raise Unavailable(
            Code.CHAIN_UNAVAILABLE, f"the chain at {escrow.rpc.shown_url} returned malformed calldata: {error}"
        ) from None
