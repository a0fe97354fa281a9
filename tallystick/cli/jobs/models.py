"""`tally models` and `tally explain`: what is for sale, and which providers would be offered a request."""

from __future__ import annotations

import asyncio
import sys
import time
from dataclasses import dataclass, field, replace
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tallystick.cli.jobs.audited_providers import describe_model_audits, provider_json, read_own_audits, warn_of_named
from tallystick.cli.jobs.jobs import with_ledger
from tallystick.cli.onchain import parse_account
from tallystick.cli.options import DEFAULT_WALLET, Config, CoordinatorUrl, Json, Wallet
from tallystick.cli.output import out, short_decimal, show_json, show_table, strip_control
from tallystick.cli.progress import run_shown
from tallystick.protocol.criteria import audience
from tallystick.protocol.errors import BadMessage, Code, Refusal
from tallystick.protocol.features import EVIDENCE
from tallystick.protocol.types import ZERO_ADDRESS, format_amount, parse_amount
from tallystick.runtime.keystore import keystore_path

if TYPE_CHECKING:
    from tallystick.client.audits.provider_audits import ProviderAudits
    from tallystick.client.config import ClientConfig
    from tallystick.client.coordinator.access_tier import AccessTier
    from tallystick.client.ledger.ledger import Ledger
    from tallystick.client.openai.requests import ApiRequest
    from tallystick.client.selection.options import AskExplanation, ProviderCriteria

Texts = list[str] | None


def models(
    config: Config = None, wallet: Wallet = DEFAULT_WALLET, coordinator_url: CoordinatorUrl = None, as_json: Json = False
) -> None:
    """List the models on offer: providers, jobs that wait, lowest prices (dollars per million tokens), and the best ratings.

    Integrity is by audits that the coordinator counts, availability by jobs, both in percent; evidence says whether a provider
    commits to log-probabilities, by which its answers can be audited in full. If there is a wallet, its own audits are shown too,
    and which providers make answers that cannot be checked; no password is needed.
    """
    from tallystick.client.config import load_config
    from tallystick.client.coordinator.http_client import CoordinatorClient

    loaded = load_config(config, {"coordinator": coordinator_url})

    async def ask() -> list[Any]:
        async with CoordinatorClient(loaded.coordinator, loaded) as coordinator:
            return await coordinator.models()

    offers = run_shown("asking the coordinator", ask())
    audited = _own_audits(loaded, wallet)
    if as_json:
        show_json([offer.to_json() | _own_audits_json(audited, offer.id) for offer in offers])
        return
    if not offers:
        out.print(f"no provider sells a model at {loaded.coordinator} now", highlight=False)
        return
    rows = (
        (
            offer.id,
            f"{offer.live} of {offer.providers}",
            offer.waiting,
            format_amount(offer.input_price),
            format_amount(offer.output_price),
            offer.context_tokens,
            offer.tokens_per_second or "unknown",
            offer.first_token_ms or "unknown",
            "unknown" if offer.availability is None else offer.availability,
            "unknown" if offer.integrity is None else f"{offer.integrity:g} ({offer.audits})",
            "yes" if EVIDENCE in offer.features else "no",
            *([] if audited is None else [describe_model_audits(_of_model(audited, offer.id))]),
        )
        for offer in offers
    )
    columns = ("model", "free providers", "waiting jobs", "input", "output", "context", "tokens/s", "first token, ms")
    ratings = ("available %", "integrity % (audits)", "evidence", *([] if audited is None else ["own audits"]))
    show_table((*columns, *ratings), rows, title="Models on offer; prices in dollars per million tokens")
    on_offer = {offer.id for offer in offers}
    warn_of_named(provider for provider in audited or () if provider.model in on_offer)


def _own_audits(config: ClientConfig, wallet: str) -> list[ProviderAudits] | None:
    """The audits of a wallet by provider; None without a wallet. Raises Unavailable."""
    if wallet == DEFAULT_WALLET and not keystore_path(wallet).exists():
        return None
    return asyncio.run(read_own_audits(config, parse_account(wallet, "--wallet")))


def _of_model(audited: list[ProviderAudits], model: str) -> list[ProviderAudits]:
    return [provider for provider in audited if provider.model == model]


def _own_audits_json(audited: list[ProviderAudits] | None, model: str) -> dict[str, Any]:
    return {"ownAudits": None if audited is None else [provider_json(provider) for provider in _of_model(audited, model)]}


def explain(
    request: Annotated[
        str, typer.Argument(help="A model, an alias of the config, or a file with a request's JSON body (- for stdin).")
    ],
    route: Annotated[str, typer.Option(help="Route of the request.")] = "/v1/chat/completions",
    max_input_price: Annotated[str | None, typer.Option(help="Highest price, in dollars per million input tokens.")] = None,
    max_output_price: Annotated[str | None, typer.Option(help="Highest price, in dollars per million output tokens.")] = None,
    region: Annotated[Texts, typer.Option(help="Only providers in this region (repeatable).")] = None,
    tier: Annotated[Texts, typer.Option(help="Only providers of this tier (repeatable).")] = None,
    precision: Annotated[Texts, typer.Option(help="Only models of this precision (repeatable).")] = None,
    feature: Annotated[Texts, typer.Option(help="Only models with this feature (repeatable; all are required).")] = None,
    min_context: Annotated[int, typer.Option("--min-context", min=0, help="Smallest context, in tokens.")] = 0,
    pin: Annotated[Texts, typer.Option(help="Only this provider (repeatable).")] = None,
    exclude: Annotated[Texts, typer.Option(help="Not this provider (repeatable).")] = None,
    min_stake: Annotated[str | None, typer.Option(help="Smallest stake of a provider, in dollars.")] = None,
    min_integrity: Annotated[int, typer.Option(min=0, max=100, help="Least integrity by audits, in percent.")] = 0,
    sort: Annotated[str | None, typer.Option(help="Order: price, latency or speed.")] = None,
    weight: Annotated[
        Texts,
        typer.Option(
            metavar="NAME=DOLLARS",
            help="Worth of a second to the first token (first_token) or of output (speed), or of a failed job (loss).",
        ),
    ] = None,
    batch: Annotated[
        bool, typer.Option("--batch", help="As a job of the class `batch`, with asks for batch jobs alone.")
    ] = False,
    config: Config = None,
    wallet: Wallet = DEFAULT_WALLET,
    coordinator_url: CoordinatorUrl = None,
    as_json: Json = False,
) -> None:
    """Show which providers would be offered a request, and why the others would not. Sends no order.

    Needs no wallet. If there is one, the providers that its ledger blocks are shown as such; no password is needed.
    """
    from tallystick.client.config import load_config
    from tallystick.client.selection.options import ProviderCriteria
    from tallystick.protocol.requirements import Requirements
    from tallystick.protocol.weights import Weights

    require = Requirements(
        region=tuple(region or ()),
        tier=tuple(tier or ()),
        precision=tuple(precision or ()),
        features=tuple(feature or ()),
        context_tokens=min_context,
    )
    choice = ProviderCriteria(pin=pin or (), exclude=exclude or (), require=require, min_integrity=min_integrity)
    _add_amounts(choice, max_input_price, max_output_price, min_stake)
    if sort is not None:
        choice["sort"] = sort
    if weight:
        choice["weights"] = Weights.from_dollars(_pairs(weight), "--weight")

    async def ask(ledger: Ledger | None, loaded: ClientConfig) -> None:
        explained = await _explain(_requests(request, route, loaded), route, choice, ledger, loaded, batch=batch)
        _show(explained, request, loaded, as_json=as_json)

    if wallet == DEFAULT_WALLET and not keystore_path(wallet).exists():  # without a wallet, no provider is blocked
        asyncio.run(ask(None, load_config(config, {"coordinator": coordinator_url})))
    else:
        with_ledger(config, wallet, coordinator_url, ask)


@dataclass(slots=True)
class _Explained:
    """What each provider would be told, by the models of a request in their order."""

    answers: list[tuple[str, AskExplanation, ApiRequest | None]] = field(default_factory=list)
    tiers: dict[str, AccessTier] = field(default_factory=dict)
    """The wallet's access tier, by the models for which a coordinator has tiers."""
    upstreams: list[str] = field(default_factory=list)
    """Models of other services, which no provider sells."""


async def _explain(
    requests: list[tuple[str, ApiRequest | None]],
    route: str,
    choice: ProviderCriteria,
    ledger: Ledger | None,
    config: ClientConfig,
    *,
    batch: bool,
) -> _Explained:
    """Asks the coordinator who would be offered the requests. Raises TallyError."""
    from tallystick.client.coordinator.http_client import CoordinatorClient
    from tallystick.client.selection.options import demand_for, demand_of, explain_asks
    from tallystick.client.upstream_settings import UpstreamTarget

    explained = _Explained()
    async with CoordinatorClient(config.coordinator, config) as coordinator:
        domain = (await coordinator.info()).domain
        blocked = {} if ledger is None else await ledger.excluded(domain, int(time.time()))
        for model, asked in requests:
            if UpstreamTarget.parse(model) is not None:
                explained.upstreams.append(model)
                continue
            demand = demand_of(config, model, route, choice)
            demand = replace(demand, batch=True) if batch else demand
            if asked is not None:
                demand = demand_for(demand, asked.summary)
            payer = ZERO_ADDRESS if ledger is None else ledger.payer
            listed, access = await coordinator.explain_access(demand.to_json(payer))
            if access is not None:
                explained.tiers[model] = access
            asks = explain_asks(listed, demand, blocked, int(time.time()))
            explained.answers += [(model, provider, asked) for provider in asks]
    return explained


def _pairs(settings: list[str]) -> dict[str, str]:
    """Reads NAME=DOLLARS. Raises BadMessage for a text without an equals sign."""
    pairs: dict[str, str] = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals:
            raise BadMessage(f"--weight: expected NAME=DOLLARS, such as first_token=0.001, got {setting[:100]!r}")
        pairs[name.strip()] = value.strip()
    return pairs


def _add_amounts(choice: ProviderCriteria, max_input: str | None, max_output: str | None, min_stake: str | None) -> None:
    if max_input is not None:
        choice["max_input_price"] = parse_amount(max_input, field="--max-input-price")
    if max_output is not None:
        choice["max_output_price"] = parse_amount(max_output, field="--max-output-price")
    if min_stake is not None:
        choice["min_stake"] = parse_amount(min_stake, field="--min-stake")


def _requests(request: str, route: str, config: ClientConfig) -> list[tuple[str, ApiRequest | None]]:
    """The models to try, in order, each with its request if a whole body was given. Raises BadMessage."""
    from tallystick.client.gateway.aliases import AliasRouter
    from tallystick.client.gateway.routing_rules import load_rule
    from tallystick.client.openai.requests import ApiRequest
    from tallystick.protocol.wire import dumps

    is_body = request == "-" or Path(request).is_file()
    if not is_body and (request.endswith(".json") or request.startswith((".", "/", "~"))):
        raise BadMessage(f"REQUEST: no such file: {request}")
    try:
        body = sys.stdin.buffer.read() if request == "-" else Path(request).read_bytes() if is_body else dumps({"model": request})
    except OSError as error:
        raise BadMessage(f"REQUEST: {request}: {error.strerror}") from None
    names = AliasRouter(config.aliases, {alias.name: load_rule(alias.rule) for alias in config.aliases if alias.rule is not None})
    planned = [ApiRequest.of(route, candidate) for candidate in names.plan(body, (), 0).bodies]
    return [(asked.summary.model, asked if is_body else None) for asked in planned]


def _show(explained: _Explained, request: str, config: ClientConfig, *, as_json: bool) -> None:
    from tallystick.client.jobs.candidates import estimate_cost

    documents: list[dict[str, Any]] = []
    rows: list[dict[str, object]] = []
    refusals: list[str] = []
    for model, provider, asked in explained.answers:
        max_cost, too_dear = (None, "")
        if asked is not None:
            max_cost, too_dear = estimate_cost(asked, provider.ask, config.default_max_output_tokens, config.max_cost)
        access = explained.tiers.get(model)
        why = (access.refusal if access is not None else "") or provider.reason or too_dear
        shown = {"model": model, "atMost": None if max_cost is None else str(int(max_cost))}
        documents.append(shown | _json(provider, why) | {"accessTier": None if access is None else access.to_json()})
        row = {"provider": provider.ask.provider, "model": model, "offered": "no" if why else "yes"}
        rows.append(row | {"at most": "" if max_cost is None else format_amount(max_cost)} | _row(provider))
        refusals += [f"{provider.ask.provider} ({model}): {why}"] if why else []
    if not documents:
        raise Refusal(Code.UNKNOWN_MODEL, f"REQUEST: no provider offers {request}; see what is on offer: tally models")
    if as_json:
        show_json(documents)
        return
    omitted = {name for name in rows[0] if name not in ("provider", "offered") and {row[name] for row in rows} <= {"", "unknown"}}
    omitted |= {"model"} if len({model for model, _, _ in explained.answers}) == 1 else set()
    columns = [name for name in rows[0] if name not in omitted]
    title = f"{request}; prices in dollars per million tokens, `at most` in dollars"
    show_table(columns, [[row[name] for name in columns] for row in rows], title=title)
    answers = explained.answers
    _show_scores([provider for _, provider, _ in answers], names=[model for model, _, _ in answers])
    for line in refusals:
        out.print(f"no: {strip_control(line)}", highlight=False, soft_wrap=True, markup=False)
    for access in dict.fromkeys(explained.tiers.values()):
        line = f"this wallet's access tier: {access.name}; {access.next}"
        out.print(strip_control(line), highlight=False, soft_wrap=True, markup=False)
    if explained.upstreams:
        names = ", ".join(explained.upstreams)
        out.print(f"then, without the market: {names} (unsealed, unsigned)", highlight=False, soft_wrap=True, markup=False)


def _show_scores(explained: list[AskExplanation], names: list[str]) -> None:
    """Shows the terms by which the coordinator ranks the asks, of each model the lowest total first."""
    from tallystick.client.selection.options import SCORE_TERMS

    for model in dict.fromkeys(names):
        scored = [provider for provider, name in zip(explained, names, strict=True) if name == model and provider.score]
        if not scored:
            continue
        input_tokens, output_tokens = scored[0].expected
        ranked = sorted(scored, key=lambda provider: (bool(provider.reason), Decimal(provider.score.get("total", "0"))))
        rows = [
            [provider.ask.provider, *(short_decimal(provider.score.get(name, "0")) for name in SCORE_TERMS)]
            for provider in ranked
        ]
        title = f"Score for {input_tokens} input and {output_tokens} output tokens, in dollars; the lowest total is first"
        columns = ("provider", "price", "loss", "integrity", "first token", "speed", "load", "total")
        show_table(columns, rows, title=title if len(set(names)) == 1 else f"{model}: {title}")


def _row(provider: AskExplanation) -> dict[str, object]:
    spec, ask = provider.ask.spec, provider.ask
    return {
        "input": format_amount(ask.input_price),
        "output": format_amount(ask.output_price),
        "price for": audience(ask),
        "region": spec.region,
        "tier": spec.tier,
        "precision": spec.precision,
        "tokens/s": provider.tokens_per_second or "unknown",
        "first token, ms": provider.first_token_ms or "unknown",
        "available %": provider.reputation,
        "integrity %": "unknown" if provider.integrity is None else f"{provider.integrity:g}",
        "audits": provider.audits,
    }


def _json(provider: AskExplanation, why: str) -> dict[str, Any]:
    return {
        "provider": provider.ask.provider,
        "offered": not why,
        "why": why or None,
        "free": provider.free,
        "tokensPerSecond": provider.tokens_per_second,
        "firstTokenMs": provider.first_token_ms,
        "reputation": provider.reputation,
        "availability": provider.reputation,
        "integrity": provider.integrity,
        "audits": provider.audits,
        "measured": provider.measured,
        "score": dict(provider.score),
        "expected": dict(zip(("inputTokens", "outputTokens"), provider.expected, strict=True)),
        "audience": audience(provider.ask),
        "ask": provider.ask.to_json(),
    }
