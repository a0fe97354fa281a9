"""Reading the events of the escrow in order, from a cursor, at an endpoint that may cap ranges and batches.

One node must answer for the logs of a block and for the block's existence: a node that lags returns no logs, which would be read
as a block without events. So both are read in one batch. Where the endpoint does not take that batch, blocks near the head are
read one by one with the block's hash (EIP-234), which a node without the block refuses, and older blocks by their numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tallystick.chain.deployment import Deployment
from tallystick.chain.endpoint import BatchSplit, Block, Rpc
from tallystick.chain.events import Event, read_logs, settlement_topics
from tallystick.chain.rpc_errors import RpcError, refuses_range
from tallystick.protocol.errors import Code, Fault, PeerError, TallyError, Unavailable
from tallystick.protocol.types import Address

NEAR_HEAD = 64
"""Blocks below the head that some node behind an endpoint may not have yet."""
MAX_BLOCKS_BY_HASH = 16
"""Blocks of one page that are read one by one."""


@dataclass(frozen=True, slots=True)
class EventPage:
    """Events in order, and the cursor to store with them.

    `cursor` is the first block that was not read. `tip` is the hash of the block before it, by which the next read detects a
    reorganisation.
    """

    events: tuple[Event, ...]
    cursor: int
    tip: str = ""


class DeepReorg(PeerError):
    """The chain dropped blocks that had their confirmations: events read from them may no longer exist."""

    code = Code.CHAIN_REFUSED
    fault = Fault.NOBODY

    def __init__(self, block: int, known: str, current: str) -> None:
        super().__init__(
            f"the chain dropped block {block}, which counted as final: its hash was {known} and is {current}. Read all events "
            "again from the deployment's first block, and wait for more confirmations"
        )
        self.block = block


async def read_events(
    rpc: Rpc,
    deployment: Deployment,
    cursor: int,
    *,
    after: str = "",
    confirmations: int = 0,
    span: int = 2_000,
    settled_by: Address | None = None,
) -> EventPage:
    """Reads the events from block `cursor` on that have `confirmations` blocks on top, over at most `span` blocks.

    `after` is the tip that was stored with the cursor. With `settled_by`, only the settlements of this provider are read. Two
    reads from one cursor return the same events: a caller that stores events, cursor and tip in one transaction loses and
    doubles none. If the chain changes during a read, the page is empty.
    Raises DeepReorg, Unavailable.
    """
    head, previous = await _ask(rpc, ("eth_blockNumber",), _header(max(cursor - 1, 0)))
    _compare(rpc.read_block(previous), after)
    final = rpc.read_number("eth_blockNumber", head) - confirmations
    wanted: dict[str, Any] = {"address": deployment.escrow}
    if settled_by is not None:
        wanted["topics"] = settlement_topics(settled_by)
    while True:
        last = min(final, cursor + min(span, rpc.log_span.limit) - 1)
        if last < cursor:
            return EventPage((), cursor, after)
        try:
            page = await _PageReader(rpc, wanted, cursor, after).read(last, final + confirmations)
        except RpcError as error:
            if last == cursor or not refuses_range(error):
                raise
            rpc.log_span.refuse(cursor, last, error.reason)
            continue
        rpc.log_span.accept(page.cursor - cursor)
        return page


@dataclass(frozen=True, slots=True)
class _PageReader:
    """Reads one page from `cursor` on. `wanted` is the filter without a range; `after` is the hash of the block before `cursor`,
    if it is known.
    """

    rpc: Rpc
    wanted: dict[str, Any]
    cursor: int
    after: str

    async def read(self, last: int, head: int) -> EventPage:
        """Reads up to block `last`, or less if the endpoint takes no batches. `head` is the chain's last block."""
        try:
            return await self._range(last, together=True)
        except BatchSplit:
            pass
        if self.cursor <= head - NEAR_HEAD:  # every node has these blocks, so several may answer
            return await self._range(min(last, head - NEAR_HEAD), together=False)
        return await self._by_hash(min(last, self.cursor + MAX_BLOCKS_BY_HASH - 1))

    async def _range(self, last: int, *, together: bool) -> EventPage:
        """Reads a range by block numbers. A node that lags has no block `last`."""
        query = self.wanted | {"fromBlock": hex(self.cursor), "toBlock": hex(last)}
        calls = (_header(max(self.cursor - 1, 0)), _header(last), ("eth_getLogs", query), _header(last))
        previous, before, logs, behind = await _ask(self.rpc, *calls, together=together)
        _compare(self.rpc.read_block(previous), self.after)
        tip = self.rpc.read_block(before)
        if tip is None or tip != self.rpc.read_block(behind):
            return EventPage((), self.cursor, self.after)
        return EventPage(_sorted(logs, self.wanted["address"]), last + 1, tip.hash)

    async def _by_hash(self, last: int) -> EventPage:
        """Reads blocks one by one, each by its hash, as long as each is the child of the one before."""
        events, tip = list[Event](), self.after
        for number in range(self.cursor, last + 1):
            (raw,) = await _ask(self.rpc, _header(number))
            block = self.rpc.read_block(raw)
            if block is None or (tip and raw.get("parentHash") != tip):
                return EventPage(tuple(events), number, tip)
            (logs,) = await _ask(self.rpc, ("eth_getLogs", self.wanted | {"blockHash": block.hash}))
            events += _sorted(logs, self.wanted["address"])
            tip = block.hash
        return EventPage(tuple(events), last + 1, tip)


def _sorted(logs: Any, escrow: Address) -> tuple[Event, ...]:
    if not isinstance(logs, list):
        raise Unavailable(Code.CHAIN_UNAVAILABLE, f"eth_getLogs: expected a list of logs, got {str(logs)[:80]!r}")
    return tuple(sorted(read_logs(logs, escrow), key=lambda event: event.at))


def _header(number: int) -> tuple[str, str, bool]:
    return "eth_getBlockByNumber", hex(number), False


async def _ask(rpc: Rpc, *calls: tuple[Any, ...], together: bool = False) -> list[Any]:
    results = await rpc.batch(*calls, together=together)
    for result in results:
        if isinstance(result, TallyError):
            raise result
    return results


def _compare(previous: Block | None, known: str) -> None:
    """Raises DeepReorg if the last block that was read has another hash now. `previous` is None if the node lags."""
    if known and previous is not None and previous.hash != known:
        raise DeepReorg(previous.number, known, previous.hash)
