"""`tally start`: from an empty home folder to a first paid answer. It adds only what is missing, so it can be repeated."""

from __future__ import annotations

import asyncio
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from tallystick.cli.local.background import MarketLocation, chain_id, ensure_deployment, is_deployed
from tallystick.cli.local.services import GAS_MONEY, prepare_embedded_engine
from tallystick.cli.options import (
    DEFAULT_WALLET,
    Config,
    CoordinatorUrl,
    DeploymentFile,
    Json,
    PasswordFile,
    StandIn,
    Wallet,
    prompt_password,
    unlock,
)
from tallystick.cli.output import dollars, err, note, show_json, show_table, step
from tallystick.protocol.errors import BadMessage, TallyError
from tallystick.protocol.types import Amount, format_amount, parse_address
from tallystick.runtime.config import home
from tallystick.runtime.keystore import create_keystore, find_password, keystore_address, keystore_path

if TYPE_CHECKING:
    from tallystick.chain.escrow import Escrow
    from tallystick.client.config import ClientConfig
    from tallystick.protocol.eip712 import Signer

PROMPT = "In one sentence: what is the capital of France?"
TARGET_PURSE, MIN_PURSE = Amount(10_000_000), Amount(1_000_000)
"""A purse with less than the second amount is filled to the first."""


@dataclass(frozen=True, slots=True)
class Prerequisite:
    """Something that a first answer needs: whether it is ready, details, and what to do if it is missing."""

    name: str
    ready: bool
    detail: str
    remedy: str


def start(
    prompt: Annotated[str, typer.Argument(help="First question.")] = PROMPT,
    coordinator_url: CoordinatorUrl = None,
    deployment: DeploymentFile = None,
    stop: Annotated[bool, typer.Option("--stop", help="Stop the local market that an earlier run left running.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before adding what is missing.")] = False,
    config: Config = None,
    wallet: Wallet = DEFAULT_WALLET,
    password_file: PasswordFile = None,
    stand_in: StandIn = False,
    supervise: Annotated[bool, typer.Option("--supervise", hidden=True)] = False,
    embedded_engine: Annotated[Path | None, typer.Option(hidden=True)] = None,
    as_json: Json = False,
) -> None:
    """Get a first paid answer: check what is missing, add it, and ask a question.

    On this machine, with play money, it adds a wallet, chain, contracts, coins, deposit, coordinator and node. For a market
    elsewhere it changes nothing and lists what to do. The local market runs in the background until `tally start --stop`.
    """
    from tallystick.cli.local import background
    from tallystick.client.config import load_config

    if stop:
        stopped = background.stop()
        if as_json:
            show_json({"stopped": stopped})
        else:
            step("the local market is stopped" if stopped else "no local market is running")
        return
    loaded = load_config(config, {"coordinator": coordinator_url})
    path = deployment or loaded.deployment or home() / "deployment.json"
    location = MarketLocation(loaded.coordinator.rstrip("/"), path)
    if supervise:
        asyncio.run(background.supervise(location, embedded_engine))
        return
    prerequisites = asyncio.run(check(location, wallet))
    if not location.is_local:
        _show_remote(prerequisites, as_json=as_json)
        return
    missing = [item for item in prerequisites if not item.ready]
    if not as_json:
        _show_local(prerequisites)
        if missing and not yes:
            typer.confirm("Add what is missing?", default=True, abort=True, err=True)
    signer = _open_or_create(wallet, password_file)
    names = [item.name for item in missing]
    asyncio.run(_complete(location, loaded, signer, names, prompt, stand_in=stand_in, as_json=as_json))


async def check(location: MarketLocation, wallet: str) -> list[Prerequisite]:
    """The prerequisites of a first answer, in the order in which they are needed. Raises BadMessage for damaged files."""
    from tallystick.chain.endpoint import Rpc
    from tallystick.chain.escrow import Escrow

    path, loaded = keystore_path(wallet), location.load_deployment()
    address = parse_address(keystore_address(path)) if path.exists() else None
    rpc = Rpc(location.rpc)
    try:
        chain = await chain_id(rpc)
        deployed = chain is not None and loaded is not None and chain == loaded.chain_id and await is_deployed(rpc, loaded)
        coins = await rpc.balance(address) if chain is not None and address else 0
        purse = await Escrow(rpc, loaded).purse(address) if deployed and loaded and address else None
    finally:
        await rpc.close()
    free = Amount(0) if purse is None else Amount(purse.free - purse.thawing)
    reachable, models = await _models_on_offer(location.coordinator)
    remedies = _remedies(location, wallet, address)
    chain_detail = f"{rpc.shown_url} (chain {chain})" if chain is not None else f"{rpc.shown_url} does not answer"
    if loaded is None and not location.is_local:
        chain, chain_detail = None, "unknown: the deployment file names it"
    states = {
        "wallet": (address is not None, str(address or "none")),
        "chain": (chain is not None, chain_detail),
        "contracts": (deployed, str(loaded.escrow) if deployed and loaded else "none on that chain"),
        "coins": (coins > 0, f"{format_amount(coins, 18)} for gas"),
        "purse": (free >= MIN_PURSE, f"{dollars(free)} free"),
        "coordinator": (reachable, location.coordinator + ("" if reachable else " does not answer")),
        "offers": (bool(models), ", ".join(models)[:80] or "no provider sells a model there now"),
    }
    return [Prerequisite(name, ready, detail, remedies[name]) for name, (ready, detail) in states.items()]


async def _models_on_offer(coordinator_url: str) -> tuple[bool, list[str]]:
    """Whether a coordinator answers, and the models on offer there."""
    from tallystick.client.config import ClientConfig
    from tallystick.client.coordinator.http_client import CoordinatorClient

    try:
        async with CoordinatorClient(coordinator_url, ClientConfig(connect_seconds=2, request_seconds=5)) as coordinator:
            await coordinator.info()
            return True, [offer.id for offer in await coordinator.models()]
    except TallyError:
        return False, []


def _remedies(location: MarketLocation, wallet: str, address: str | None) -> dict[str, str]:
    """What to do by hand if a prerequisite is missing, by its name."""
    wallet_option = "" if wallet == DEFAULT_WALLET else f" --wallet {wallet}"
    common = {"wallet": f"tally wallet new {wallet}", "purse": f"tally deposit 10{wallet_option}"}
    if location.is_local:
        return common | {
            "chain": "tally chain",
            "contracts": "tally deploy --dev-account 0 --short-waits",
            "coins": f"tally chain fund {wallet}",
            "purse": f"{common['purse']} --mint",
            "coordinator": "tally coordinator run",
            "offers": "tally node run",
        }
    return common | {
        "chain": "make sure that this machine can reach the chain of the deployment file",
        "contracts": f"get the deployment file {location.deployment} from the market's operator",
        "coins": f"send some of that chain's coins to {address or 'the wallet'}",
        "purse": f"send dollars to {address or 'the wallet'}, then: {common['purse']}",
        "coordinator": "check its URL (--coordinator), or ask its operator",
        "offers": "wait until a provider connects",
    }


def _show_local(prerequisites: list[Prerequisite]) -> None:
    rows = [(item.name, "✓" if item.ready else "will be added", item.detail) for item in prerequisites]
    show_table(("prerequisite", "state", "now"), rows, title="A market on this machine, with play money")


def _show_remote(prerequisites: list[Prerequisite], *, as_json: bool) -> None:
    """Lists what to do for a market that may have real money."""
    commands = _next_commands(prerequisites)
    if as_json:
        show_json({"local": False, "prerequisites": [asdict(item) for item in prerequisites], "next": commands})
        return
    rows = [
        (item.name, "✓" if item.ready else "missing", item.detail, "" if item.ready else item.remedy) for item in prerequisites
    ]
    title = "A market elsewhere: nothing is changed for you"
    show_table(("prerequisite", "state", "now", "what to do"), rows, title=title)
    for command in commands:
        note(f"next: {command}")


def _next_commands(prerequisites: list[Prerequisite]) -> list[str]:
    remedies = [item.remedy for item in prerequisites if not item.ready]
    return remedies[:1] or ["tally chat", "tally gateway"]


def _open_or_create(wallet: str, password_file: Path | None) -> Signer:
    """The signer of a wallet, which is made if it does not exist. Raises BadMessage."""
    path = keystore_path(wallet)
    if path.exists():
        return unlock(wallet, password_file)
    signer = create_keystore(path, find_password(password_file, lambda: prompt_password(wallet, confirm=True)))
    step(f"made wallet {wallet} in {path}; keep the file and its password safe: the wallet signs for your money")
    return signer


async def _complete(
    location: MarketLocation,
    config: ClientConfig,
    signer: Signer,
    missing: list[str],
    prompt: str,
    *,
    stand_in: bool,
    as_json: bool,
) -> None:
    """Adds what is missing, then asks the question. Raises TallyError."""
    from tallystick.chain.endpoint import Rpc
    from tallystick.chain.escrow import Escrow
    from tallystick.cli.local import background

    if {"chain", "coordinator", "offers"} & set(missing):
        if background.running() is not None:
            raise BadMessage(
                f"the local market is running, but these parts are missing: {', '.join(missing)}. Stop it with "
                "`tally start --stop`, then run `tally start` again"
            )
        embedded = None if stand_in else await prepare_embedded_engine()
        await background.spawn(location, embedded)
    rpc = Rpc(location.rpc)
    try:
        escrow = Escrow(rpc, await ensure_deployment(rpc, location))
        await _fund(escrow, signer, location)
    finally:
        await rpc.close()
    answer = await _ask(config, signer, prompt, as_json=as_json)
    commands = ["tally chat", "tally gateway", "tally balance", "tally spending", "tally start --stop"]
    if as_json:
        show_json({"local": True, "done": missing, "answer": answer, "next": commands})
        return
    purposes = (
        "start a conversation",
        "serve an OpenAI-compatible API for your programs",
        "show where your money is",
        "show what you paid",
        "stop the local market",
    )
    show_table(("next command", "purpose"), zip(commands, purposes, strict=True))


async def _fund(escrow: Escrow, signer: Signer, location: MarketLocation) -> None:
    """Gives the wallet coins for gas and test dollars in its purse. Raises TallyError."""
    from tallystick.chain.devnet import dev_accounts
    from tallystick.chain.sender import Sender
    from tallystick.cli.money.purse import fund_purse

    if not location.is_local:  # the deployment file may have changed since the check
        raise BadMessage(f"{location.deployment}: no longer a local market with play money; run `tally start` again")
    rpc = escrow.rpc
    if await rpc.balance(signer.address) == 0:
        await Sender(rpc, dev_accounts()[0]).send(signer.address, b"", value=GAS_MONEY)
        step(f"{signer.address} has coins for gas")
    purse = await escrow.purse(signer.address)
    free = purse.free - purse.thawing
    if free < MIN_PURSE:
        await fund_purse(escrow, Sender(rpc, signer), signer, Amount(TARGET_PURSE - free), mint=True)
        step(f"the purse has {format_amount(TARGET_PURSE)} test dollars")


async def _ask(config: ClientConfig, signer: Signer, prompt: str, *, as_json: bool) -> dict[str, Any] | None:
    """Asks the first model on offer. Returns the answer for JSON; otherwise shows it while it streams and returns None."""
    from tallystick.cli.chat.chat import first_model
    from tallystick.cli.chat.chat_options import ChatOptions
    from tallystick.cli.chat.conversations import Conversation
    from tallystick.cli.chat.turn import Turns
    from tallystick.client.sdk.market import Market

    async with Market.of(config, signer) as market:
        model = await first_model(market)
        if as_json:
            result = await market.chat(model, [{"role": "user", "content": prompt}])
            fields = {"job": result.job.hex(), "provider": result.provider, "cost": str(int(result.cost))}
            return fields | {"model": model, "text": result.text}
        err.print(f"[bold cyan]you >[/] {escape(prompt)}", highlight=False)
        options = ChatOptions({}, None, plain=False, as_json=False, keep_history=False)
        await Turns(market, options, Conversation(model)).take(prompt)
    return None
