from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from eth_account import Account

from tallystick.chain.evm import Evm
from tallystick.chain.rpc import MAX_TRANSACTION_GAS
from tallystick.protocol.eip712 import Signer
from tallystick.protocol.signatures import checksum
from tallystick.protocol.types import Amount
from tests.contracts import gas
from tests.contracts.evm_harness import CHAIN_ID
from tests.contracts.market_harness import DOLLAR, Market, person

KEY, OWNER, PROVIDER, DEPLOYER = (person(n) for n in ("key", "owner", "provider", "deployer"))


def test_the_targets_that_are_met_stay_met() -> None:
    """A row signed by both parties costs at most 57,700 gas alone, 20,400 among 100, 20,900 with a fee, and less than x402."""
    measured = json.loads((Path(__file__).parents[2] / "contracts" / "gas.json").read_text())
    for name in ("settle_row_1", "settle_row_100", "settle_row_100_with_fee"):
        assert measured[name] <= gas.TARGETS[name]
    for rows in (10, 100):
        assert measured[f"settle_row_{rows}"] < gas.QUOTED[f"x402_row_{rows}"]
    assert measured["max_rows"] * measured["settle_row_100"] < 1.05 * MAX_TRANSACTION_GAS


def test_measured_gas_equals_gas_used() -> None:
    """The gas computed here equals gasUsed of the same transactions on the embedded chain."""
    people = (DEPLOYER, KEY, OWNER, PROVIDER)
    market = Market()
    evm = Evm(CHAIN_ID, [bytes.fromhex(signer.address[2:]) for signer in people])
    nonces = dict.fromkeys((signer.address for signer in people), 0)

    def send(signer: Signer, to: str | None, data: bytes) -> int:
        fields: dict[str, Any] = {"type": 2, "chainId": CHAIN_ID, "nonce": nonces[signer.address], "gas": 10**7, "data": data}
        fees = {"maxFeePerGas": 10**11, "maxPriorityFeePerGas": 10**9, "value": 0} | ({"to": checksum(to)} if to else {})
        nonces[signer.address] += 1
        raw = bytes(Account.sign_transaction(fields | fees, signer.secret).raw_transaction)
        receipt = evm.receipts[evm.send_raw(raw)]
        assert receipt["status"] == "0x1"
        return int(receipt["gasUsed"], 16)

    rules = tuple(getattr(market.rules, name) for name in market.rules.__slots__)
    for code in (market.token_abi.create(), market.escrow_abi.create(market.token, rules)):
        send(DEPLOYER, None, code)
    row = market.row(KEY, PROVIDER.address, DOLLAR, reserve_target=Amount(DOLLAR))
    market.chain.now = evm.next_timestamp()
    for signer, function, arguments in (
        (OWNER, "mint", (OWNER.address, 5 * DOLLAR)),
        (OWNER, "approve", (market.escrow, 5 * DOLLAR)),
        (KEY, "open", (KEY.address, OWNER.address, b"")),
        (OWNER, "deposit", (KEY.address, 5 * DOLLAR)),
        (PROVIDER, "settle", ([market.claim(PROVIDER, row).encode()],)),
        (OWNER, "thaw", (KEY.address, DOLLAR)),
        (OWNER, "cancelThaw", (KEY.address,)),
        (PROVIDER, "cashOut", (PROVIDER.address,)),
    ):
        abi, to = (market.token_abi, market.token) if function in {"mint", "approve"} else (market.escrow_abi, market.escrow)
        data = abi.call(function, *arguments)
        assert market.chain.send(signer.address, to, data).gas == send(signer, to, data), function
