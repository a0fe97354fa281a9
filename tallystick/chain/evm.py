"""A local chain in memory: py-evm through eth-tester, with one block per transaction and an adjustable clock.

It is synchronous and not thread-safe; devnet.py serves it. Blocks, transactions, receipts and logs are stored in JSON-RPC form
(https://ethereum.github.io/execution-apis/), so lookups need no conversion.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

from eth.chains.base import MiningChain
from eth.exceptions import Revert
from eth.vm.spoof import SpoofTransaction
from eth_tester.backends.pyevm.main import PyEVMBackend
from eth_tester.backends.pyevm.serializers import serialize_block, serialize_transaction, serialize_transaction_receipt
from eth_typing import Address
from eth_utils.exceptions import ValidationError

from tallystick.chain.hex_encoding import block_json, receipt_json, transaction_json

GAS_LIMIT = 30_029_122
PRIORITY_FEE = 10**9
MAX_QUEUED = 1_000
_INITIAL_BALANCE = 10**24
_ZERO = bytes(20)


class EvmCall(NamedTuple):
    """An unsigned call. `value` is in wei; an empty `to` creates a contract."""

    sender: bytes
    to: bytes
    data: bytes
    value: int
    gas: int = GAS_LIMIT


class Rejected(Exception):
    """A transaction or request that the chain cannot execute."""


class Reverted(Exception):
    """A call that failed in the EVM. `data` is its return data: a custom error, Error(string), a panic or nothing."""

    def __init__(self, data: bytes, reason: str) -> None:
        super().__init__(reason)
        self.data = data


class Evm:
    """A chain in memory. `clock` returns Unix seconds. Each of `accounts` starts with a million coins."""

    def __init__(self, chain_id: int, accounts: list[bytes], clock: Callable[[], float] = time.time) -> None:
        state = {a: {"balance": _INITIAL_BALANCE, "storage": {}, "code": b"", "nonce": 0} for a in accounts}
        self.chain_id = chain_id
        self._chain: MiningChain = PyEVMBackend(genesis_state=state).chain
        type(self._chain).chain_id = chain_id  # eth-tester creates a class for each chain, with its own id
        self._clock, self._offset = clock, 0
        genesis = self._chain.get_canonical_block_by_number(0)
        self.headers: list[Any] = [genesis.header]
        self.blocks = [block_json(serialize_block(genesis, False, False))]
        self.transactions: dict[str, dict[str, Any]] = {}
        self.receipts: dict[str, dict[str, Any]] = {}
        self.logs: list[dict[str, Any]] = []
        self._queued: dict[tuple[bytes, int], Any] = {}

    # ------------------------------------------------------------------------------------------------------ transactions

    def send_raw(self, raw: bytes) -> str:
        """Executes and mines a signed transaction. One with a later nonce is queued. Raises Rejected."""
        try:
            transaction = self._chain.get_vm().get_transaction_builder().decode(raw)
            sender, nonce = transaction.sender, transaction.nonce
        except Exception as error:  # noqa: BLE001 - py-evm and rlp raise many types on malformed bytes
            raise Rejected(f"not a signed transaction: {error}") from None
        self._check(transaction)
        expected = self.nonce(sender)
        if nonce < expected:
            raise Rejected(f"nonce too low: next nonce {expected}, tx nonce {nonce}")
        if nonce == expected:
            self._mine(transaction)
            self._mine_queued(sender)
            return "0x" + transaction.hash.hex()
        if len(self._queued) >= MAX_QUEUED:
            raise Rejected("txpool is full")
        self._queued[sender, nonce] = transaction
        return "0x" + transaction.hash.hex()

    def _check(self, transaction: Any) -> None:
        """Checks that py-evm omits, or whose messages differ from other nodes. Raises Rejected."""
        if getattr(transaction, "chain_id", self.chain_id) not in (None, self.chain_id):
            raise Rejected(f"invalid chain id: {transaction.chain_id}, this is chain {self.chain_id}")
        if transaction.max_priority_fee_per_gas > transaction.max_fee_per_gas:
            raise Rejected("max priority fee per gas higher than max fee per gas")
        have, want = self.balance(transaction.sender), transaction.gas * transaction.max_fee_per_gas + transaction.value
        if have < want:
            raise Rejected(f"insufficient funds for gas * price + value: have {have} want {want}")

    def _mine_queued(self, sender: bytes) -> None:
        while transaction := self._queued.pop((sender, self.nonce(sender)), None):
            try:
                self._mine(transaction)
            except Rejected:
                return

    def _mine(self, transaction: Any = None) -> None:
        """Mines the next block, with this transaction or empty."""
        chain = self._chain
        chain.header = chain.create_header_from_parent(self.headers[-1], timestamp=self.next_timestamp())
        receipts: tuple[Any, ...] = ()
        if transaction is not None:
            try:
                _, receipt, _ = chain.apply_transaction(transaction)
            except ValidationError as error:
                raise Rejected(str(error)) from None
            receipts = (receipt,)
        block = chain.mine_block(coinbase=_ZERO, blob_gas_used=0)
        self.headers.append(block.header)
        self.blocks.append(block_json(serialize_block(block, False, False)))
        if transaction is not None:
            self._index(block, receipts, transaction)

    def _index(self, block: Any, receipts: tuple[Any, ...], transaction: Any) -> None:
        key = "0x" + transaction.hash.hex()
        receipt = serialize_transaction_receipt(block, receipts, transaction, 0, False, None)
        self.transactions[key] = transaction_json(serialize_transaction(block, transaction, 0, False))
        self.receipts[key] = receipt_json(receipt, receipts[0].bloom)
        self.logs += self.receipts[key]["logs"]

    def mine(self, blocks: int = 1) -> None:
        """Mines empty blocks."""
        for _ in range(blocks):
            self._mine()

    # ------------------------------------------------------------------------------------------------------------- calls

    def call(self, call: EvmCall, block: int) -> bytes:
        """The output of a call on the state after `block`, at the time of the next block. Raises Reverted, Rejected."""
        return bytes(self._execute(call, block).output)

    def estimate_gas(self, call: EvmCall, block: int) -> int:
        """A gas limit with which the transaction succeeds. Raises Reverted if it fails with any, Rejected."""
        remaining = int(self._execute(call._replace(gas=GAS_LIMIT), block).get_gas_remaining())
        zeros = call.data.count(0)
        floor = 21_000 + 10 * (zeros + 4 * (len(call.data) - zeros))  # EIP-7623
        gas = max(GAS_LIMIT - remaining, floor)
        while gas < GAS_LIMIT:
            try:
                self._execute(call._replace(gas=gas), block)
            except Reverted:  # an inner call retains a 64th of the gas (EIP-150)
                gas += gas // 64 + 1
            else:
                return gas
        return GAS_LIMIT

    def _execute(self, call: EvmCall, block: int) -> Any:
        state = self._state(block, free=True)
        nonce, have = state.get_nonce(call.sender), state.get_balance(call.sender)
        if have < call.value:
            raise Rejected(f"insufficient funds for transfer: have {have} want {call.value}")
        unsigned = self._chain.create_unsigned_transaction(
            nonce=nonce, gas_price=0, gas=call.gas, to=Address(call.to), value=call.value, data=call.data
        )
        try:
            computation = state.apply_transaction(SpoofTransaction(unsigned, from_=call.sender))
        except ValidationError as error:
            raise Reverted(b"", str(error)) from None
        if computation.is_error:
            revert = isinstance(computation.error, Revert)
            raise Reverted(computation.output if revert else b"", "execution reverted" if revert else repr(computation.error))
        return computation

    def _state(self, block: int, *, free: bool = False) -> Any:
        header = self._chain.create_header_from_parent(self.headers[block], timestamp=self.next_timestamp(block))
        return self._chain.get_vm(header.copy(base_fee_per_gas=0) if free else header).state

    # ------------------------------------------------------------------------------------------------------------- state

    def balance(self, address: bytes, block: int = -1) -> int:
        """The balance of an account in wei, after a block."""
        return int(self._state(block).get_balance(address))

    def code(self, address: bytes, block: int = -1) -> bytes:
        """The code of an account, after a block."""
        return bytes(self._state(block).get_code(address))

    def storage(self, address: bytes, slot: int, block: int = -1) -> int:
        """A word of a contract's storage, after a block."""
        return int(self._state(block).get_storage(address, slot))

    def nonce(self, address: bytes, block: int = -1) -> int:
        """The number of transactions that an account has sent, after a block."""
        return int(self._state(block).get_nonce(address))

    @property
    def base_fee(self) -> int:
        """The base fee of the next block, in wei per unit of gas."""
        header: Any = self._chain.create_header_from_parent(self.headers[-1])
        return int(header.base_fee_per_gas)

    # -------------------------------------------------------------------------------------------------------------- time

    def next_timestamp(self, block: int = -1) -> int:
        """The time of the block after `block`: now, but at least one second after `block`."""
        return int(max(int(self._clock()) + self._offset, self.headers[block].timestamp + 1))

    def increase_time(self, seconds: int) -> int:
        """Moves the clock forward. The next block is at least `seconds` after the last one. Returns the total offset."""
        now = int(self._clock()) + self._offset
        self._offset += max(now, self.headers[-1].timestamp) - now + seconds
        return self._offset

    def set_time(self, timestamp: int) -> None:
        """Moves the clock to a time after the last block. Raises Rejected."""
        if timestamp <= self.headers[-1].timestamp:
            raise Rejected(f"timestamp {timestamp} is not after the last block's {self.headers[-1].timestamp}")
        self._offset = timestamp - int(self._clock())

    def snapshot(self) -> int:
        """An identifier for `revert`: the number of the last block."""
        return len(self.headers) - 1

    def revert(self, snapshot_block: int) -> bool:
        """Removes all blocks after a snapshot; the clock stays. Returns false for a snapshot that no longer exists."""
        if not 0 <= snapshot_block < len(self.headers):
            return False
        removed = [key for key, receipt in self.receipts.items() if int(receipt["blockNumber"], 16) > snapshot_block]
        for key in removed:
            del self.receipts[key], self.transactions[key]
        self.logs = [log for log in self.logs if int(log["blockNumber"], 16) <= snapshot_block]
        del self.headers[snapshot_block + 1 :], self.blocks[snapshot_block + 1 :]
        self._queued.clear()
        return True
