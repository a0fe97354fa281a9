"""What is for sale: `tally models`, and `tally explain`, which says who would get a request and why the others would not."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tallystick.cli.jobs.jobs import with_books
from tallystick.cli.options import DEFAULT_WALLET, Config, Json, Wallet
from tallystick.cli.output import harmless, out, show_json, show_rows
from tallystick.protocol.errors import BadMessage, Code, Refusal
from tallystick.protocol.types import Amount, format_amount, parse_amount

if TYPE_CHECKING:
    from tallystick.client.config import ClientConfig
    from tallystick.client.ledger.ledger import Ledger
    from tallystick.client.openai.requests import ApiRequest
    from tallystick.client.selection.options import Choice, Explained

CoordinatorUrl = Annotated[str | None, typer.Option("--coordinator", help="The coordinator's address.")]
Several = list[str] | None


def models(config: Config = None, coordinator_url: CoordinatorUrl = None, as_json: Json = False) -> None:
    """Lists the models on offer: their lowest prices (dollars per million tokens), providers, and the best speeds measured."""
    import asyncio

    from tallystick.client.config import load_config
    from tallystick.client.coordinator.http_client import CoordinatorClient

    loaded = load_config(config, {"coordinator": coordinator_url})

    async def ask() -> list[Any]:
        async with CoordinatorClient(loaded.coordinator, loaded) as coordinator:
            return await coordinator.models()

    found = asyncio.run(ask())
    if as_json:
        show_json([offer.to_json() for offer in found])
        return
    if not found:
        out.print(f"nobody sells anything at {loaded.coordinator} now", highlight=False)
        return
    rows = (
        (
            offer.id,
            f"{offer.live} of {offer.providers}",
            _dollars(offer.input_price),
            _dollars(offer.output_price),
            offer.context_tokens,
            offer.tokens_per_second or "unknown",
            offer.first_token_ms or "unknown",
        )
        for offer in found
    )
    columns = ("model", "free", "input", "output", "context", "tokens/s", "first ms")
    show_rows(columns, rows, title="dollars per million tokens", keyed=True)


def explain(
    request: Annotated[
        str, typer.Argument(help="A model, an alias of the config, or a file with a request's JSON body (- for stdin).")
    ],
    route: Annotated[str, typer.Option(help="The request's route.")] = "/v1/chat/completions",
    max_input_price: Annotated[str | None, typer.Option(help="At most so many dollars per million input tokens.")] = None,
    max_output_price: Annotated[str | None, typer.Option(help="At most so many dollars per million output tokens.")] = None,
    region: Annotated[Several, typer.Option(help="Only in this region (repeatable).")] = None,
    tier: Annotated[Several, typer.Option(help="Only of this tier (repeatable).")] = None,
    precision: Annotated[Several, typer.Option(help="Only of this precision (repeatable).")] = None,
    feature: Annotated[Several, typer.Option(help="Only with this feature (repeatable, all are needed).")] = None,
    context: Annotated[int, typer.Option("--min-context", min=0, help="At least so many tokens of context.")] = 0,
    pin: Annotated[Several, typer.Option(help="Only this provider (repeatable).")] = None,
    exclude: Annotated[Several, typer.Option(help="Not this provider (repeatable).")] = None,
    min_stake: Annotated[str | None, typer.Option(help="Only who has staked at least so many dollars.")] = None,
    sort: Annotated[str | None, typer.Option(help="price, latency or throughput.")] = None,
    config: Config = None,
    wallet: Wallet = DEFAULT_WALLET,
    coordinator_url: CoordinatorUrl = None,
    as_json: Json = False,
) -> None:
    """Shows who would be offered a request, and why each other provider would not. Sends nothing; needs no password."""
    from tallystick.client.coordinator.http_client import CoordinatorClient
    from tallystick.client.selection.options import Choice, demand_of, explained
    from tallystick.protocol.requirements import Requirements

    require = Requirements(
        region=tuple(region or ()),
        tier=tuple(tier or ()),
        precision=tuple(precision or ()),
        features=tuple(feature or ()),
        context_tokens=context,
    )
    choice = Choice(pin=pin or (), exclude=exclude or (), require=require)
    _add_prices(choice, max_input_price, max_output_price)
    if min_stake is not None:
        choice["min_stake"] = parse_amount(min_stake)
    if sort is not None:
        choice["sort"] = sort

    async def ask(ledger: Ledger, loaded: ClientConfig) -> None:
        told: list[tuple[str, Explained, ApiRequest | None]] = []
        async with CoordinatorClient(loaded.coordinator, loaded) as coordinator:
            frozen = await ledger.excluded((await coordinator.info()).domain, int(time.time()))
            for model, asked in _asked(request, route, loaded):
                demand = demand_of(loaded, model, route, choice)
                listed = await coordinator.explain(demand.to_json(ledger.payer))
                told += [(model, one, asked) for one in explained(listed, demand, frozen, int(time.time()))]
        _tell(told, request, loaded, as_json=as_json)

    with_books(config, wallet, coordinator_url, ask)


def _add_prices(choice: Choice, most_input: str | None, most_output: str | None) -> None:
    if most_input is not None:
        choice["max_input_price"] = parse_amount(most_input)
    if most_output is not None:
        choice["max_output_price"] = parse_amount(most_output)


def _asked(request: str, route: str, config: ClientConfig) -> list[tuple[str, ApiRequest | None]]:
    """The models that would be asked, in order, with the request if it is given whole. Raises BadMessage."""
    from tallystick.client.gateway.aliases import AliasRouter
    from tallystick.client.gateway.routing_rules import load_rule
    from tallystick.client.openai.requests import ApiRequest
    from tallystick.protocol.wire import dumps

    whole = request == "-" or Path(request).is_file()
    if not whole and (request.endswith(".json") or request.startswith((".", "/", "~"))):
        raise BadMessage(f"{request}: no such file")
    try:
        body = sys.stdin.buffer.read() if request == "-" else Path(request).read_bytes() if whole else dumps({"model": request})
    except OSError as error:
        raise BadMessage(f"{request}: {error.strerror}") from None
    names = AliasRouter(config.aliases, {one.name: load_rule(one.rule) for one in config.aliases if one.rule is not None})
    made = [(one, ApiRequest.of(route, one)) for one in names.plan(body, (), 0).bodies]
    return [(asked.summary.model, asked if whole else None) for _, asked in made]


def _tell(told: list[tuple[str, Explained, ApiRequest | None]], request: str, config: ClientConfig, *, as_json: bool) -> None:
    from tallystick.client.jobs.candidates import estimate_cost

    documents: list[dict[str, Any]] = []
    rows: list[dict[str, object]] = []
    against: list[str] = []
    for model, one, asked in told:
        worst, dear = (None, "")
        if asked is not None:
            worst, dear = estimate_cost(asked, one.ask, config.default_max_output_tokens, config.max_cost)
        why = one.why or dear
        documents.append({"model": model, "atMost": None if worst is None else str(int(worst))} | _json(one, why))
        row = {"provider": one.ask.provider, "model": model, "offered": "no" if why else "yes"}
        rows.append(row | {"at most": "" if worst is None else _dollars(worst)} | _row(one))
        against += [f"{one.ask.provider} ({model}): {why}"] if why else []
    if not documents:
        raise Refusal(Code.UNKNOWN_MODEL, f"nobody offers {request}; tally models shows what there is")
    if as_json:
        show_json(documents)
        return
    dull = {name for name in rows[0] if name not in ("provider", "offered") and {row[name] for row in rows} <= {"", "unknown"}}
    dull |= {"model"} if len({model for model, _, _ in told}) == 1 else set()
    columns = [name for name in rows[0] if name not in dull]
    show_rows(
        columns, [[row[name] for name in columns] for row in rows], title=f"{request}: dollars, per million tokens", keyed=True
    )
    for line in against:
        out.print(f"no: {harmless(line)}", highlight=False, soft_wrap=True, markup=False)


def _row(one: Explained) -> dict[str, object]:
    spec, ask = one.ask.spec, one.ask
    return {
        "input": _dollars(ask.input_price),
        "output": _dollars(ask.output_price),
        "region": spec.region,
        "tier": spec.tier,
        "precision": spec.precision,
        "tokens/s": one.tokens_per_second or "unknown",
        "first ms": one.first_token_ms or "unknown",
        "good %": one.reputation,
    }


def _json(one: Explained, why: str) -> dict[str, Any]:
    return {
        "provider": one.ask.provider,
        "offered": not why,
        "why": why or None,
        "free": one.free,
        "tokensPerSecond": one.tokens_per_second,
        "firstTokenMs": one.first_token_ms,
        "reputation": one.reputation,
        "ask": one.ask.to_json(),
    }


def _dollars(units: int) -> str:
    return format_amount(Amount(units))
