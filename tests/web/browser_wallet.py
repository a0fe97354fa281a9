"""A wallet in a browser for tests: it announces itself (EIP-6963), asks nobody, and has its key in the test's process."""

from __future__ import annotations

from dataclasses import dataclass, field

from playwright.async_api import Page

from tallystick.protocol.eip712 import Signer
from tallystick.protocol.sign_in import text_digest

_ICON = "data:image/svg+xml;base64,PHN2ZyB4bWxucz0iaHR0cDovL3d3dy53My5vcmcvMjAwMC9zdmciIHdpZHRoPSIxIiBoZWlnaHQ9IjEiLz4="
_SCRIPT = """
(() => {
  const provider = {
    request: async ({ method, params }) => {
      const answer = JSON.parse(await window.askTestWallet(NAME, method, JSON.stringify(params ?? [])));
      if (answer.error) throw Object.assign(new Error(answer.error.message), { code: answer.error.code });
      return answer.result;
    },
    on: () => {},
    removeListener: () => {},
  };
  const info = { uuid: "uuid-" + NAME, name: NAME, icon: ICON, rdns: "org.example.wallet" };
  const announce = () =>
    window.dispatchEvent(new CustomEvent("eip6963:announceProvider", { detail: Object.freeze({ info, provider }) }));
  window.addEventListener("eip6963:requestProvider", announce);
  announce();
})();
"""


@dataclass
class BrowserWallet:
    """A wallet of one key. `refuses`: the code with which it answers instead, such as 4001; `asked`: the methods so far."""

    key: Signer
    name: str = "Test wallet"
    refuses: int = 0
    asked: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)

    def answer(self, method: str, params: list[str]) -> object:
        """Answers a request of EIP-1193."""
        self.asked.append(method)
        if method == "eth_requestAccounts":
            return [self.key.address]
        assert method == "personal_sign", method
        assert params[1] == self.key.address
        self.texts.append(bytes.fromhex(params[0][2:]).decode())
        return "0x" + self.key.sign_digest(text_digest(self.texts[-1])).hex()


async def install(page: Page, *wallets: BrowserWallet) -> None:
    """Adds wallets to all pages that this one loads from now on."""
    import json

    by_name = {wallet.name: wallet for wallet in wallets}

    def ask(name: str, method: str, params: str) -> str:
        wallet = by_name[name]
        if wallet.refuses:
            return json.dumps({"error": {"code": wallet.refuses, "message": "no"}})
        return json.dumps({"result": wallet.answer(method, json.loads(params))})

    await page.expose_function("askTestWallet", ask)
    for wallet in wallets:
        script = _SCRIPT.replace("NAME", json.dumps(wallet.name)).replace("ICON", json.dumps(_ICON))
        await page.add_init_script(script)
