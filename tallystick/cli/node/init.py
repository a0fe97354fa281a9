"""`tally node init`: writes a node's config for the engines that run on this machine."""

from __future__ import annotations

import asyncio
import os
import tomllib
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

import typer

from tallystick.cli.market_deployment import is_local
from tallystick.cli.node.init_file import ModelPlan, NodeSetup, PayoutSetup, describe_models, to_toml
from tallystick.cli.node.init_identity import choose_deployment, choose_identity, open_wallet_address
from tallystick.cli.onchain import parse_account
from tallystick.cli.options import DEFAULT_WALLET, DeploymentFile, Json, PasswordFile
from tallystick.cli.output import counted, note, show_json, show_table, step
from tallystick.cli.progress import activity, run_shown
from tallystick.cli.prompts import ask
from tallystick.protocol.errors import BadMessage, TallyError, Unavailable
from tallystick.protocol.types import Address, Amount, format_amount, parse_amount

if TYPE_CHECKING:
    from node.engines.capabilities import Capabilities
    from node.engines.discover import DiscoveredEngine

MAX_PROBED_MODELS = 8
"""An engine with more models is not probed."""
COORDINATOR = "http://127.0.0.1:8420"


def _load_answers(context: typer.Context, file: Path | None) -> Path | None:
    """Uses the values in the file as defaults of the options. Raises BadMessage."""
    if file is None:
        return None
    try:
        answers = tomllib.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise BadMessage(f"--answers-file {file}: {error.strerror if isinstance(error, OSError) else error}") from None
    names = {
        option.lstrip("-").replace("-", "_"): str(parameter.name)
        for parameter in context.command.params
        for option in parameter.opts
        if option.startswith("--")
    }
    unknown = sorted(answers.keys() - names.keys() | answers.keys() & {"answers_file"})
    if unknown:
        raise BadMessage(
            f"--answers-file {file}: expected names of options, such as engine and input_price; unknown: {', '.join(unknown)}"
        )
    context.default_map = {names[name]: value for name, value in answers.items()}
    return file


AnswersFile = Annotated[
    Path | None,
    typer.Option("--answers-file", is_eager=True, callback=_load_answers, help="TOML file with values for these options."),
]


def init(
    context: typer.Context,
    file: Annotated[Path, typer.Option("--out", "-o", help="Config file to write.")] = Path("node.toml"),
    wallet: Annotated[str, typer.Option("--wallet", "-w", help="The node's wallet; made if it does not exist.")] = DEFAULT_WALLET,
    engine: Annotated[
        list[str] | None, typer.Option(help="URL of an engine (repeatable); default: search the usual ports.")
    ] = None,
    coordinator_url: Annotated[
        str | None, typer.Option("--coordinator", help=f"Coordinator URL; default: {COORDINATOR}.")
    ] = None,
    deployment: DeploymentFile = None,
    rpc: Annotated[
        str | None, typer.Option(help="RPC endpoint of the market's chain; required for a market that is not on this machine.")
    ] = None,
    slots: Annotated[
        int | None, typer.Option(min=1, help="Jobs that each engine may run at once; default: what it reports, or 4.")
    ] = None,
    input_price: Annotated[
        str | None, typer.Option(help="Dollars per million input tokens, for every model; default: the market's lowest.")
    ] = None,
    output_price: Annotated[
        str | None, typer.Option(help="Dollars per million output tokens, for every model; default: the market's lowest.")
    ] = None,
    payout_address: Annotated[
        str | None,
        typer.Option(help="Pay the node's credit to this address by itself: a cold wallet's address, or a wallet name."),
    ] = None,
    payout_min_amount: Annotated[str, typer.Option(help="Dollars of credit from which it is paid to --payout-address.")] = "10",
    coin_price: Annotated[
        str | None,
        typer.Option(help="Dollars for one coin of the chain; required for --payout-address, except on a local test chain."),
    ] = None,
    no_probe: Annotated[bool, typer.Option("--no-probe", help="Do not test what the models can do.")] = False,
    _answers: AnswersFile = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask: accept what is found and suggested.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing config.")] = False,
    password_file: PasswordFile = None,
    as_json: Json = False,
) -> None:
    """Write a node's config: find the engines on this machine, suggest prices from the market, make a wallet if there is none.

    Asks for everything that options or --answers-file do not give, unless --yes is set. Each node gets a state folder of its own.
    """
    if file.exists() and not force:
        raise BadMessage(f"--out: {file} exists; overwrite it with --force, or name another file")
    quiet = yes or as_json
    given = (
        None if input_price is None else parse_amount(input_price, field="--input-price"),
        None if output_price is None else parse_amount(output_price, field="--output-price"),
    )
    payout = _payout(payout_address, payout_min_amount, coin_price)
    coordinator, contract = _choose_coordinator(coordinator_url, quiet=quiet)
    if rpc is None and not quiet and deployment is None and not is_local(coordinator):
        rpc = ask("RPC endpoint of the market's chain (empty: later)", "", _optional_url, instead="name it with --rpc")
    findings = _find_engines(tuple(engine or ()), quiet=quiet)
    plans = _plan_engines(findings, coordinator, given, probe=not no_probe, quiet=quiet)
    source = context.get_parameter_source("wallet")
    named = source is not None and source.name != "DEFAULT"
    identity = choose_identity(file, wallet, contract, named=named, quiet=quiet)
    address = open_wallet_address(identity.wallet, password_file)
    path = asyncio.run(choose_deployment(deployment, coordinator, rpc, identity.state))
    setup = NodeSetup(coordinator, path, rpc, identity.state.absolute(), payout)
    _write(file, address, setup, to_toml(setup, findings, plans, slots))
    if as_json:
        described = [{"url": f.url, "kind": f.kind.value, "version": f.version} | describe_models(plans[f.url]) for f in findings]
        document = {"config": str(file), "provider": address, "wallet": identity.wallet, "state": str(setup.state)}
        show_json(document | {"coordinator": coordinator, "deployment": str(path), "engines": described})
        return
    step(f"wrote {file}; provider {address}, state {setup.state}")
    options = f"--config {file}" + ("" if identity.wallet == DEFAULT_WALLET else f" --wallet {identity.wallet}")
    step(f"next: tally node doctor {options}; then: tally node run {options}")


def _plan_engines(
    findings: list[DiscoveredEngine],
    coordinator: str,
    given: tuple[Amount | None, Amount | None],
    *,
    probe: bool,
    quiet: bool,
) -> dict[str, list[ModelPlan]]:
    """How the models are to be sold, by the engine's URL: at the given prices, or at those of the market."""
    market = run_shown(f"asking {coordinator} for prices", _market_offers(coordinator))
    abilities = asyncio.run(_probe(findings)) if probe else {}
    if not quiet:
        _show(findings, abilities)
    return {
        engine.url: [
            replace(_plan(model, market, *given, quiet=quiet), abilities=abilities.get((engine.url, model.name)))
            for model in engine.models
        ]
        for engine in findings
    }


def _payout(address: str | None, min_amount: str, coin_price: str | None) -> PayoutSetup | None:
    """The automatic payout, if there is to be one. Raises BadMessage."""
    if address is None:
        return None
    least = parse_amount(min_amount, field="--payout-min-amount")
    if least < 1:
        raise BadMessage("--payout-min-amount: expected more than 0 dollars")
    price = None if coin_price is None else parse_amount(coin_price, field="--coin-price")
    return PayoutSetup(parse_account(address, "--payout-address"), least, price)


def _write(file: Path, address: Address, setup: NodeSetup, text: str) -> None:
    """Writes the config, and notes that the state folder is for it."""
    from node.storage.state_folder import claim_state

    claim_state(setup.state, address, file)
    file.write_text(text)


def _choose_coordinator(given: str | None, *, quiet: bool) -> tuple[str, str | None]:
    """The coordinator's URL, and the contract on which it settles (None if it does not answer). Asks again for a wrong URL."""
    if given is not None or quiet:
        url = _url(given or COORDINATOR)
        return url, asyncio.run(_contract(url))
    while True:
        url = ask("Coordinator", COORDINATOR, _url, instead="name it with --coordinator")
        contract = asyncio.run(_contract(url))
        if contract is not None or ask("Use it all the same (yes or no)", "no", _yes, instead="name it with --coordinator"):
            return url, contract


def _url(text: str) -> str:
    """An http or https URL. Raises BadMessage."""
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise BadMessage(f"expected an address such as http://192.168.1.5:8000, got {text[:200]!r}")
    return text


def _optional_url(text: str) -> str | None:
    return _url(text) if text else None


def _yes(text: str) -> bool:
    if text.lower() not in ("y", "yes", "n", "no"):
        raise BadMessage(f"expected yes or no, got {text[:60]!r}")
    return text.lower() in ("y", "yes")


async def _contract(coordinator: str) -> str | None:
    """The contract on which a coordinator settles; None, with a remark, if it does not answer."""
    from tallystick.client.config import ClientConfig
    from tallystick.client.coordinator.http_client import CoordinatorClient

    try:
        async with CoordinatorClient(coordinator, ClientConfig()) as client:
            return (await client.info()).domain.contract
    except TallyError as error:
        note(str(error))
        return None


def _find_engines(urls: tuple[str, ...], *, quiet: bool) -> list[DiscoveredEngine]:
    """The engines with a model at these addresses, or on the usual ports. Asks for an address while none is found.

    If nobody can be asked: raises Unavailable if a named engine does not answer, BadMessage if no engine has a model.
    """
    while True:
        try:
            findings = [engine for engine in asyncio.run(_discover(urls)) if engine.models]
        except Unavailable as error:
            if quiet:
                raise
            note(str(error))
            findings = []
        for engine in findings:
            step(f"found {engine.kind.value} {engine.version} at {engine.url}, {counted(len(engine.models), 'model')}")
        if findings:
            return findings
        if quiet:
            raise BadMessage("no engine with a model answers on the usual ports; start one, or give its URL with --engine")
        note("no engine with a model was found. To try one that tallystick brings along, run `tally engine` in another terminal")
        urls = (ask("Address of your engine", "http://127.0.0.1:8080", _url, instead="name it with --engine"),)


async def _discover(urls: tuple[str, ...]) -> list[DiscoveredEngine]:
    """The engines at these addresses, or those that are found; says where it looks. Raises Unavailable."""
    from node.engines.discover import discover, inspect_engine
    from node.engines.kinds import DEFAULT_URLS

    key = os.environ.get("OPENAI_API_KEY")
    if urls:
        with activity(f"asking {', '.join(urls)} for models"):
            return list(await asyncio.gather(*(inspect_engine(url, key, seconds=10) for url in urls)))
    named = os.environ.get("OPENAI_BASE_URL", "").strip()
    ports = ", ".join(str(urlsplit(url).port) for url in DEFAULT_URLS)
    note(f"looking for engines at {named or f'this machine, ports {ports}'}")
    with activity("looking for engines"):
        return await discover(os.environ)


async def _probe(findings: list[DiscoveredEngine]) -> dict[tuple[str, str], Capabilities]:
    """What the models can do, by engine and name. Probes one model at a time, since an engine may have to load each."""
    from node.engines.probe import model_for_routes, probe

    abilities: dict[tuple[str, str], Capabilities] = {}
    for engine in findings:
        if len(engine.models) > MAX_PROBED_MODELS:
            note(f"{engine.url} lists {len(engine.models)} models, too many to test: declare their features in the config")
            continue
        for model in engine.models:
            with activity(f"testing what {model.name} can do"):
                abilities[engine.url, model.name] = await probe(
                    engine.url, model.name, engine.api_key, routes_of=model_for_routes(engine, model.name)
                )
            step(f"tested {model.name}: {_describe(abilities[engine.url, model.name])}")
    return abilities


async def _market_offers(coordinator: str) -> dict[str, Any]:
    from tallystick.client.config import ClientConfig
    from tallystick.client.coordinator.http_client import CoordinatorClient

    try:
        async with CoordinatorClient(coordinator, ClientConfig()) as api:
            return {offer.id: offer.to_json() for offer in await api.models()}
    except TallyError:
        note(f"the coordinator {coordinator} does not answer now, so the suggested prices are the defaults")
        return {}


def _show(findings: list[DiscoveredEngine], abilities: dict[tuple[str, str], Capabilities]) -> None:
    rows = [
        (
            engine.url,
            f"{engine.kind.value} {engine.version}",
            model.name,
            model.context_tokens or "unknown",
            _describe(abilities.get((engine.url, model.name))),
        )
        for engine in findings
        for model in engine.models
    ]
    show_table(("engine", "kind", "model", "context", "abilities"), rows, title="Engines on this machine")


def _describe(abilities: Capabilities | None) -> str:
    """A model's abilities, in words."""
    if abilities is None:
        return "not tested"
    streams = {"usage": ["streams with usage"], "yes": ["streams without usage"]}.get(abilities.streams, [])
    words = [*(["chat"] if abilities.chat else []), *(["completions"] if abilities.completions else []), *streams]
    if abilities.streams != "unknown" and (abilities.chat or abilities.completions):
        words.append("no evidence" if abilities.evidence is None else "evidence")
    features = (f"no {name[1:]}" if name.startswith("-") else name for name in abilities.features)
    return ", ".join((*words, *features)) or "none of those tested"


def _plan(
    model: Any, market: dict[str, Any], given_input: Amount | None, given_output: Amount | None, *, quiet: bool
) -> ModelPlan:
    from node.service.config import DEFAULT_INPUT_PRICE, DEFAULT_OUTPUT_PRICE

    listed = market.get(model.name)
    prices = [DEFAULT_INPUT_PRICE, DEFAULT_OUTPUT_PRICE]
    source = "default: no provider sells it yet"
    if listed is not None:
        prices, source = [Amount(int(listed["inputPrice"])), Amount(int(listed["outputPrice"]))], "the market's lowest price now"
    for index, (kind, given) in enumerate((("input", given_input), ("output", given_output))):
        if given is not None:
            prices[index], source = given, "as given"
        elif not quiet:
            question = f"{model.name}: dollars per million {kind} tokens ({source})"
            read = partial(parse_amount, field=f"{kind} price")
            prices[index] = ask(question, format_amount(prices[index]), read, instead=f"name it with --{kind}-price")
    return ModelPlan(model.name, model.context_tokens, prices[0], prices[1], source)
