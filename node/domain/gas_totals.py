"""What the transactions of a node's wallet cost since its start."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class GasTotals:
    """Numbers of transactions, their gas, and its price in wei."""

    transactions: int = 0
    gas: int = 0
    fee: int = 0

    def add(self, gas: int, fee: int) -> None:
        """Adds a transaction."""
        self.transactions += 1
        self.gas += gas
        self.fee += fee
