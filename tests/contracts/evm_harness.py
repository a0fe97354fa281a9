"""The real bytecode on bare py-evm in this process, without blocks, ports or signed transactions.

A call takes a millisecond or two, and any state can be saved and restored.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from eth._utils.address import generate_contract_address
from eth.constants import BLANK_ROOT_HASH
from eth.db.atomic import AtomicDB
from eth.vm.execution_context import ExecutionContext
from eth.vm.forks.cancun.transaction_context import CancunTransactionContext
from eth.vm.forks.prague.state import PragueState
from eth.vm.message import Message
from eth_typing import Address as RawAddress

from tallystick.chain.codec import revert_error
from tallystick.chain.events import Event, LogPosition, read_logs
from tallystick.chain.rpc import MAX_TRANSACTION_GAS
from tallystick.protocol.types import Address

START = 1_700_000_000
CHAIN_ID = 31337


@dataclass(frozen=True, slots=True)
class Executed:
    """A successful call. `gas` is the cost of the whole transaction, including calldata and refunds."""

    output: bytes
    gas: int
    logs: tuple[dict[str, Any], ...]

    def events(self, escrow: Address) -> tuple[Event, ...]:
        """The escrow's events, all with the same position, so tests compare events without positions."""
        return tuple(replace(event, at=NOWHERE) for event in read_logs(self.logs, escrow))


NOWHERE = LogPosition(0, 0, "", "")


class MemoryChain:
    """An EVM state in memory, with its own clock."""

    def __init__(self, chain_id: int = CHAIN_ID) -> None:
        self._context = ExecutionContext(
            coinbase=RawAddress(bytes(20)),
            timestamp=START,
            block_number=1,  # type: ignore[arg-type]
            difficulty=0,
            mix_hash=bytes(32),  # type: ignore[arg-type]
            gas_limit=1 << 62,
            prev_hashes=(),
            chain_id=chain_id,
            base_fee_per_gas=0,
            excess_blob_gas=0,
        )
        self.chain_id = chain_id
        self._db = AtomicDB()
        self.state = PragueState(self._db, self._context, BLANK_ROOT_HASH)

    @property
    def now(self) -> int:
        """Unix seconds of every call."""
        return self._context.timestamp

    @now.setter
    def now(self, seconds: int) -> None:
        self._context._timestamp = seconds

    def fork(self, chain_id: int) -> None:
        """Continues the same state under another chain id."""
        self._context._chain_id = chain_id

    def create(self, sender: Address, code: bytes) -> Address:
        """Deploys a contract. Raises the constructor's error."""
        raw = _raw(sender)
        self.state.increment_nonce(raw)
        address = generate_contract_address(raw, self.state.get_nonce(raw) - 1)
        message = Message(gas=1 << 40, to=b"", sender=raw, value=0, data=b"", code=code, create_address=address)  # type: ignore[arg-type]
        self._finish(self.state.computation_class.apply_create_message(self.state, message, self._transaction(raw)))
        return _address(address)

    def send(self, sender: Address, to: Address, data: bytes, *, gas: int = 1 << 40) -> Executed:
        """Executes one transaction. Raises the contract's error, and then nothing has changed."""
        raw, target = _raw(sender), _raw(to)
        self.state.mark_address_warm(raw)
        self.state.mark_address_warm(target)
        message = Message(gas=gas, to=target, sender=raw, value=0, data=data, code=self.state.get_code(target))
        computation = self.state.computation_class.apply_message(self.state, message, self._transaction(raw))
        self._finish(computation)
        logs = tuple(map(_log, computation.get_log_entries()))
        used = gas - computation.get_gas_remaining()
        return Executed(computation.output, _whole_gas(data, used, computation.get_gas_refund()), logs)

    def ask(self, to: Address, data: bytes) -> bytes:
        """Returns the result of a view."""
        return self.send(Address("0x" + "00" * 20), to, data).output

    def etch(self, at: Address, code: bytes) -> None:
        """Puts code at an address."""
        self.state.set_code(_raw(at), code)

    def snapshot(self) -> tuple[bytes, int]:
        """Takes a snapshot of the state."""
        self.state.persist()
        return self.state.state_root, self.now

    def restore(self, snapshot: tuple[bytes, int]) -> None:
        """Restores a snapshot's state and time."""
        root, self.now = snapshot
        self.state = PragueState(self._db, self._context, root)  # type: ignore[arg-type]

    def _transaction(self, sender: RawAddress) -> CancunTransactionContext:
        return CancunTransactionContext(gas_price=0, origin=sender)

    def _finish(self, computation: Any) -> None:
        self.state.clear_transient_storage()
        self.state.lock_changes()
        if computation.is_error:
            raise revert_error(computation.output, repr(computation.error))


def _whole_gas(data: bytes, used: int, refund: int) -> int:
    """The gas of a transaction by its receipt: EIP-2028 calldata, EIP-3529 refunds, EIP-7623 floor."""
    zeros = data.count(0)
    tokens = zeros + 4 * (len(data) - zeros)
    gross = 21_000 + 4 * tokens + used
    return max(gross - min(refund, gross // 5), 21_000 + 10 * tokens)


def _log(entry: tuple[bytes, tuple[int, ...], bytes]) -> dict[str, Any]:
    address, topics, data = entry
    at = {"blockNumber": "0x0", "logIndex": "0x0", "blockHash": "0x" + "00" * 32, "transactionHash": "0x" + "00" * 32}
    body = {"address": _address(address), "topics": [f"0x{topic:064x}" for topic in topics], "data": "0x" + data.hex()}
    return at | body


def _raw(address: Address) -> RawAddress:
    return RawAddress(bytes.fromhex(address[2:]))


def _address(raw: bytes) -> Address:
    return Address("0x" + raw.hex())


__all__ = ["CHAIN_ID", "MAX_TRANSACTION_GAS", "NOWHERE", "START", "Executed", "MemoryChain"]
