"""What is for sale: `tally models`, and `tally explain`, which says who would get a request and why the others would not."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tallystick.cli.jobs import with_books
from tallystick.cli.options import DEFAULT_WALLET, Config, Json, Wallet
from tallystick.cli.output import out, show_json, show_rows
from tallystick.protocol.types import Amount, format_amount, parse_amount

if TYPE_CHECKING:
    from tallystick.client.choice import Choice, Explained
    from tallystick.client.config import ClientConfig
    from tallystick.client.ledger import Ledger

CoordinatorUrl = Annotated[str | None, typer.Option("--coordinator", help="The coordinator's address.")]
Several = list[str] | None


def models(config: Config = None, coordinator_url: CoordinatorUrl = None, as_json: Json = False) -> None:
    """Lists the models on offer: their lowest prices (dollars per million tokens), providers, and the best speeds measured."""
    import asyncio

    from tallystick.client.config import load_config
    from tallystick.client.transport import Coordinator

    loaded = load_config(config, {"coordinator": coordinator_url})

    async def ask() -> list[Any]:
        async with Coordinator(loaded.coordinator, loaded) as coordinator:
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
    columns = ("model", "free providers", "input", "output", "context", "tokens/s", "first ms")
    show_rows(columns, rows, title="dollars per million tokens", keyed=True)


def explain(
    model: Annotated[str, typer.Argument(help="The model that a request would name.")],
    route: Annotated[str, typer.Option(help="The request's route.")] = "/v1/chat/completions",
    max_input_price: Annotated[str | None, typer.Option(help="At most so many dollars per million input tokens.")] = None,
    max_output_price: Annotated[str | None, typer.Option(help="At most so many dollars per million output tokens.")] = None,
    region: Annotated[Several, typer.Option(help="Only in this region (repeatable).")] = None,
    tier: Annotated[Several, typer.Option(help="Only of this tier (repeatable).")] = None,
    precision: Annotated[Several, typer.Option(help="Only of this precision (repeatable).")] = None,
    feature: Annotated[Several, typer.Option(help="Only with this feature (repeatable, all are needed).")] = None,
    context: Annotated[int, typer.Option(min=0, help="At least so many tokens of context.")] = 0,
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
    from tallystick.client.choice import Choice, demand_of, explained
    from tallystick.client.transport import Coordinator
    from tallystick.protocol.requirements import Requirements
    from tallystick.protocol.wire import MAX_CANDIDATES

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
        demand = demand_of(loaded, model, route, choice)
        async with Coordinator(loaded.coordinator, loaded) as coordinator:
            frozen = await ledger.frozen((await coordinator.info()).domain)
            listed = await coordinator.explain(demand.to_json(ledger.payer, MAX_CANDIDATES))
        told = explained(listed, demand, frozen, int(time.time()))
        if as_json:
            show_json([_json(one) for one in told])
        elif told:
            columns = ("provider", "offered", "input", "output", "region", "tier", "precision", "tokens/s", "first ms", "good %")
            show_rows(columns, map(_row, told), title=f"{model}, dollars per million tokens", keyed=True)
        else:
            out.print(f"nobody offers {model}; tally models shows what there is", highlight=False)

    with_books(config, wallet, coordinator_url, ask)


def _add_prices(choice: Choice, most_input: str | None, most_output: str | None) -> None:
    if most_input is not None:
        choice["max_input_price"] = parse_amount(most_input)
    if most_output is not None:
        choice["max_output_price"] = parse_amount(most_output)


def _row(one: Explained) -> tuple[object, ...]:
    spec, ask = one.ask.spec, one.ask
    speeds = (one.tokens_per_second or "unknown", one.first_token_ms or "unknown", one.reputation)
    prices = (_dollars(ask.input_price), _dollars(ask.output_price))
    return ask.provider, one.why or "yes", *prices, spec.region, spec.tier, spec.precision, *speeds


def _json(one: Explained) -> dict[str, Any]:
    return {
        "provider": one.ask.provider,
        "offered": not one.why,
        "why": one.why or None,
        "free": one.free,
        "tokensPerSecond": one.tokens_per_second,
        "firstTokenMs": one.first_token_ms,
        "reputation": one.reputation,
        "ask": one.ask.to_json(),
    }


def _dollars(units: int) -> str:
    return format_amount(Amount(units))
