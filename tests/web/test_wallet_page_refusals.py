"""The wallet page with tokens and wallets that lack something, and with whatever the contract refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from eth_abi.abi import encode

from tallystick.chain.codec import load_abi
from tallystick.protocol.codecs import keccak
from tests.chain.harness import DOLLAR, World
from tests.web.browser import needs_browser
from tests.web.injected_wallet import WalletError, answers, nested
from tests.web.wallet_desk import Desk, desk

pytestmark = needs_browser


def _token_without(at: Desk, world: World, *functions: str) -> Callable[[list[Any]], Any]:
    """A node's eth_call, for a token that lacks these functions."""
    lacking = {"0x" + keccak(name.encode())[:4].hex() for name in functions}

    async def call(params: list[Any]) -> Any:
        if params[0]["to"].lower() == world.deployment.token and params[0]["data"][:10] in lacking:
            raise WalletError({"code": 3, "message": "execution reverted"})
        return await at.wallet.forward("eth_call", params)

    return call


async def test_deposits_without_permits(world: World) -> None:
    """Tokens and wallets without permits take an approval of exactly the amount, which the deposit uses up."""
    async with desk(world) as at:
        await world.purse(at.owner, at.owner, 0)
        await at.connect()
        at.wallet.behaviours["eth_call"] = _token_without(at, world, "nonces(address)", "eip712Domain()")
        shown = await at.do("deposit", "3")
        assert "Allow exactly 3 dollars" in shown
        assert "eth_signTypedData_v4" not in at.wallet.asked
        # A token of before EIP-5267, whose domain follows from its name
        at.wallet.behaviours["eth_call"] = _token_without(at, world, "eip712Domain()", "version()", "PERMIT_TYPEHASH()")
        assert "EIP-2612" in await at.do("deposit", "2")
        unusable: list[Callable[[list[Any]], Any]] = [
            answers(code=4200, message="unsupported"),
            answers(code=-32601, message="no such method"),
            lambda _params: "0x1234",
            lambda _params: None,
            lambda _params: "0x" + "11" * 64 + "1b",  # of another key
        ]
        for behave in unusable:
            at.wallet.behaviours = {"eth_signTypedData_v4": behave}
            await at.start("deposit", "1")
            await at.agree()
            await at.says("It can be approved instead", "#review-note")
            assert "Allow exactly 1 dollars" in await at.agree()
            await at.says("Done.")
            await at.idle()
        assert await world.escrow.token.allowance(at.owner.address, world.deployment.escrow) == 0
        assert (await world.escrow.purse(at.owner.address)).free == 10 * DOLLAR


async def test_every_error_of_the_contract(world: World) -> None:
    """Whatever the contract refuses is said in words, however the wallet wraps it."""
    async with desk(world) as at:
        await world.purse(at.owner, at.owner, DOLLAR // 2)
        await at.connect()
        values = {"uint256": 1_900_000_000, "address": at.owner.address, "bytes32": b"\1" * 32, "string": "why", "uint8": 1}
        errors = [*load_abi("Escrow").errors.values(), *load_abi("TestUSD").errors.values()]
        seen = set[str]()
        for error in {entry.id: entry for entry in errors}.values():
            data = "0x" + (error.id[:4] + encode(error.types, [values[kind] for kind in error.types])).hex()
            wrapped = [*nested({"code": 3, "message": "execution reverted", "data": data})]
            wrapped.append({"code": -32000, "message": f"execution reverted: {data}"})
            shape = wrapped[len(seen) % len(wrapped)]

            async def call(params: list[Any], shape: dict[str, Any] = shape) -> Any:
                if "from" in params[0]:
                    raise WalletError(shape)
                return await at.wallet.forward("eth_call", params)

            at.wallet.behaviours["eth_call"] = call
            await at.start("thaw", "1")
            text = await at.settled()
            assert "undefined" not in text
            assert "NaN" not in text
            assert text not in {"", "Preparing."}
            assert ("The contract refuses" in text) or text not in seen, text
            assert "does not know" not in text, error.name
            seen.add(text)
        at.wallet.behaviours["eth_call"] = lambda params: at.wallet.forward("eth_call", params)
        await at.start("thaw", "1")
        await at.says("Only 0.5 dollars are free, but you asked for 1 dollars")
