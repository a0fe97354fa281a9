"""`tally node init`: writes a node's config for the engines that run on this machine."""

from __future__ import annotations

import asyncio
import json
import os
import tomllib
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tallystick.cli.options import DEFAULT_WALLET, DeploymentFile, Json, PasswordFile, prompt_password
from tallystick.cli.output import err, note, show_json, show_table, step
from tallystick.protocol.errors import BadMessage, TallyError
from tallystick.protocol.types import Amount, format_amount, parse_amount
from tallystick.runtime.config import home
from tallystick.runtime.keystore import create_keystore, find_password, keystore_address, keystore_path

if TYPE_CHECKING:
    from node.engines.discover import DiscoveredEngine
    from node.engines.probe import Capabilities

MAX_PROBED_MODELS = 8
"""An engine with more models is not probed."""
DEFAULT_SLOTS = 4
COORDINATOR = "http://127.0.0.1:8420"


@dataclass(frozen=True, slots=True)
class ModelPlan:
    """A model to sell, its prices (base units per million tokens), and where the prices come from."""

    name: str
    context: int | None
    input_price: Amount
    output_price: Amount
    price_source: str
    abilities: Capabilities | None = None
    """None if the model was not probed."""

    @property
    def sold_as(self) -> str:
        """The model's name on the market. An engine that loads a file may name the model by its path on this machine."""
        return Path(self.name).stem if self.name.startswith(("/", "./")) else self.name


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
    file: Annotated[Path, typer.Option("--out", "-o", help="Config file to write.")] = Path("node.toml"),
    wallet: Annotated[str, typer.Option("--wallet", "-w", help="The node's wallet; made if it does not exist.")] = DEFAULT_WALLET,
    engine: Annotated[
        list[str] | None, typer.Option(help="URL of an engine (repeatable); default: search the usual ports.")
    ] = None,
    coordinator_url: Annotated[
        str | None, typer.Option("--coordinator", help=f"Coordinator URL; default: {COORDINATOR}.")
    ] = None,
    deployment: DeploymentFile = None,
    slots: Annotated[
        int | None, typer.Option(min=1, help="Jobs that each engine may run at once; default: what it reports, or 4.")
    ] = None,
    input_price: Annotated[
        str | None, typer.Option(help="Dollars per million input tokens, for every model; default: the market's lowest.")
    ] = None,
    output_price: Annotated[
        str | None, typer.Option(help="Dollars per million output tokens, for every model; default: the market's lowest.")
    ] = None,
    no_probe: Annotated[bool, typer.Option("--no-probe", help="Do not test what the models can do.")] = False,
    _answers: AnswersFile = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask: accept what is found and suggested.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing config.")] = False,
    password_file: PasswordFile = None,
    as_json: Json = False,
) -> None:
    """Write a node's config: find the engines on this machine, suggest prices from the market, make a wallet if there is none.

    Asks for everything that options or --answers-file do not give, unless --yes is set.
    """
    if file.exists() and not force:
        raise BadMessage(f"--out: {file} exists; overwrite it with --force, or name another file")
    quiet = yes or as_json
    coordinator = coordinator_url or (COORDINATOR if quiet else typer.prompt("Coordinator", default=COORDINATOR, err=True))
    findings, market = asyncio.run(_discover(engine or [], coordinator))
    abilities = {} if no_probe else asyncio.run(_probe(findings))
    if not quiet:
        _show(findings, abilities)
    given = (
        None if input_price is None else parse_amount(input_price, field="--input-price"),
        None if output_price is None else parse_amount(output_price, field="--output-price"),
    )
    plans = {
        engine.url: [
            replace(_plan(model, market, *given, ask=not quiet), abilities=abilities.get((engine.url, model.name)))
            for model in engine.models
        ]
        for engine in findings
    }
    address = _wallet(wallet, password_file)
    path = (deployment or home() / "deployment.json").expanduser().absolute()
    file.write_text(_toml(coordinator, path, findings, plans, slots))
    if as_json:
        described = [{"url": f.url, "kind": f.kind.value, "version": f.version} | _models(plans[f.url]) for f in findings]
        show_json({"config": str(file), "provider": address, "coordinator": coordinator, "engines": described})
        return
    step(f"wrote {file}; provider {address}")
    _show_next(file, wallet, path)


def _show_next(file: Path, wallet: str, deployment: Path) -> None:
    if not deployment.exists():
        note(f"still missing: the market's deployment file {deployment}; get it from the market's operator")
    options = f"--config {file}" + ("" if wallet == DEFAULT_WALLET else f" --wallet {wallet}")
    step(f"next: tally node doctor {options}; then: tally node run {options}")


async def _discover(urls: list[str], coordinator: str) -> tuple[list[DiscoveredEngine], dict[str, Any]]:
    """The engines with their models, and the market's offers by model. Raises Unavailable if a named engine does not answer,
    BadMessage if no engine has a model.
    """
    from node.engines.discover import discover, inspect_engine

    key = os.environ.get("OPENAI_API_KEY")
    engines = (
        list(await asyncio.gather(*(inspect_engine(url, key, seconds=10) for url in urls)))
        if urls
        else await discover(os.environ)
    )
    engines = [engine for engine in engines if engine.models]
    if not engines:
        raise BadMessage("no engine with a model answers on the usual ports; start one, or give its URL with --engine")
    return engines, await _market_offers(coordinator)


async def _probe(findings: list[DiscoveredEngine]) -> dict[tuple[str, str], Capabilities]:
    """What the models can do, by engine and name. Probes one model at a time, since an engine may have to load each."""
    from node.engines.probe import probe

    abilities: dict[tuple[str, str], Capabilities] = {}
    for engine in findings:
        if len(engine.models) > MAX_PROBED_MODELS:
            note(f"{engine.url} lists {len(engine.models)} models, too many to test: declare their features in the config")
            continue
        for model in engine.models:
            with err.status(f"testing what {model.name} can do …"):
                abilities[engine.url, model.name] = await probe(engine.url, model.name, engine.api_key)
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
    return ", ".join((*words, *abilities.features)) or "none of those tested"


def _plan(model: Any, market: dict[str, Any], given_input: Amount | None, given_output: Amount | None, *, ask: bool) -> ModelPlan:
    from node.service.config import DEFAULT_INPUT_PRICE, DEFAULT_OUTPUT_PRICE

    listed = market.get(model.name)
    prices = [DEFAULT_INPUT_PRICE, DEFAULT_OUTPUT_PRICE]
    source = "default: no provider sells it yet"
    if listed is not None:
        prices, source = [Amount(int(listed["inputPrice"])), Amount(int(listed["outputPrice"]))], "the market's lowest price now"
    for index, (kind, given) in enumerate((("input", given_input), ("output", given_output))):
        if given is not None:
            prices[index], source = given, "as given"
        elif ask:
            question = f"{model.name}: dollars per million {kind} tokens ({source})"
            answer = typer.prompt(question, default=format_amount(prices[index]), err=True)
            prices[index] = parse_amount(answer, field=f"{kind} price")
    return ModelPlan(model.name, model.context_tokens, prices[0], prices[1], source)


def _usage_option(plans: list[ModelPlan]) -> list[str]:
    """Turns off the request for usage in streams if no model of an engine reports it, and names an unusual output limit."""
    probed = [plan.abilities for plan in plans if plan.abilities is not None and plan.abilities.chat]
    limits = (
        ["# It refuses max_tokens.", 'output_limit_field = "max_completion_tokens"']
        if probed and all(abilities.output_limit_field != "max_tokens" for abilities in probed)
        else []
    )
    if not probed or any(abilities.streams == "usage" for abilities in probed):
        return limits
    return [
        *limits,
        "# Its streams report no usage, so receipts of streams rest on the node's own estimate.",
        "supports_stream_usage = false",
    ]


def _features(engine: DiscoveredEngine, plan: ModelPlan) -> list[str]:
    """The features that the model's ask states: written down only if the node does not find them by itself at each start."""
    from node.engines.probe import may_generate

    if plan.abilities is None or not plan.abilities.features:
        return []
    features = f"features = {json.dumps(list(plan.abilities.features))}"
    if may_generate(engine):
        return ["# The node finds these features by itself. Features that are named here win over those.", f"# spec.{features}"]
    return ["[engines.models.spec]", features]


def _slots(engine: DiscoveredEngine, slots: int | None) -> list[str]:
    """The number of slots: written down only if the engine does not tell it."""
    if slots is None and engine.slots is not None:
        return [
            f"# Number of jobs that the engine may run at once. By default what it reports, {engine.slots} now.",
            "# slots = 4",
        ]
    return ["# Number of jobs that the engine may run at once.", f"slots = {slots or DEFAULT_SLOTS}"]


def _wallet(name: str, password_file: Path | None) -> str:
    path = keystore_path(name)
    if not path.exists():
        create_keystore(path, find_password(password_file, lambda: prompt_password(name, confirm=True)))
        step(f"made wallet {name} in {path}; keep the file and its password safe: the wallet signs for your money")
    return keystore_address(path)


def _models(plans: list[ModelPlan]) -> dict[str, Any]:
    models = [
        {
            "name": plan.name,
            "context": plan.context,
            "inputPrice": str(int(plan.input_price)),
            "outputPrice": str(int(plan.output_price)),
            "priceSource": plan.price_source,
            "abilities": None if plan.abilities is None else asdict(plan.abilities),
        }
        for plan in plans
    ]
    return {"models": models}


def _toml(
    coordinator: str, deployment: Path, findings: list[DiscoveredEngine], plans: dict[str, list[ModelPlan]], slots: int | None
) -> str:
    """The config with comments. Names and URLs are written as JSON strings, which are valid TOML."""
    lines = [
        "# Settings of a node; node/example.toml in the source explains every setting.",
        "# Check with `tally node doctor`, start with `tally node run`.",
        "",
        f"coordinator = {json.dumps(coordinator)}",
        "# The market's deployment file, from its operator.",
        f"deployment = {json.dumps(str(deployment))}",
    ]
    for engine in findings:
        lines += [
            "",
            f"# {engine.kind.value} {engine.version}",
            "[[engines]]",
            f"url = {json.dumps(engine.url)}",
            *(['api_key_env = "OPENAI_API_KEY"'] if engine.api_key else []),
            *_slots(engine, slots),
            *_usage_option(plans[engine.url]),
        ]
        for plan in plans[engine.url]:
            lines += [
                "",
                f"# Dollars per million tokens ({plan.price_source}).",
                "[[engines.models]]",
                f"name = {json.dumps(plan.name)}",
                *([f"sell_as = {json.dumps(plan.sold_as)}"] if plan.sold_as != plan.name else []),
                f'input_price = "{format_amount(plan.input_price)}"',
                f'output_price = "{format_amount(plan.output_price)}"',
                *([f"context_tokens = {plan.context}"] if plan.context else []),
                *_features(engine, plan),
            ]
    return "\n".join(lines) + "\n"
