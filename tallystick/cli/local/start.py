"""`tally start`: from an empty home folder to a first paid answer. It adds only what is missing, so it can be repeated."""

from __future__ import annotations

import asyncio
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from tallystick.cli.local.market_location import MarketLocation, MarketState, inspect_market, refuse_foreign
from tallystick.cli.local.services import GAS_MONEY, prepare_embedded_engine
from tallystick.cli.onchain import held_by_escrow
from tallystick.cli.options import (
    DEFAULT_WALLET,
    Config,
    CoordinatorUrl,
    DeploymentFile,
    Json,
    PasswordFile,
    StandIn,
    Wallet,
    unlock,
)
from tallystick.cli.output import dollars, err, note, show_json, show_table, step
from tallystick.cli.progress import activity, run_shown
from tallystick.cli.prompts import choose_password
from tallystick.protocol.errors import BadMessage, TallyError
from tallystick.protocol.public_url import public_url
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
    from tallystick.client.config import ClientConfig, load_config

    loaded = load_config(config, {"coordinator": coordinator_url})
    path = deployment or loaded.deployment or home() / "deployment.json"
    named = coordinator_url is not None or loaded.coordinator != ClientConfig.coordinator
    location = MarketLocation(loaded.coordinator.rstrip("/"), path, named=named and not supervise)
    if stop:
        _stop(location, as_json=as_json)
        return
    if supervise:
        asyncio.run(background.supervise(location, embedded_engine))
        return
    prerequisites, foreign = run_shown("looking at the market", check(location, wallet))
    if not location.is_local:
        _show_remote(prerequisites, as_json=as_json)
        return
    missing = [item for item in prerequisites if not item.ready]
    if not as_json:
        _show_local(prerequisites)
    if foreign is not None:
        raise refuse_foreign(location, foreign)
    if not as_json and missing and not yes:
        typer.confirm("Add what is missing?", default=True, abort=True, err=True)
    signer = _open_or_create(wallet, password_file)
    names = [item.name for item in missing]
    asyncio.run(_complete(location, loaded, signer, names, prompt, stand_in=stand_in, as_json=as_json))


def _stop(location: MarketLocation, *, as_json: bool) -> None:
    """Stops the local market and says what is lost and what is kept."""
    from tallystick.cli.local import background

    started = background.started_services()
    held = asyncio.run(held_by_escrow(location.load_deployment())) if background.running() is not None else None
    with activity("stopping the local market"):
        stopped = background.stop()
    if not stopped:
        if as_json:
            show_json({"stopped": False})
        else:
            step("no local market is running")
        return
    if as_json:
        lost = {"chain": started.chain, "held": str(int(held or 0)) if started.chain else "0"}
        show_json({"stopped": True, "lost": lost})
        return
    step("the local market is stopped")
    if started.chain:
        money = "" if held is None else f", with the {dollars(held)} of play money in its escrow"
        note(f"lost: the chain, which was in memory{money}; the next `tally start` makes a new one")
    else:
        note(f"kept: the chain at {public_url(location.rpc)} and all money on it, because the market did not start that chain")
    note(f"kept: wallets, receipts and conversations in {home()}")


async def check(location: MarketLocation, wallet: str) -> tuple[list[Prerequisite], str | None]:
    """The prerequisites of a first answer, in the order in which they are needed, and another program that serves the
    coordinator's address. Raises BadMessage for damaged files, Unavailable.
    """
    from tallystick.chain.endpoint import Rpc
    from tallystick.chain.escrow import Escrow

    path, rpc = keystore_path(wallet), Rpc(location.rpc)
    address = parse_address(keystore_address(path)) if path.exists() else None
    try:
        state = await inspect_market(rpc, location)
        coins = await rpc.balance(address) if state.deployment and address else 0
        purse = await Escrow(rpc, state.deployment).purse(address) if state.deployment and address else None
    finally:
        await rpc.close()
    free = Amount(0) if purse is None else Amount(purse.free - purse.thawing)
    reachable, models = await _models_on_offer(location.coordinator)
    if location.is_local and state.coordinator is None:
        reachable, models = False, []
    remedies = _remedies(location, wallet, address)
    states = {
        "wallet": (address is not None, str(address or "none")),
        "chain": _chain_state(location, state),
        "contracts": (state.deployment is not None, str(state.deployment.escrow) if state.deployment else "none"),
        "coins": (coins > 0, f"{format_amount(coins, 18)} for gas"),
        "purse": (free >= MIN_PURSE, f"{dollars(free)} free"),
        "coordinator": (reachable, location.coordinator + ("" if reachable else f": {state.foreign or 'does not answer'}")),
        "offers": (bool(models), ", ".join(models)[:80] or "no provider sells a model there now"),
    }
    return [Prerequisite(name, ready, detail, remedies[name]) for name, (ready, detail) in states.items()], state.foreign


def _chain_state(location: MarketLocation, state: MarketState) -> tuple[bool, str]:
    """Whether the market's chain answers, and details."""
    place, chain = public_url(location.rpc), state.chain
    if location.is_local:
        if state.deployment is not None:
            return True, f"{place} (chain {chain})"
        if chain is None:
            return False, f"{place} does not answer"
        return False, f"{place} (chain {chain}) does not have this market's contracts; the market gets its own"
    if location.load_deployment() is None:
        return False, "unknown: name an RPC endpoint that you trust"
    return chain is not None, f"{place} " + (f"(chain {chain})" if chain else "does not answer")


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
        "contracts": f"tally deposit 10{wallet_option} --coordinator {location.coordinator} --rpc URL (fetches and checks them)",
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
    signer = create_keystore(path, find_password(password_file, lambda: choose_password(wallet)))
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

    state = await _join(location)
    if {"chain", "coordinator", "offers"} & set(missing):
        if state.foreign is not None:
            raise refuse_foreign(location, state.foreign)
        if background.running() is not None:
            raise BadMessage(
                f"the local market is running, but these parts are missing: {', '.join(missing)}. Stop it with "
                "`tally start --stop`, then run `tally start` again"
            )
        embedded = None if stand_in else await prepare_embedded_engine()
        await background.spawn(location, embedded)
    rpc = Rpc(location.rpc)
    try:
        deployment = location.load_deployment()
        if deployment is None:
            raise BadMessage(f"{location.deployment}: the file is gone; run `tally start` again")
        await _fund(Escrow(rpc, deployment), signer, location)
    finally:
        await rpc.close()
    answer = await _ask(config, signer, prompt, as_json=as_json)
    if not as_json:
        _ask_for_consent(config, signer)
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


async def _join(location: MarketLocation) -> MarketState:
    """What answers at the location. Writes the deployment file of a coordinator that the user named. Raises TallyError."""
    from tallystick.chain.endpoint import Rpc
    from tallystick.cli.local import background

    rpc = Rpc(location.rpc)
    try:
        state = await inspect_market(rpc, location)
    finally:
        await rpc.close()
    if state.deployment is not None and state.deployment != location.load_deployment():
        background.write_deployment(state.deployment, location.deployment)
    return state


async def _fund(escrow: Escrow, signer: Signer, location: MarketLocation) -> None:
    """Gives the wallet coins for gas and test dollars in its purse. Raises TallyError."""
    from tallystick.chain.devnet import dev_accounts
    from tallystick.cli.money.purse import fund_purse
    from tallystick.cli.transactions import ShownSender

    if not location.is_local:  # the deployment file may have changed since the check
        raise BadMessage(f"{location.deployment}: no longer a local market with play money; run `tally start` again")
    rpc = escrow.rpc
    if await rpc.balance(signer.address) == 0:
        await ShownSender(rpc, dev_accounts()[0]).send(signer.address, b"", value=GAS_MONEY)
        step(f"{signer.address} has coins for gas")
    purse = await escrow.purse(signer.address)
    free = purse.free - purse.thawing
    if free < MIN_PURSE:
        await fund_purse(escrow, ShownSender(rpc, signer), signer, Amount(TARGET_PURSE - free), mint=True)
        step(f"the purse has {format_amount(TARGET_PURSE)} test dollars")


def _ask_for_consent(config: ClientConfig, signer: Signer) -> None:
    """Asks once whether audits may show prompts to other providers, if somebody can answer and the config says nothing."""
    from tallystick.client.audits.consent_file import QUESTION, read_answer, write_answer

    path = config.consent_path(signer.address)
    if config.audits.share_prompts is not None or not config.audits.enabled or read_answer(path) is not None:
        return
    if not sys.stdin.isatty():
        note("audits show no prompt to other providers; to allow it: tally audit share --allow")
        return
    write_answer(path, share=typer.confirm(QUESTION, default=False, err=True), now=int(time.time()))
    note("to change that: tally audit share --allow, or --forbid")


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
