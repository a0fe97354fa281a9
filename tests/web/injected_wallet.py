"""A browser wallet for tests: announced by EIP-6963, driven by EIP-1193; keys and decisions are in the test process."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from eth_account import Account
from eth_account.messages import encode_defunct, encode_typed_data
from playwright.async_api import Page

from tallystick.chain.codec import ContractError
from tallystick.chain.endpoint import Rpc
from tallystick.protocol.eip712 import Signer
from tallystick.protocol.errors import TallyError
from tallystick.protocol.types import Address

REJECTED = {"code": 4001, "message": "User rejected the request."}
_PROVIDER = """(([name, rdns, call]) => {
    const listeners = {};
    const provider = {
        request: async ({method, params = []}) => {
            const answer = JSON.parse(await window[call](JSON.stringify({method, params})));
            if (answer.error) throw Object.assign(new Error(answer.error.message), answer.error);
            return answer.result;
        },
        on: (event, listener) => (listeners[event] ??= []).push(listener),
    };
    window[`${call}Emit`] = (event, value) => (listeners[event] ?? []).forEach((listener) => listener(value));
    const icon = "data:image/svg+xml,<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 1 1'><path d='M0 0h1v1'/></svg>";
    const info = Object.freeze({uuid: call, name, icon, rdns});
    const announce = () => window.dispatchEvent(
        new CustomEvent("eip6963:announceProvider", {detail: Object.freeze({info, provider})}));
    window.addEventListener("eip6963:requestProvider", announce);
    announce();
})"""


class WalletError(Exception):
    """What a wallet answers a page instead of a result."""

    def __init__(self, error: dict[str, Any]) -> None:
        super().__init__(error["message"])
        self.error = error


def answers(**error: Any) -> Callable[[list[Any]], Any]:
    """A behaviour that answers with an error."""

    def behave(_params: list[Any]) -> Any:
        raise WalletError({"message": "", **error})

    return behave


def nested(error: dict[str, Any]) -> list[dict[str, Any]]:
    """An error as wallets and nodes wrap it."""
    return [
        error,
        {"code": -32603, "message": "Internal JSON-RPC error.", "data": error},
        {"code": -32603, "message": "Internal JSON-RPC error.", "data": {"originalError": error}},
        {"code": -32000, "message": "wrapped", "error": {"cause": error}},
    ]


@dataclass
class InjectedWallet:
    """A wallet of these accounts, the first of which is selected, on the chain at `rpc`.

    `behaviours` replaces methods: each is called with the parameters and returns the result, or raises WalletError.
    """

    rpc: Rpc
    accounts: list[Signer]
    name: str = "Test Wallet"
    rdns: str = "example.wallet"
    handle: str = "testWallet"
    chain_id: int | None = None
    connected: bool = False
    gas_price_factor: int = 2
    gas: int = 0
    """The gas limit of transactions; 0 if it is estimated."""
    behaviours: dict[str, Callable[[list[Any]], Any]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    sent: list[dict[str, Any]] = field(default_factory=list)
    gate: asyncio.Event | None = None
    """If set, requests that a person must answer wait for it."""

    async def install(self, page: Page) -> None:
        """Puts the wallet into all documents that the page loads."""
        await page.expose_function(self.handle, self._answer)
        await page.add_init_script(f"{_PROVIDER}({json.dumps([self.name, self.rdns, self.handle])})")

    async def emit(self, page: Page, event: str, value: Any) -> None:
        """Tells the page of an event."""
        await page.evaluate("([call, event, value]) => window[`${call}Emit`](event, value)", [self.handle, event, value])

    async def select(self, page: Page, account: Signer) -> None:
        """The owner selects another account."""
        self.accounts.sort(key=lambda known: known.address != account.address)
        await self.emit(page, "accountsChanged", [account.address])

    async def _answer(self, text: str) -> str:
        request = json.loads(text)
        method, params = request["method"], request["params"]
        self.asked.append(method)
        try:
            return json.dumps({"result": await self._perform(method, params)})
        except WalletError as error:
            return json.dumps({"error": error.error})
        except ContractError as error:
            return json.dumps({"error": {"code": 3, "message": str(error)}})
        except TallyError as error:
            return json.dumps({"error": {"code": -32603, "message": str(error)}})

    async def _perform(self, method: str, params: list[Any]) -> Any:
        if method in {"eth_sendTransaction", "eth_signTypedData_v4", "personal_sign"} and self.gate is not None:
            await self.gate.wait()
        if method in self.behaviours:
            result = self.behaviours[method](params)
            return await result if asyncio.iscoroutine(result) else result
        own = getattr(self, f"_{method}", None)
        return await own(params) if own is not None else await self.forward(method, params)

    async def forward(self, method: str, params: list[Any]) -> Any:
        """The node's answer, with the bytes of a revert where most nodes put them."""
        import httpx

        async with httpx.AsyncClient(timeout=120, trust_env=False) as http:
            request = {"jsonrpc": "2.0", "id": 1, "method": method, "params": params}
            answer = (await http.post(self.rpc.url, json=request)).json()
        if "error" in answer:
            raise WalletError(answer["error"])
        return answer["result"]

    async def _eth_requestAccounts(self, _params: list[Any]) -> list[Address]:  # noqa: N802 - the method's name
        self.connected = True
        return [account.address for account in self.accounts]

    async def _eth_accounts(self, _params: list[Any]) -> list[Address]:
        return [account.address for account in self.accounts] if self.connected else []

    async def _eth_chainId(self, _params: list[Any]) -> str:  # noqa: N802 - the method's name
        return hex(self.chain_id) if self.chain_id is not None else str(await self.forward("eth_chainId", []))

    def account(self, address: str) -> Signer:
        """The account with an address, of any case."""
        return next(known for known in self.accounts if known.address.lower() == address.lower())

    async def _personal_sign(self, params: list[Any]) -> str:
        signer = self.account(params[1])
        signed = Account.sign_message(encode_defunct(hexstr=params[0]), signer.secret)
        return "0x" + bytes(signed.signature).hex()

    async def _eth_signTypedData_v4(self, params: list[Any]) -> str:  # noqa: N802 - the method's name
        signer, typed = self.account(params[0]), json.loads(params[1])
        integers = {member["name"] for member in typed["types"][typed["primaryType"]] if member["type"].startswith("uint")}
        typed["message"] = {name: int(value) if name in integers else value for name, value in typed["message"].items()}
        signed = Account.sign_message(encode_typed_data(full_message=typed), signer.secret)
        return "0x" + bytes(signed.signature).hex()

    async def signed(self, transaction: dict[str, Any], nonce: int | None = None) -> tuple[str, str]:
        """Signs a transaction as the page gave it. Returns its raw bytes and its hash, as hex. Nothing is sent."""
        signer = self.account(transaction["from"])
        if nonce is None:
            nonce = int(await self.forward("eth_getTransactionCount", [signer.address, "latest"]), 16)
        call = {name: transaction[name] for name in ("from", "to", "data")}
        gas = self.gas or int(await self.forward("eth_estimateGas", [call]), 16) * 3 // 2
        fields = {
            "to": self.rpc_checksum(transaction["to"]),
            "data": transaction["data"],
            "value": 0,
            "nonce": nonce,
            "gas": gas,
            "gasPrice": self.gas_price_factor * int(await self.forward("eth_gasPrice", []), 16),
            "chainId": int(transaction["chainId"], 16),
        }
        made = Account.sign_transaction(fields, signer.secret)
        return "0x" + bytes(made.raw_transaction).hex(), "0x" + bytes(made.hash).hex()

    @staticmethod
    def rpc_checksum(address: str) -> str:
        """An address as eth-account wants it."""
        from eth_utils.address import to_checksum_address

        return str(to_checksum_address(address))

    async def _eth_sendTransaction(self, params: list[Any]) -> str:  # noqa: N802 - the method's name
        raw, _ = await self.signed(params[0])
        self.sent.append(params[0])
        return str(await self.forward("eth_sendRawTransaction", [raw]))
