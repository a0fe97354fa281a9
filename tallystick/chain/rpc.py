"""The names for access to any chain: a JSON-RPC endpoint, and an account that sends transactions through it."""

from __future__ import annotations

from tallystick.chain.endpoint import Block, Rpc, WrongChain
from tallystick.chain.rpc_errors import RpcError
from tallystick.chain.sender import MAX_TRANSACTION_GAS, MinedTransaction, Replaced, Sender

__all__ = ["MAX_TRANSACTION_GAS", "Block", "MinedTransaction", "Replaced", "Rpc", "RpcError", "Sender", "WrongChain"]
