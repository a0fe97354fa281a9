"""`tally node init`: from an engine that runs to a node that is ready to."""

from __future__ import annotations

import asyncio
import json
import os
import tomllib
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tallystick.cli.options import DEFAULT_WALLET, Json, PasswordFile, prompt_password
from tallystick.cli.output import err, show_json, show_rows, step
from tallystick.protocol.errors import BadMessage, TallyError
from tallystick.protocol.types import Amount, format_amount, parse_amount
from tallystick.runtime.config import home
from tallystick.runtime.keystore import create_keystore, find_password, keystore_address, keystore_path

if TYPE_CHECKING:
    from node.engines.discover import DiscoveredEngine
    from node.engines.probe import Capabilities

MOST_PROBED = 8
"""Models of one engine that are asked what they can do, unless there are more."""
DEFAULT_SLOTS = 4
COORDINATOR = "http://127.0.0.1:8420"


@dataclass(frozen=True, slots=True)
class Sale:
    """A model, what it will cost (base units per million tokens), and where these prices come from."""

    name: str
    context: int | None
    input_price: Amount
    output_price: Amount
    why: str
    abilities: Capabilities | None = None
    """None where it was not asked."""

    @property
    def sold_as(self) -> str:
        """The model's name on the market: engines that load a file may call it by a path of this machine."""
        return Path(self.name).stem if self.name.startswith(("/", "./")) else self.name


def _take_answers(context: typer.Context, file: Path | None) -> Path | None:
    """What the file says stands in for options that are not given."""
    if file is None:
        return None
    try:
        read = tomllib.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise BadMessage(f"--answers-file {file}: {error.strerror if isinstance(error, OSError) else error}") from None
    names = {o.lstrip("-").replace("-", "_"): str(p.name) for p in context.command.params for o in p.opts if o.startswith("--")}
    unknown = sorted(read.keys() - names.keys() | read.keys() & {"answers_file"})
    if unknown:
        raise BadMessage(
            f"--answers-file {file}: unknown: {', '.join(unknown)}; known are the options, such as engine and input_price"
        )
    context.default_map = {names[name]: value for name, value in read.items()}
    return file


def init(
    file: Annotated[Path, typer.Option("--out", "-o", help="The config to write.")] = Path("node.toml"),
    wallet: Annotated[str, typer.Option("--wallet", "-w", help="The node's wallet; made if there is none.")] = DEFAULT_WALLET,
    engine: Annotated[
        list[str] | None, typer.Option(help="An engine's address (repeatable); else the usual ports are asked.")
    ] = None,
    coordinator_url: Annotated[
        str | None, typer.Option("--coordinator", help=f"The coordinator's address; {COORDINATOR} here.")
    ] = None,
    deployment: Annotated[
        Path | None, typer.Option(help="Deployment file; deployment.json in the home folder by default.")
    ] = None,
    slots: Annotated[int | None, typer.Option(min=1, help="Jobs that each engine may run at once; what it says, else 4.")] = None,
    input_price: Annotated[str | None, typer.Option(help="Dollars per million input tokens, for every model.")] = None,
    output_price: Annotated[str | None, typer.Option(help="Dollars per million output tokens, for every model.")] = None,
    no_probe: Annotated[bool, typer.Option("--no-probe", help="Do not ask the models what they can do.")] = False,
    _answers: Annotated[
        Path | None,
        typer.Option(
            "--answers-file", is_eager=True, callback=_take_answers, help="TOML file with any of these options by name."
        ),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Ask nothing: take what is found and suggested.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the config if it exists.")] = False,
    password_file: PasswordFile = None,
    as_json: Json = False,
) -> None:
    """Writes a node's config: looks which engines run here, suggests prices from the market, makes a wallet if there is none.

    Everything can be given as options or in a file, for scripts; what is missing is asked for, unless --yes.
    """
    if file.exists() and not force:
        raise BadMessage(f"{file} exists; --force overwrites it, --out writes another")
    quiet = yes or as_json
    where = coordinator_url or (COORDINATOR if quiet else typer.prompt("Coordinator", default=COORDINATOR, err=True))
    findings, market = asyncio.run(_look(engine or [], where))
    abilities = {} if no_probe else asyncio.run(_probe(findings))
    if not quiet:
        _show(findings, abilities)
    given = [None if price is None else parse_amount(price) for price in (input_price, output_price)]
    sales = {
        found.url: [
            replace(_sale(model, market, *given, ask=not quiet), abilities=abilities.get((found.url, model.name)))
            for model in found.models
        ]
        for found in findings
    }
    address = _wallet(wallet, password_file)
    path = (deployment or home() / "deployment.json").expanduser().absolute()
    file.write_text(_toml(where, path, findings, sales, slots))
    if as_json:
        engines = [{"url": f.url, "kind": f.kind.value, "version": f.version} | _models(sales[f.url]) for f in findings]
        show_json({"config": str(file), "provider": address, "coordinator": where, "engines": engines})
        return
    step(f"{file} is written; provider {address}")
    if not path.exists():
        err.print(f"still missing: {path}, the market's deployment file; its operator has it", highlight=False)
    options = f"--config {file}" + ("" if wallet == DEFAULT_WALLET else f" --wallet {wallet}")
    step(f"next: tally node doctor {options}; then: tally node run {options}")


async def _look(urls: list[str], coordinator: str) -> tuple[list[DiscoveredEngine], dict[str, Any]]:
    """The engines with their models, and what the market sells by name. Raises Unavailable for an engine that was named and does
    not answer, BadMessage where there is none.
    """
    from node.engines.discover import discover, inspect_engine

    key = os.environ.get("OPENAI_API_KEY")
    found = (
        list(await asyncio.gather(*(inspect_engine(url, key, seconds=10) for url in urls)))
        if urls
        else await discover(os.environ)
    )
    found = [one for one in found if one.models]
    if not found:
        raise BadMessage("no engine with a model answers here; start one, or name its address with --engine")
    return found, await _market(coordinator)


async def _probe(findings: list[DiscoveredEngine]) -> dict[tuple[str, str], Capabilities]:
    """What the models can do, by engine and name: one model at a time, since an engine may have to load each."""
    from node.engines.probe import probe

    told: dict[tuple[str, str], Capabilities] = {}
    for found in findings:
        if len(found.models) > MOST_PROBED:
            err.print(f"{found.url} lists {len(found.models)} models: what they can do is for you to declare", highlight=False)
            continue
        for model in found.models:
            with err.status(f"asking {model.name} what it can do …"):
                told[found.url, model.name] = await probe(found.url, model.name, found.api_key)
    return told


async def _market(coordinator: str) -> dict[str, Any]:
    from tallystick.client.config import ClientConfig
    from tallystick.client.coordinator.http_client import CoordinatorClient

    try:
        async with CoordinatorClient(coordinator, ClientConfig()) as asked:
            return {offer.id: offer.to_json() for offer in await asked.models()}
    except TallyError:
        err.print(f"{coordinator} does not answer now, so prices are the defaults", highlight=False)
        return {}


def _show(findings: list[DiscoveredEngine], abilities: dict[tuple[str, str], Capabilities]) -> None:
    rows = [
        (
            found.url,
            f"{found.kind.value} {found.version}",
            model.name,
            model.context_tokens or "it does not say",
            _can(abilities.get((found.url, model.name))),
        )
        for found in findings
        for model in found.models
    ]
    show_rows(("engine", "what it is", "model", "context", "can"), rows, title="found here")


def _can(abilities: Capabilities | None) -> str:
    """What a model can do, in words."""
    if abilities is None:
        return "not asked"
    streams = {"usage": ["streams with usage"], "yes": ["streams without usage"]}.get(abilities.streams, [])
    words = [*(["chat"] if abilities.chat else []), *(["completions"] if abilities.completions else []), *streams]
    return ", ".join((*words, *abilities.features)) or "nothing that was asked"


def _sale(model: Any, market: dict[str, Any], given_input: Amount | None, given_output: Amount | None, *, ask: bool) -> Sale:
    from node.service.config import DEFAULT_INPUT_PRICE, DEFAULT_OUTPUT_PRICE

    listed = market.get(model.name)
    prices = [DEFAULT_INPUT_PRICE, DEFAULT_OUTPUT_PRICE]
    why = "default: nobody sells it there yet"
    if listed is not None:
        prices, why = [Amount(int(listed["inputPrice"])), Amount(int(listed["outputPrice"]))], "the market's lowest now"
    for place, given in enumerate((given_input, given_output)):
        if given is not None:
            prices[place], why = given, "as given"
        elif ask:
            what = ("input", "output")[place]
            question = f"{model.name}: dollars per million {what} tokens ({why})"
            prices[place] = parse_amount(typer.prompt(question, default=format_amount(prices[place]), err=True))
    return Sale(model.name, model.context_tokens, prices[0], prices[1], why)


def _usage_option(sales: list[Sale]) -> list[str]:
    """Where streams come without a count although it was asked for, it need not be asked for."""
    asked = [sale.abilities for sale in sales if sale.abilities is not None and sale.abilities.chat]
    if not asked or any(abilities.streams == "usage" for abilities in asked):
        return []
    return [
        "# Its streams say no usage, so receipts of streams rest on the node's own estimate.",
        "supports_stream_usage = false",
    ]


def _features(sale: Sale) -> list[str]:
    """What the model can do, for its ask."""
    if sale.abilities is None or not sale.abilities.features:
        return []
    return ["[engines.models.spec]", f"features = {json.dumps(list(sale.abilities.features))}"]


def _wallet(name: str, password_file: Path | None) -> str:
    path = keystore_path(name)
    if not path.exists():
        create_keystore(path, find_password(password_file, lambda: prompt_password(name, confirm=True)))
        step(f"made wallet {name} in {path}; keep it and its password safe: it signs for your money")
    return keystore_address(path)


def _models(sales: list[Sale]) -> dict[str, Any]:
    told = [
        {
            "name": s.name,
            "context": s.context,
            "inputPrice": str(int(s.input_price)),
            "outputPrice": str(int(s.output_price)),
            "why": s.why,
            "abilities": None if s.abilities is None else asdict(s.abilities),
        }
        for s in sales
    ]
    return {"models": told}


def _toml(
    coordinator: str, deployment: Path, findings: list[DiscoveredEngine], sales: dict[str, list[Sale]], slots: int | None
) -> str:
    """The config with its comments. Names and addresses are quoted as JSON strings, which TOML takes."""
    lines = [
        "# A node's settings; node/example.toml in the source explains all that there are.",
        "# Check with `tally node doctor`, start with `tally node run`.",
        "",
        f"coordinator = {json.dumps(coordinator)}",
        "# The market's contract: its operator gives you this file.",
        f"deployment = {json.dumps(str(deployment))}",
    ]
    for found in findings:
        lines += [
            "",
            f"# {found.kind.value} {found.version}",
            "[[engines]]",
            f"url = {json.dumps(found.url)}",
            *(['api_key_env = "OPENAI_API_KEY"'] if found.api_key else []),
            "# Jobs that it may run at once.",
            f"slots = {slots or found.slots or DEFAULT_SLOTS}",
            *_usage_option(sales[found.url]),
        ]
        for sale in sales[found.url]:
            lines += [
                "",
                f"# Dollars per million tokens ({sale.why}).",
                "[[engines.models]]",
                f"name = {json.dumps(sale.name)}",
                *([f"sell_as = {json.dumps(sale.sold_as)}"] if sale.sold_as != sale.name else []),
                f'input_price = "{format_amount(sale.input_price)}"',
                f'output_price = "{format_amount(sale.output_price)}"',
                *([f"context_tokens = {sale.context}"] if sale.context else []),
                *_features(sale),
            ]
    return "\n".join(lines) + "\n"
