"""`tally start`: from nothing to a first paid answer. It does what is missing and nothing else, so it can be run again."""

from __future__ import annotations

import asyncio
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from tallystick.cli.local.background import Place, chain_id, on_chain, settle_place
from tallystick.cli.local.services import GAS_MONEY
from tallystick.cli.options import DEFAULT_WALLET, Config, Json, PasswordFile, Wallet, prompt_password, unlock
from tallystick.cli.output import err, show_json, show_rows, step
from tallystick.protocol.errors import BadMessage, TallyError
from tallystick.protocol.types import Amount, format_amount, parse_address
from tallystick.runtime.config import home
from tallystick.runtime.keystore import create_keystore, find_password, keystore_address, keystore_path

if TYPE_CHECKING:
    from tallystick.chain.escrow import Escrow
    from tallystick.client.config import ClientConfig
    from tallystick.protocol.eip712 import Signer

PROMPT = "In one sentence: what is a split tally stick, and why did both sides keep a half?"
PURSE, LEAST = Amount(10_000_000), Amount(1_000_000)
"""A purse is filled to the first when it has less than the second."""


@dataclass(frozen=True, slots=True)
class Part:
    """One thing that a first answer needs: whether it is there, what is known of it, and what to do where it is not."""

    name: str
    there: bool
    says: str
    todo: str


def start(
    prompt: Annotated[str, typer.Argument(help="The first question.")] = PROMPT,
    coordinator_url: Annotated[str | None, typer.Option("--coordinator", help="The coordinator's address.")] = None,
    deployment: Annotated[Path | None, typer.Option(help="Deployment file; the config's or the home folder's else.")] = None,
    stop: Annotated[bool, typer.Option("--stop", help="Stop the local market that an earlier start left running.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before doing it.")] = False,
    config: Config = None,
    wallet: Wallet = DEFAULT_WALLET,
    password_file: PasswordFile = None,
    keep: Annotated[bool, typer.Option("--supervise", hidden=True)] = False,
    as_json: Json = False,
) -> None:
    """Brings you to a first paid answer: looks what is missing, says what it will do, does it, and asks.

    That is a wallet, and a chain, contracts, coins, a deposit, a coordinator and a node on this machine, with play money. For a
    market elsewhere it does nothing and says what to do. The local market goes on in the background, until `tally start --stop`.
    """
    from tallystick.cli.local import background
    from tallystick.client.config import load_config

    if stop:
        stopped = background.stop()
        if as_json:
            show_json({"stopped": stopped})
        else:
            step("the local market is stopped" if stopped else "no local market runs")
        return
    loaded = load_config(config, {"coordinator": coordinator_url})
    path = deployment or loaded.deployment or home() / "deployment.json"
    place = Place(loaded.coordinator.rstrip("/"), path)
    if keep:
        asyncio.run(background.keep(place))
        return
    parts = asyncio.run(look(place, wallet))
    if not place.is_local:
        _guide(parts, as_json=as_json)
        return
    missing = [part for part in parts if not part.there]
    if not as_json:
        _show(parts)
        if missing and not yes:
            typer.confirm("Do what is missing?", default=True, abort=True, err=True)
    signer = _signer(wallet, password_file)
    asyncio.run(_do(place, loaded, signer, [part.name for part in missing], prompt, as_json=as_json))


async def look(place: Place, wallet: str) -> list[Part]:
    """What is there and what is not, in the order in which it is needed. Raises BadMessage for damaged files."""
    from tallystick.chain.endpoint import Rpc
    from tallystick.chain.escrow import Escrow

    path, known = keystore_path(wallet), place.known()
    address = parse_address(keystore_address(path)) if path.exists() else None
    rpc = Rpc(place.rpc)
    try:
        chain = await chain_id(rpc)
        there = chain is not None and known is not None and chain == known.chain_id and await on_chain(rpc, known)
        coins = await rpc.balance(address) if chain is not None and address else 0
        purse = await Escrow(rpc, known).purse(address) if there and known and address else None
    finally:
        await rpc.close()
    free = Amount(0) if purse is None else Amount(purse.free - purse.thawing)
    answers, offers = await _offers(place.coordinator)
    todo = _todo(place, wallet, address)
    reached = f"{place.rpc} (chain {chain})" if chain is not None else f"{place.rpc} does not answer"
    if known is None and not place.is_local:
        chain, reached = None, "which one, the deployment file says"
    found = {
        "wallet": (address is not None, str(address or "none")),
        "chain": (chain is not None, reached),
        "contracts": (there, str(known.escrow) if there and known else "none on that chain"),
        "coins": (coins > 0, f"{format_amount(coins, 18)} for gas"),
        "purse": (free >= LEAST, f"{format_amount(free)} dollars free"),
        "coordinator": (answers, place.coordinator + ("" if answers else " does not answer")),
        "offers": (bool(offers), ", ".join(offers)[:80] or "nobody sells there now"),
    }
    return [Part(name, is_there, says, todo[name]) for name, (is_there, says) in found.items()]


async def _offers(coordinator: str) -> tuple[bool, list[str]]:
    """Whether a coordinator answers, and the models on offer there."""
    from tallystick.client.config import ClientConfig
    from tallystick.client.coordinator.http_client import CoordinatorClient

    try:
        async with CoordinatorClient(coordinator, ClientConfig(connect_seconds=2, request_seconds=5)) as asked:
            await asked.info()
            return True, [offer.id for offer in await asked.models()]
    except TallyError:
        return False, []


def _todo(place: Place, wallet: str, address: str | None) -> dict[str, str]:
    """How each part is made by hand."""
    named = "" if wallet == DEFAULT_WALLET else f" --wallet {wallet}"
    common = {"wallet": f"tally wallet new {wallet}", "purse": f"tally deposit 10{named}"}
    if place.is_local:
        return common | {
            "chain": "tally chain",
            "contracts": "tally deploy --dev-account 0 --short-waits",
            "coins": f"tally chain fund {wallet}",
            "purse": f"{common['purse']} --mint",
            "coordinator": "tally coordinator run",
            "offers": "tally node run",
        }
    return common | {
        "chain": "the deployment file names it; it must be reachable from here",
        "contracts": f"ask the market's operator for the file {place.deployment}",
        "coins": f"send some of that chain's coins to {address or 'the wallet'}",
        "purse": f"send dollars to {address or 'the wallet'}, then: {common['purse']}",
        "coordinator": "check its address (--coordinator), or ask its operator",
        "offers": "wait until somebody sells there",
    }


def _show(parts: list[Part]) -> None:
    rows = [(part.name, "✓" if part.there else "will be made", part.says) for part in parts]
    show_rows(("what a first answer needs", "", "now"), rows, title="A market on this machine, with play money")


def _guide(parts: list[Part], *, as_json: bool) -> None:
    """For a market with real money: nothing is done, all is said."""
    if as_json:
        show_json({"local": False, "parts": [asdict(part) for part in parts], "next": _next(parts)})
        return
    rows = [(part.name, "✓" if part.there else "missing", part.says, "" if part.there else part.todo) for part in parts]
    show_rows(("what a first answer needs", "", "now", "to do"), rows, title="A market elsewhere: nothing is done for you")
    for command in _next(parts):
        err.print(f"next: {escape(command)}", highlight=False, soft_wrap=True)


def _next(parts: list[Part]) -> list[str]:
    missing = [part.todo for part in parts if not part.there]
    return missing[:1] or ["tally chat", "tally gateway"]


def _signer(wallet: str, password_file: Path | None) -> Signer:
    """The wallet's, made if there is none. Raises BadMessage."""
    path = keystore_path(wallet)
    if path.exists():
        return unlock(wallet, password_file)
    signer = create_keystore(path, find_password(password_file, lambda: prompt_password(wallet, confirm=True)))
    step(f"made wallet {wallet} in {path}; keep it and its password safe: it signs for your money")
    return signer


async def _do(place: Place, config: ClientConfig, signer: Signer, missing: list[str], prompt: str, *, as_json: bool) -> None:
    """What is missing, then the answer. Raises TallyError."""
    from tallystick.chain.endpoint import Rpc
    from tallystick.chain.escrow import Escrow
    from tallystick.cli.local import background

    if {"chain", "coordinator", "offers"} & set(missing):
        if background.running() is not None:
            raise BadMessage("the local market runs, but a part of it is missing; stop it with `tally start --stop`, then again")
        await background.spawn(place)
    rpc = Rpc(place.rpc)
    try:
        escrow = Escrow(rpc, await settle_place(rpc, place))
        await _fill(escrow, signer, place)
    finally:
        await rpc.close()
    answer = await _ask(config, signer, prompt, as_json=as_json)
    commands = ["tally chat", "tally gateway", "tally balance", "tally spending", "tally start --stop"]
    if as_json:
        show_json({"local": True, "done": missing, "answer": answer, "next": commands})
        return
    why = ("a conversation", "an OpenAI API for your programs", "where your money is", "what you paid", "end of the local market")
    show_rows(("next", ""), zip(commands, why, strict=True))


async def _fill(escrow: Escrow, signer: Signer, place: Place) -> None:
    """Coins for gas and dollars in the purse, both play money."""
    from tallystick.chain.devnet import dev_accounts
    from tallystick.chain.sender import Sender
    from tallystick.cli.money.balance import fill_purse

    if not place.is_local:  # it was; the file changed meanwhile
        raise BadMessage("only play money is made here")
    rpc = escrow.rpc
    if await rpc.balance(signer.address) == 0:
        await Sender(rpc, dev_accounts()[0]).send(signer.address, b"", value=GAS_MONEY)
        step(f"{signer.address} has coins for gas")
    purse = await escrow.purse(signer.address)
    free = purse.free - purse.thawing
    if free < LEAST:
        await fill_purse(escrow, Sender(rpc, signer), signer, Amount(PURSE - free), mint=True)
        step(f"the purse has {format_amount(PURSE)} test dollars")


async def _ask(config: ClientConfig, signer: Signer, prompt: str, *, as_json: bool) -> dict[str, Any] | None:
    """The paid answer: as JSON, or shown as it comes."""
    from tallystick.cli.chat.chat import first_model
    from tallystick.cli.chat.chat_options import ChatOptions
    from tallystick.cli.chat.conversations import Conversation
    from tallystick.cli.chat.turn import Turns
    from tallystick.client.sdk.market import Market

    async with Market.of(config, signer) as market:
        model = await first_model(market)
        if as_json:
            result = await market.chat(model, [{"role": "user", "content": prompt}])
            known = {"job": result.job.hex(), "provider": result.provider, "cost": str(int(result.cost))}
            return known | {"model": model, "text": result.text}
        err.print(f"[bold cyan]you >[/] {escape(prompt)}", highlight=False)
        manner = ChatOptions({}, None, plain=False, as_json=False, keep=False)
        await Turns(market, manner, Conversation(model)).take(prompt)
    return None
