"""Notices the phases of a job: which message of a link, of the chain's RPC or which row of a database marks each of them.

One phase at a time is armed. The first message that marks it is held back, and the fault strikes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from scripts.faults.proxy import Hold, MakeReader, Reader
from scripts.faults.schedule import Phase
from tallystick.protocol.errors import BadMessage
from tallystick.protocol.job_link import read_records
from tallystick.protocol.sealing import is_last
from tallystick.protocol.wire import LINK_HEAD, Kind

_NODE_PHASES: dict[tuple[bool, int], Phase] = {
    (False, Kind.DISPATCH): Phase.AFTER_DISPATCH,
    (True, Kind.CHUNK): Phase.FIRST_CHUNK,
    (True, Kind.RECEIPT): Phase.RECEIPT_SENT,
    (False, Kind.RECEIPT_ACK): Phase.RECEIPT_STORED,
    (True, Kind.CLAIM): Phase.CLAIM_HANDED_IN,
}
"""By direction (whether to the coordinator) and kind of a message on a node's link."""
_HELLO = bytes((Kind.HELLO,))
_BATCH_SENT, _BATCH_MINED = b"eth_sendRawTransaction", b'"cumulativeGasUsed"'
"""What a request that sends a transaction contains, and a response with the receipt of one that was mined."""


@dataclass(frozen=True, slots=True)
class Seen:
    """Where a phase was seen: the node and the coordinator's process at the two ends of the link; empty if neither is."""

    node: str = ""
    coordinator: str = ""


Strike = Callable[[Seen, Awaitable[None] | None], Awaitable[None]]
"""Applies the armed fault. Gets where the phase was seen, and what passes the message on."""


class Watch:
    """The armed phase, and what strikes then."""

    def __init__(self) -> None:
        self._phase: Phase | None = None
        self._strike: Strike | None = None
        self._chunked: set[bytes] = set()
        """Jobs that have had a chunk."""
        self.struck = asyncio.Event()

    def arm(self, phase: Phase, strike: Strike) -> None:
        """Waits for a phase from now on."""
        self._phase, self._strike = phase, strike
        self._chunked.clear()
        self.struck.clear()

    def disarm(self) -> None:
        """Waits for nothing."""
        self._phase = self._strike = None

    @property
    def armed(self) -> Phase | None:
        """The phase that is waited for."""
        return self._phase

    def links(self, coordinator: str, nodes: Mapping[str, str]) -> MakeReader:
        """Readers of the links of clients and nodes to a coordinator's process. `nodes`: their names by address."""

        def make() -> Reader:
            node = ""

            def read(to_server: bool, message: bytes) -> Hold | None:
                nonlocal node
                if to_server and message[:1] == _HELLO:  # a client's first byte is of its stream's number, which is small
                    text = message.lower()
                    node = next((name for address, name in nodes.items() if address.lower().encode() in text), "")
                if self._phase is None or not message:
                    return None
                phase = self._node_phase(to_server, message) if node else self._client_phase(to_server, message)
                return None if phase is None else self.reached(phase, Seen(node, coordinator))

            return read

        return make

    def _client_phase(self, to_server: bool, message: bytes) -> Phase | None:
        if self._phase is not Phase.BEFORE_MATCH or not to_server:
            return None
        try:
            kinds = {kind for _, kind, _ in read_records(message)}
        except BadMessage:  # plain HTTP
            return None
        return Phase.BEFORE_MATCH if Kind.SUBMIT in kinds else None

    def _node_phase(self, to_server: bool, message: bytes) -> Phase | None:
        phase = _NODE_PHASES.get((to_server, message[0]))
        if phase is Phase.FIRST_CHUNK and self._phase is Phase.LAST_CHUNK:
            return Phase.LAST_CHUNK if is_last(message[LINK_HEAD:]) else None
        if phase is Phase.FIRST_CHUNK:
            job = message[1:17]
            if job in self._chunked:
                return None
            self._chunked.add(job)
        return phase

    def rpc(self) -> Reader:
        """The reader of a connection to the chain's RPC."""

        def read(to_server: bool, message: bytes) -> Hold | None:
            if to_server and _BATCH_SENT in message:
                return self.reached(Phase.BATCH_SENT, Seen())
            if not to_server and _BATCH_MINED in message:
                return self.reached(Phase.BATCH_MINED, Seen())
            return None

        return read

    def reached(self, phase: Phase, seen: Seen) -> Hold | None:
        """What to run instead of passing the message on; None if this phase is not waited for."""
        if phase is not self._phase or self._strike is None:
            return None
        strike = self._strike
        self.disarm()

        async def hold(pass_on: Awaitable[None]) -> None:
            await strike(seen, pass_on)
            self.struck.set()

        return hold
