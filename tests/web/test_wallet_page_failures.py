"""What can go wrong on the wallet page: nothing is sent that the owner did not see, and the page says what to do."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

import pytest

from tallystick.protocol.types import Amount
from tests.chain.harness import DOLLAR, World, person
from tests.web.browser import needs_browser
from tests.web.injected_wallet import REJECTED, InjectedWallet, answers, nested
from tests.web.wallet_desk import Desk, desk

pytestmark = needs_browser


async def _opened(world: World, at: Desk) -> None:
    """Opens the owner's own purse, and connects."""
    await world.purse(at.owner, at.owner, 0)
    await at.connect()


def _always(result: Any, _params: list[Any]) -> Any:
    return result


async def test_declined(world: World) -> None:
    """Declining in the connection, in the review, at the permit and at the transaction moves nothing, and the page says so."""
    async with desk(world) as at:
        at.wallet.behaviours["eth_requestAccounts"] = answers(**REJECTED)
        await at.open()
        await at.page.click("#wallets button")
        await at.says("You declined in the wallet", "#connection")
        at.wallet.behaviours.clear()
        await _opened(world, at)
        await at.start("deposit", "1")
        await at.page.wait_for_selector("#review[open]")
        await at.page.keyboard.press("Escape")
        await at.says("Nothing was signed or sent")
        await at.idle()
        for method in ("eth_signTypedData_v4", "eth_sendTransaction"):
            for error in nested(REJECTED):
                at.wallet.behaviours = {method: answers(**error)}
                await at.start("deposit", "1")
                await at.agree()
                await at.says("You declined in the wallet")
                await at.idle()
        assert not at.wallet.sent
        assert (await world.escrow.purse(at.owner.address)).free == 0


async def test_wrong_chain(world: World) -> None:
    """Nothing can be signed on another chain. The page asks the wallet to switch, and to add the chain if it does not know it."""
    async with desk(world) as at:
        at.wallet.chain_id = 1
        added = list[Any]()

        def add(params: list[Any]) -> None:
            added.append(params[0])
            at.wallet.chain_id = None

        await at.open()
        await at.page.click("#wallets button")
        await at.says("is on chain 1, but this market is on Local test chain (chain 31337)", "#connection")
        assert await at.page.locator("#state").is_hidden()
        at.wallet.behaviours["wallet_switchEthereumChain"] = answers(**REJECTED)
        await at.page.click("#switch")
        await at.says("You declined in the wallet", "#connection")
        at.wallet.behaviours["wallet_addEthereumChain"] = add
        for error in nested({"code": 4902, "message": "Unrecognized chain ID"}):
            at.wallet.behaviours["wallet_switchEthereumChain"] = answers(**error)
            await at.page.click("#switch")
            await at.says("Connected:", "#connection")
            at.wallet.chain_id = 1
            await at.wallet.emit(at.page, "chainChanged", "0x1")
            await at.says("is on chain 1", "#connection")
        assert [chain["chainId"] for chain in added] == ["0x7a69"] * 4
        assert added[0]["rpcUrls"] == [world.rpc.url]
        assert not at.wallet.sent


async def test_changed_meanwhile(world: World) -> None:
    """If account or chain change after the owner began, the review closes, and nothing is signed for the other one."""
    other = person("second account")
    async with desk(world) as at:
        await _opened(world, at)
        at.wallet.accounts.append(other)
        await at.start("deposit", "1")
        await at.page.wait_for_selector("#review[open]")
        await at.wallet.select(at.page, other)
        await at.says("the wallet's account changed")
        await at.says(other.address, "#connection")
        await at.idle()
        await at.wallet.select(at.page, at.owner)
        await at.says(at.owner.address, "#connection")
        await at.start("deposit", "1")
        await at.page.wait_for_selector("#review[open]")
        at.wallet.chain_id = 5  # without an event: some wallets send none
        await at.agree()
        await at.says("the wallet is on chain 5 now")
        at.wallet.chain_id = None
        at.wallet.accounts.reverse()
        await at.idle()
        await at.start("deposit", "1")
        await at.says("the wallet's account changed")
        assert not at.wallet.sent
        assert "eth_signTypedData_v4" not in at.wallet.asked


async def test_one_click_one_transaction(world: World) -> None:
    """A double click, Enter held down, and a second tab send once."""
    async with desk(world) as at:
        await _opened(world, at)
        at.wallet.gate = asyncio.Event()
        await at.start("deposit", "0")
        await at.says("expected more than 0")
        await at.idle()
        await at.page.fill("form[data-call='deposit'] [name='amount']", "")
        await at.page.evaluate(
            "for (let i = 0; i < 5; i++) document.querySelector(\"form[data-call='deposit']\").requestSubmit()"
        )
        await at.says("expected dollars")
        await at.start("deposit", "1")
        await at.page.wait_for_selector("#review[open]")
        await at.page.evaluate(
            "for (let i = 0; i < 5; i++) document.querySelector(\"form[data-call='deposit']\").requestSubmit()"
        )
        await at.agree()
        await at.says("Waiting for Test Wallet")
        second = await at.page.context.new_page()
        wallet = InjectedWallet(world.rpc, [at.owner], connected=True)
        await wallet.install(second)
        tab = Desk(world, second, wallet, at.owner, at.key)
        await tab.connect()
        await tab.start("deposit", "1")
        await tab.says("Another tab of this page is at work")
        at.wallet.gate.set()
        await at.says("Done.")
        assert (len(at.wallet.sent), wallet.sent) == (1, [])


async def test_amounts(world: World) -> None:
    """Amounts are whole base units. What could be read in two ways, or not at all, is refused, and the page says why."""
    refused = {
        "1,5": "Commas and spaces",
        "1.000,50": "Commas and spaces",
        "1,000.50": "Commas and spaces",
        "1 000": "Commas and spaces",
        "1'000": "Commas and spaces",
        "": "got nothing",
        "   ": "got nothing",
        "0": "more than 0",
        "0.000000": "more than 0",
        "0.0000001": "at most 6 digits",
        "1.2345678": "at most 6 digits",
        "-1": "as digits",
        "+1": "as digits",
        "1e3": "as digits",
        "0x10": "as digits",
        "1.": "as digits",
        ".5": "as digits",
        "1.2.3": "as digits",
        "Infinity": "as digits",
        "NaN": "as digits",
        "$5": "as digits",
        "\N{ARABIC-INDIC DIGIT FIVE}": "as digits",
        "\N{FULLWIDTH DIGIT FIVE}": "as digits",
        str(2**96): "more than the contract can hold",
        "9" * 500: "more than the contract can hold",
    }
    async with desk(world) as at:
        await _opened(world, at)
        for text, why in refused.items():
            await at.start("deposit", text or " ")
            await at.says(why)
            await at.idle()
        assert "eth_signTypedData_v4" not in at.wallet.asked
        taken = {"0.1": 100_000, "0.3": 300_000, "1.10": 1_100_000, " 2 ": 2_000_000, "007.000001": 7_000_001, "1.0000000": 10**6}
        for text, units in taken.items():
            await at.start("deposit", text)
            await at.page.wait_for_selector("#review[open]")
            assert f"({units} base units)" in await at.page.inner_text("#review")
            await at.page.keyboard.press("Escape")
            await at.idle()


async def test_no_gas(world: World) -> None:
    """An account without coins is told so before it signs; so is one whose wallet finds out."""
    async with desk(world) as at:
        await _opened(world, at)
        at.wallet.behaviours["eth_getBalance"] = lambda _params: "0x0"
        for call, amount in (("deposit", "1"), ("stake", "1")):
            await at.start(call, amount)
            await at.says("too little ETH to pay for gas")
            await at.idle()
        assert "eth_signTypedData_v4" not in at.wallet.asked
        at.wallet.behaviours = {"eth_sendTransaction": answers(code=-32000, message="insufficient funds for gas * price + value")}
        await at.start("stake", "1")
        await at.agree()
        await at.says("to pay for gas")


async def test_another_contract(world: World) -> None:
    """If the wallet's node shows other code at the address, as a fork with the same chain id does, nothing can be signed."""
    async with desk(world) as at:
        for code, why in (("0x", "has no contract at"), ("0x6001", "its code differs")):
            at.wallet.behaviours["eth_getCode"] = partial(_always, code)
            await at.open()
            await at.page.click("#wallets button")
            await at.says(why, "#connection")
            assert await at.page.locator("#state").is_hidden()


async def test_reload_meanwhile(world: World) -> None:
    """A transaction that is under way when the page is reloaded is followed to its end, and a request without an answer named."""
    async with desk(world) as at:
        await _opened(world, at)
        raws = list[str]()

        async def later(params: list[Any]) -> str:
            raw, hash_ = await at.wallet.signed(params[0])
            raws.append(raw)
            return hash_

        at.wallet.behaviours["eth_sendTransaction"] = later
        await world.give(at.owner.address, DOLLAR)
        await at.start("stake", "1")
        await at.agree()
        await at.says("Waiting for a block")
        await at.page.reload()
        await at.says("Sent: Allow exactly 1 dollars")
        assert await at.page.locator("form[data-call='stake'] button").is_disabled()
        await at.wallet.forward("eth_sendRawTransaction", raws)
        await at.says("The approval is there. Stake again; it is used then.")
        at.wallet.behaviours.clear()
        await at.idle()
        assert "approve" not in await at.do("stake", "1")
        at.wallet.gate = asyncio.Event()
        await at.start("stake", "2")
        await at.agree()
        await at.says("Waiting for Test Wallet")
        await at.page.reload()
        await at.says("The page was left while the wallet asked")
        at.wallet.behaviours["eth_sendTransaction"] = answers(**REJECTED)
        at.wallet.gate.set()


async def test_an_error_that_came_after_the_sending(world: World) -> None:
    """The owner is told to look before trying again, also after a reload and in the next review, until a transaction is mined."""
    async with desk(world) as at:
        await _opened(world, at)
        kinds: list[Any] = [
            answers(code=-32603, message="Internal JSON-RPC error."),
            answers(code=4900, message="disconnected"),
            answers(code=-32000, message="timeout"),
            answers(message="x"),
            partial(_always, None),
            partial(_always, "0x12"),
        ]
        doubt = "It may have been sent: look into the wallet's activity before you try again."
        for behave in kinds:

            async def sends(params: list[Any], behave: Any = behave) -> Any:
                await at.wallet.forward("eth_sendRawTransaction", [(await at.wallet.signed(params[0]))[0]])
                return behave(params)

            at.wallet.behaviours = {"eth_sendTransaction": sends}
            await at.start("setPayout", payout=person("cold").address)
            await at.agree()
            assert "Set the payout address: The wallet" in await at.says(doubt)
            await at.idle()
        at.wallet.behaviours = {"eth_sendTransaction": answers(**REJECTED)}
        await at.start("setPayout", payout=person("cold").address)
        assert doubt in await at.agree()
        await at.says("You declined in the wallet")
        await at.idle()
        at.wallet.behaviours.clear()
        await at.page.reload()
        await at.says(doubt)
        await at.start("setPayout", payout=person("colder").address)
        assert doubt in await at.agree()
        await at.says("Done.")
        await at.idle()
        await at.start("setPayout", payout=person("cold").address)
        assert doubt not in await at.agree()


async def test_a_page_for_anyone_says_that_it_vouches_for_itself(world: World) -> None:
    """The page of the owner's own gateway needs no such warning."""
    for key, shown in ((None, 1), (person("hot"), 0)):
        async with desk(world, key=key) as at:
            await at.open()
            assert await at.page.locator("#stranger").count() == shown


@pytest.mark.parametrize("kind", ["faster", "cancelled", "stopped"])
async def test_replaced(world: World, kind: str) -> None:
    """A transaction that the wallet sent again is followed; one that it cancelled is told; the owner may stop waiting."""
    async with desk(world) as at:
        await _opened(world, at)
        given = list[dict[str, Any]]()

        async def unsent(params: list[Any]) -> str:
            given.append(params[0])
            return (await at.wallet.signed(params[0]))[1]

        at.wallet.behaviours["eth_sendTransaction"] = unsent
        await at.start("setPayout", payout=person("cold").address)
        await at.agree()
        await at.says("Waiting for a block")
        if kind == "stopped":
            await at.page.click("#stop")
            await at.says("You stopped waiting")
            return
        other = given[0] if kind == "faster" else given[0] | {"to": at.owner.address, "data": "0x"}
        at.wallet.gas_price_factor = 4
        raw, hash_ = await at.wallet.signed(other)
        await at.wallet.forward("eth_sendRawTransaction", [raw])
        if kind == "faster":
            await at.says("Done.")
        else:
            assert hash_ in await at.says("It was replaced or cancelled")


async def test_failed_on_chain(world: World) -> None:
    """A transaction that was mined but failed names the contract's reason."""
    async with desk(world) as at:
        await world.purse(at.owner, at.owner, 5 * DOLLAR)
        await world.escrow.thaw(world.senders[at.owner.address], at.owner.address, Amount(DOLLAR))
        await at.connect()
        at.wallet.gate = asyncio.Event()
        at.wallet.gas = 200_000
        await at.start("cancelThaw")
        await at.agree()
        await at.says("Waiting for Test Wallet")
        await world.escrow.cancel_thaw(world.senders[at.owner.address], at.owner.address)
        at.wallet.gate.set()
        text = await at.says("It was mined, but failed")
        assert "Nothing is thawing" in text


async def test_hostile_announcements(world: World) -> None:
    """Several wallets can be chosen from. Announcements that are none are ignored, and names are text."""
    async with desk(world) as at:
        hostile = """(() => {
            const tell = (detail) => window.dispatchEvent(new CustomEvent("eip6963:announceProvider", {detail}));
            const provider = {request: async () => { throw new Error("no"); }};
            window.addEventListener("eip6963:requestProvider", () => {
                for (const detail of [null, undefined, 1, {}, {info: null, provider}, {info: {}, provider},
                    {info: {uuid: "a", name: 1, rdns: "x", icon: "y"}, provider},
                    {info: {uuid: "b", name: "no provider", rdns: "x", icon: "y"}},
                ]) tell(detail);
                const icon = "javascript:document.title='taken'";
                tell({info: {uuid: "c", name: "<img src=x onerror=document.title='taken'>", rdns: "c", icon}, provider});
            });
        })()"""
        await at.page.add_init_script(hostile)
        await at.connect()
        names = await at.page.locator("#wallets button").all_inner_texts()
        assert sorted(name.strip() for name in names) == ["<img src=x onerror=document.title='taken'>", "Test Wallet"]
        assert await at.page.title() == "Wallet \N{MIDDLE DOT} Test"
        await at.page.click("#wallets button:has-text('onerror')")
        await at.says("The wallet answered: no", "#connection")


async def test_of_another_owner(world: World) -> None:
    """Whoever does not own a purse is shown who does, and no form; addresses with a wrong checksum are refused."""
    stranger = person("owner of another purse")
    async with desk(world) as at:
        await world.purse(stranger, stranger, DOLLAR)
        await at.connect()
        for text, why in (("0x12", "40 hex digits"), ("0x" + "0" * 40, "zero address"), ("0xAb" + "aB" * 19, "checksum")):
            await at.page.fill("#key", text)
            await at.page.click("#key-form button")
            await at.says(why, "#key-problem")
        await at.page.fill("#key", stranger.address)
        await at.page.click("#key-form button")
        shown = await at.says("This purse belongs to", "#purse-note")
        assert stranger.address in shown.lower()
        for call in ("deposit", "thaw"):
            assert await at.page.locator(f"form[data-call='{call}']").is_hidden()


async def test_what_is_sent(world: World) -> None:
    """Transactions carry no coins, name the chain, and go to the contract or its token alone."""
    async with desk(world) as at:
        await at.connect()
        await at.do("open")
        await at.do("stake", "1")
        assert [(sent["value"], sent["chainId"]) for sent in at.wallet.sent] == [("0x0", "0x7a69")] * 3
        addresses = [sent["to"].lower() for sent in at.wallet.sent]
        assert addresses == [world.deployment.escrow, world.deployment.token, world.deployment.escrow]
