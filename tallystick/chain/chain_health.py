"""The health of a chain's endpoint as a daemon sees it: its chain, its last block, the contract, and coins for gas."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from tallystick.chain.claims import BATCH_GAS, CLAIM_GAS, ROW_GAS
from tallystick.chain.deployment import Deployment
from tallystick.chain.endpoint import Rpc
from tallystick.protocol.codecs import keccak
from tallystick.protocol.errors import TallyError
from tallystick.protocol.health import CheckResult, Health
from tallystick.protocol.types import Address, Amount, format_amount

COIN_DECIMALS = 18
LOCAL_CHAIN_ID = 31_337
"""A local chain mines a block only if there is a transaction, so its last block may be of any age."""
OLD_BLOCK_SECONDS, STALE_BLOCK_SECONDS = 300, 1_800
SETTLEMENT_GAS = BATCH_GAS + CLAIM_GAS + ROW_GAS
"""The gas of the smallest settlement."""
FUTURE_BLOCK_SECONDS = 30
"""A last block that is further ahead of this machine's clock is a warning."""
RESERVE_SETTLEMENTS = 100
"""Fewer settlements than the coins can pay for raise a warning."""


class ChainHealth:
    """Checks one endpoint for one deployment and the account that pays for gas. It costs one HTTP exchange."""

    def __init__(self, rpc: Rpc, deployment: Deployment, account: Address, now: Callable[[], float] = time.time) -> None:
        """`rpc` must be of this object alone: another one may have cached the chain's id."""
        self._rpc, self._deployment, self._account, self._now = rpc, deployment, account, now
        self._code: bytes | None = None

    async def check(self) -> dict[str, CheckResult]:
        """The states of `chain`, `block_age`, `contract` and `gas`, and of `clock` if it is off.

        Raises TallyError if the endpoint does not answer.
        """
        chain, block, balance, price, code = await self._rpc.batch(
            ("eth_chainId",),
            ("eth_getBlockByNumber", "latest", False),
            ("eth_getBalance", self._account, "latest"),
            ("eth_gasPrice",),
            ("eth_getCode", self._deployment.escrow, "latest"),
        )
        chain_id = self._quantity("eth_chainId", chain)
        if chain_id != self._deployment.chain_id:
            problem = f"the endpoint serves chain {chain_id}, the deployment is on chain {self._deployment.chain_id}"
            return {"chain": CheckResult(Health.FAIL, problem, "set `rpc` to an endpoint of the deployment's chain", chain_id)}
        return {
            "chain": CheckResult(Health.PASS, value=chain_id),
            **self._block_age(block),
            "contract": self._contract(code),
            "gas": self._gas(self._quantity("eth_getBalance", balance), self._quantity("eth_gasPrice", price)),
        }

    def _block_age(self, raw: object) -> dict[str, CheckResult]:
        """The state of `block_age`, and of `clock` if the last block is of the future: a chain's blocks never are."""
        block = self._rpc.read_block(_value(raw))
        age = 0 if block is None else round(self._now() - block.timestamp)
        if -age <= FUTURE_BLOCK_SECONDS or self._deployment.chain_id == LOCAL_CHAIN_ID:
            return {"block_age": self._checked_age(max(0, age))}
        text = f"this machine's clock is {-age} s behind the chain's last block"
        remedy = "set the clock (`timedatectl set-ntp true`), or use another endpoint (`rpc`)"
        return {
            "block_age": CheckResult(Health.PASS, value=0, unit="s"),
            "clock": CheckResult(Health.WARN, text, remedy, -age, "s"),
        }

    def _checked_age(self, age: int) -> CheckResult:
        status = Health.FAIL if age > STALE_BLOCK_SECONDS else Health.WARN if age > OLD_BLOCK_SECONDS else Health.PASS
        if self._deployment.chain_id == LOCAL_CHAIN_ID or status is Health.PASS:
            return CheckResult(Health.PASS, value=age, unit="s")
        problem = f"the last block is {age} s old: the endpoint does not follow the chain, or this machine's clock is ahead"
        return CheckResult(
            status, problem, "use another endpoint (`rpc`), or set the clock (`timedatectl set-ntp true`)", age, "s"
        )

    def _contract(self, raw: object) -> CheckResult:
        code = str(_value(raw) or "0x").removeprefix("0x")
        code_hash = keccak(bytes.fromhex(code)) if code else None
        remedy = "compare the deployment file with the market's operator's; a local chain that was stopped needs `tally deploy`"
        if code_hash is None:
            return CheckResult(Health.FAIL, f"there is no contract at {self._deployment.escrow}", remedy)
        self._code = self._code or code_hash
        if code_hash != self._code:
            return CheckResult(Health.FAIL, f"the code at {self._deployment.escrow} changed", remedy, "0x" + code_hash.hex())
        return CheckResult(Health.PASS, value="0x" + code_hash.hex())

    def _gas(self, balance: int, price: int) -> CheckResult:
        coins = format_amount(Amount(balance), COIN_DECIMALS)
        needed = SETTLEMENT_GAS * max(price, 1)
        payable = balance // needed
        if payable >= RESERVE_SETTLEMENTS:
            return CheckResult(Health.PASS, value=coins, unit="coins")
        local = self._deployment.chain_id == LOCAL_CHAIN_ID
        remedy = f"tally chain fund {self._account}"
        if not local:
            remedy = f"send coins of chain {self._deployment.chain_id} to {self._account} (on a local chain: {remedy})"
        if payable:
            return CheckResult(Health.WARN, f"{coins} coins pay for about {payable} settlements", remedy, coins, "coins")
        return CheckResult(Health.FAIL, f"{coins} coins pay for no settlement", remedy, coins, "coins")

    def _quantity(self, method: str, raw: object) -> int:
        return self._rpc.read_number(method, _value(raw))


def _value(raw: Any) -> Any:
    if isinstance(raw, TallyError):
        raise raw
    return raw
