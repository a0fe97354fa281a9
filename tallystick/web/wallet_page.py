"""The page on which an owner moves money with a wallet of the browser. The wallet signs; the server tells public facts.

The page reads the chain through the wallet and compares the contract's code with what this server found. What the state means is
put into words here, by the same StateExplainer as in `tally contract inspect`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from tallystick.chain.code_check import check_code
from tallystick.chain.codec import WrongContract, load_abi
from tallystick.chain.escrow import Escrow, EscrowRules, provider_of, purse_of, tab_of
from tallystick.chain.hex_encoding import InvalidParams, parse_data
from tallystick.chain.read_cache import ReadCache
from tallystick.chain.state_explainer import Explanation, StateExplainer, moment
from tallystick.protocol.errors import BadMessage, TallyError
from tallystick.protocol.types import Address, Amount, format_amount, parse_address
from tallystick.runtime.plaintext import is_loopback
from tallystick.web.rendering import HEADERS, Pages

TEMPLATE = "wallet.html"
MEANING = "meaning"
"""The route below the page's that puts state into words."""
FACTS_SECONDS = 60.0
FAILURE_SECONDS = 5.0
"""How long what was read from the chain is used, and how long a chain that failed is left alone, however many ask."""
LAST_SECOND = 253_402_300_799
"""The end of the year 9999, after which no time can be written."""
MAX_RESULT = 4 * 32
"""Bytes of the longest result that is put into words."""
CHAINS: Mapping[int, tuple[str, str]] = {
    1: ("Ethereum", "ETH"),
    10: ("OP Mainnet", "ETH"),
    100: ("Gnosis", "xDAI"),
    137: ("Polygon", "POL"),
    8_453: ("Base", "ETH"),
    31_337: ("Local test chain", "ETH"),
    42_161: ("Arbitrum One", "ETH"),
    84_532: ("Base Sepolia", "ETH"),
    11_155_111: ("Sepolia", "ETH"),
}
"""Name and coin of well-known chains, by id (https://chainlist.org), for wallets that do not know them yet."""


@dataclass(frozen=True, slots=True)
class Parties:
    """Whom a page is for: the key of the purse, and the account that earns; None if the visitor chooses.

    `bind` is the path to which a page posts an owner, for the key's signature that opens its purse; None if there is no such key.
    """

    key: Address | None = None
    account: Address | None = None
    bind: str | None = None


class WalletPage:
    """The page of one deployment, at `path`. `clock` gives monotonic seconds.

    It tells the chain's endpoint only if that is on this machine: the URL of another may have an API key in it.
    """

    def __init__(
        self,
        escrow: Escrow,
        path: str,
        parties: Parties = Parties(),
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._escrow, self._path, self._parties, self._clock = escrow, path, parties, clock
        self._rpc = escrow.rpc.url if is_loopback(urlsplit(escrow.rpc.url).hostname or "") else None
        self._checked: ReadCache[Address, tuple[EscrowRules, str]] = ReadCache("code of", self._check, capacity=1, clock=clock)
        self._failure: TallyError | None = None
        self._failed_at = float("-inf")

    async def _check(self, _escrow: Address) -> tuple[EscrowRules, str]:
        try:
            return await check_code(self._escrow)
        except TallyError as error:
            self._failure, self._failed_at = error, self._clock()
            raise

    async def _facts(self) -> tuple[EscrowRules, str]:
        """The rules and the code's hash. Raises what `check_code` raises."""
        if self._failure is not None and self._clock() < self._failed_at + FAILURE_SECONDS:
            raise self._failure
        facts = await self._checked.get(self._escrow.deployment.escrow, max_age=FACTS_SECONDS)
        self._failure = None
        return facts

    def shown(self, pages: Pages) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """GET: the page, among these pages."""

        async def show(_request: Request) -> Response:
            return await self.render(pages)

        return show

    async def render(self, pages: Pages) -> Response:
        """The page, or one that says why it cannot be shown: status 503."""
        section, deployment = self._path, self._escrow.deployment
        try:
            rules, code_hash = await self._facts()
        except TallyError as error:
            return unavailable(pages, section, str(error))
        name, coin = CHAINS.get(deployment.chain_id, (f"Chain {deployment.chain_id}", ""))
        facts = {
            "chainId": deployment.chain_id,
            "chainName": name,
            "coin": coin,
            "rpc": self._rpc,
            "escrow": deployment.escrow,
            "token": deployment.token,
            "decimals": deployment.token_decimals,
            "codeHash": "0x" + code_hash,
            "key": self._parties.key,
            "account": self._parties.account,
            "bind": self._parties.bind,
            "meaning": f"{self._path}/{MEANING}",
        }
        meaning = self._explainer(rules, 0).rules()
        return pages.render(TEMPLATE, section=section, facts=facts, facts_json=json.dumps(facts), rules=meaning.sentences)

    def _explainer(self, rules: EscrowRules, now: int) -> StateExplainer:
        decimals = self._escrow.deployment.token_decimals
        return StateExplainer(rules, now, lambda amount: f"{format_amount(Amount(amount), decimals)} dollars")

    async def meaning(self, request: Request) -> Response:
        """GET: what the contract returned to the visitor's wallet, in words. Reads nothing of the chain but the rules."""
        try:
            rules, _ = await self._facts()
        except TallyError as error:
            return _answer({"error": str(error)}, 503)
        try:
            return _answer(self._meaning(rules, request.query_params))
        except (BadMessage, WrongContract) as error:
            return _answer({"error": str(error)}, 400)

    def _meaning(self, rules: EscrowRules, query: Mapping[str, str]) -> dict[str, Any]:
        now = _read_time(query.get("now", ""))
        explain = self._explainer(rules, now)
        answer = dict[str, Any]()
        if "purse" in query:
            purse = purse_of(_read_result("purse", query))
            _check_time(purse.thaw_at)
            answer["purse"] = _in_words(explain.purse(purse), now)
            if "tab" in query:
                tab = tab_of(_read_result("tab", query))
                _check_time(tab.release_at)
                answer["tab"] = _in_words(explain.tab(tab, purse), now)
        if "account" in query:
            provider = provider_of(_read_result("account", query), _read_result("stakeOf", query))
            _check_time(provider.unstake_at)
            answer["account"] = _in_words(explain.provider(provider, parse_address(query.get("address"), "address")), now)
        return answer


def unavailable(pages: Pages, section: str, problem: str) -> Response:
    """The page that says why money cannot be moved here now: status 503."""
    return pages.render(TEMPLATE, 503, section=section, facts=None, problem=problem)


def _read_result(function: str, query: Mapping[str, str]) -> tuple[Any, ...]:
    """Decodes what a function of the contract returned. Raises BadMessage or WrongContract."""
    raw = query.get(function, "")
    try:
        data = parse_data(raw if len(raw) <= 2 + 2 * MAX_RESULT else "")
    except InvalidParams:
        raise BadMessage(f"{function}: expected what the contract returned, 0x and hex digits, got {raw[:40]!r}") from None
    return load_abi("Escrow").result(function, data)


def _read_time(raw: str) -> int:
    if not (raw.isascii() and raw.isdecimal() and len(raw) <= 12):
        raise BadMessage(f"now: expected the chain's time in Unix seconds, got {raw[:40]!r}")
    _check_time(now := int(raw))
    return now


def _check_time(at: int) -> None:
    if at > LAST_SECOND:
        raise BadMessage(f"expected a time before the year 10000, got {at} Unix seconds")


def _in_words(meaning: Explanation, now: int) -> dict[str, Any]:
    steps = [step.to_json() | {"when": moment(step.at, now)} for step in meaning.next_steps]
    return {"state": meaning.state, "says": list(meaning.sentences), "next": steps}


def _answer(content: Mapping[str, Any], status: int = 200) -> Response:
    return JSONResponse(dict(content), status, dict(HEADERS))
