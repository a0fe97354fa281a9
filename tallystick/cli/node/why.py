"""`tally node why`: why recent jobs were matched to this node or to others, by the coordinator's decision log."""

from __future__ import annotations

from collections import Counter
from datetime import datetime
from typing import Annotated, Any

import typer

from tallystick.cli.onchain import parse_account
from tallystick.cli.options import DEFAULT_WALLET, Config, Json, Wallet
from tallystick.cli.output import out, short_decimal, show_json, show_table
from tallystick.cli.progress import run_shown


def why(
    config: Config = None,
    wallet: Wallet = DEFAULT_WALLET,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, max=500, help="Number of decisions, newest first.")] = 20,
    at: Annotated[
        str | None,
        typer.Option(metavar="INPUT,OUTPUT", help="Judge the decisions at these prices, in dollars per million tokens."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show why recent jobs were matched to this node or to others, with the coordinator's reasons. Needs no password.

    With --at, shows which shortlists would have offered this node to the client at other prices.
    """
    from node.service.config import load_config

    loaded, provider = load_config(config), parse_account(wallet, "--wallet")
    query = f"limit={limit}" + ("" if at is None else _price_query(at))
    answer = run_shown("asking the coordinator", fetch_decisions(loaded.coordinator, provider, query))
    if as_json:
        show_json(answer)
        return
    decisions = answer["decisions"]
    show_ratings(answer)
    rows = ((_when(entry), entry["model"], entry["stage"], entry["why"]) for entry in decisions)
    show_table(("when", "model", "stage", "result"), rows)
    _show_scores(decisions)
    if not answer["connected"]:
        text = f"The node of {provider} is not connected, so it gets no jobs: check --wallet, then run tally node doctor."
        out.print(text, highlight=False)
    elif not decisions:
        out.print("No request for its models has come since the coordinator started.", highlight=False)
    else:
        counts = Counter(entry["why"].partition(", place")[0] for entry in decisions)
        show_table(("times", "reason"), ((count, reason) for reason, count in counts.most_common()))


def _when(entry: dict[str, Any]) -> str:
    return f"{datetime.fromtimestamp(entry['at']).astimezone():%m-%d %H:%M:%S}"


def _show_scores(decisions: list[dict[str, Any]]) -> None:
    """Shows the terms by which this node was ranked, and those of the provider that came first instead."""
    scored = [entry for entry in decisions if entry.get("score")]
    if not scored:
        return
    terms = ("price", "loss", "integrity", "firstToken", "speed", "load", "total")
    rows = []
    for entry in scored:
        whose = "this node and the first" if entry["score"] == entry["best"] else "this node"
        rows.append([_when(entry), entry["stage"], whose, *(short_decimal(entry["score"].get(term, "0")) for term in terms)])
        if entry["best"] and entry["best"] != entry["score"]:
            rows.append(["", "", "the first", *(short_decimal(entry["best"].get(term, "0")) for term in terms)])
    columns = ("when", "stage", "whose score", "price", "loss", "integrity", "first token", "speed", "load", "total")
    show_table(columns, rows, title="How this node was ranked: expected cost of the request in dollars, lowest total first")


def show_ratings(answer: dict[str, Any], rater: str = "the coordinator") -> None:
    """Shows how a coordinator rates a provider: integrity by audits, availability by jobs, and speed, each by itself."""
    from tallystick.protocol.types import format_amount

    if not answer.get("ratings"):
        return
    rows = [
        (
            rating["model"],
            rating["precision"],
            f"{rating['integrity']:g}",
            rating["audits"],
            answer["availability"],
            rating["tokensPerSecond"] or "unknown",
            rating["firstTokenMs"] or "unknown",
            "the coordinator" if rating["measured"] else "the node",
        )
        for rating in answer["ratings"]
    ]
    columns = ("model", "precision", "integrity %", "audits", "available %", "tokens/s", "first token, ms", "speed measured by")
    show_table(columns, rows, title=f"How {rater} rates this node")
    priced = [rating for rating in answer["ratings"] if rating.get("audience")]
    if priced:  # an older coordinator does not tell
        prices = [
            (rating["model"], *(format_amount(int(rating[name])) for name in ("inputPrice", "outputPrice")), rating["audience"])
            for rating in priced
        ]
        title = "Prices that are not for everybody, in dollars per million tokens"
        show_table(("model", "input", "output", "price for"), prices, title=title)


def _price_query(prices: str) -> str:
    """Returns the query of --at. Raises BadMessage for other text than two prices."""
    from tallystick.protocol.errors import BadMessage
    from tallystick.protocol.types import parse_amount

    input_price, comma, output_price = prices.partition(",")
    if not comma:
        raise BadMessage(f"--at: expected the prices of input and output, such as 0.2,0.6, got {prices[:100]!r}")
    amounts = parse_amount(input_price, field="--at"), parse_amount(output_price, field="--at")
    return f"&inputPrice={amounts[0]}&outputPrice={amounts[1]}"


async def fetch_decisions(coordinator: str, provider: str, query: str) -> Any:
    """What a coordinator says of a provider: its latest decisions, and how it rates it. Raises TallyError."""
    return await _fetch(f"{coordinator.rstrip('/')}/v1/providers/{provider}/why?{query}")


async def _fetch(url: str) -> Any:
    """A coordinator's JSON answer. Raises Unavailable, or the error that it answers with."""
    import aiohttp

    from tallystick.protocol.errors import Code, Unavailable, error_from_json
    from tallystick.protocol.proxies import uses_proxy

    try:
        timeout = aiohttp.ClientTimeout(total=15)
        async with aiohttp.ClientSession(timeout=timeout, trust_env=uses_proxy(url)) as session, session.get(url) as response:
            body = await response.json()
    except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
        raise Unavailable(Code.COORDINATOR_UNAVAILABLE, f"{url}: {error or type(error).__name__}") from None
    if response.status != 200:
        raise error_from_json(body, response.status)
    return body
