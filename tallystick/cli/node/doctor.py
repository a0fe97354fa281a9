"""`tally node doctor`: everything that a node needs to earn, looked at from outside."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from tallystick.cli.onchain import account_of, open_escrow
from tallystick.cli.options import DEFAULT_WALLET, Config, Json, Wallet
from tallystick.cli.output import show_json, show_rows, step
from tallystick.protocol.errors import BadMessage, Code, Refusal, TallyError
from tallystick.protocol.types import Address, Amount, format_amount

if TYPE_CHECKING:
    from node.service.config import EngineConfig, NodeConfig
    from tallystick.client.coordinator.http_client import CoordinatorInfo

SKEW_SECONDS = 20
"""A clock that is further off makes orders and asks look expired."""
DISK_BYTES = 500 << 20


@dataclass
class Diagnosis:
    """What was looked at, and what to do about what is wrong. `ok`: False for what keeps the node from earning."""

    found: list[tuple[str, bool, str, str]] = field(default_factory=list)

    def add(self, check: str, ok: bool, said: str, remedy: str = "") -> None:
        """One check."""
        self.found.append((check, ok, said, remedy))

    async def tried(self, check: str, look: Callable[[], Awaitable[str]], remedy: str) -> None:
        """A check that fails with an error of ours, or says what it found."""
        try:
            self.add(check, True, await look())
        except TallyError as error:
            self.add(check, False, str(error), remedy)

    @property
    def ready(self) -> bool:
        """Whether nothing is in the way."""
        return all(ok for _, ok, _, _ in self.found)


def doctor(
    config: Config = None,
    wallet: Wallet = DEFAULT_WALLET,
    as_json: Json = False,
) -> None:
    """Looks at everything that a node needs to earn, and says "ready", or what to do about it (exit code 1). Needs no password.

    Wallet, disk, chain and contract, clock, coordinator, engines (each is asked for one token), and prices against the market.
    """
    diagnosis = Diagnosis()
    asyncio.run(_examine(diagnosis, config, wallet))
    if as_json:
        names = ("check", "ok", "found", "remedy")
        show_json({"ready": diagnosis.ready, "checks": [dict(zip(names, one, strict=True)) for one in diagnosis.found]})
    else:
        rows = ((check, "ok" if ok else "PROBLEM", said, "" if ok else remedy) for check, ok, said, remedy in diagnosis.found)
        show_rows(("check", "", "found", "what to do"), rows)
        if diagnosis.ready:
            step("ready")
    if not diagnosis.ready:
        raise typer.Exit(1)


async def _examine(diagnosis: Diagnosis, path: Path | None, wallet: str) -> None:
    try:
        from node.service.config import load_config

        loaded = load_config(path)
        diagnosis.add("config", True, str(path) if path else "defaults and environment")
    except TallyError as error:
        diagnosis.add("config", False, str(error), "mend the file; node/example.toml explains every setting")
        return
    provider: Address | None = None
    try:
        provider = account_of(wallet, "--wallet")
        diagnosis.add("wallet", True, provider)
    except TallyError as error:
        diagnosis.add("wallet", False, str(error), f"tally wallet new {wallet}")
    _look_at_disk(diagnosis, loaded.state)
    await _look_at_chain(diagnosis, loaded, provider)
    market = await _look_at_coordinator(diagnosis, loaded, provider)
    await _look_at_engines(diagnosis, loaded, market)


def _look_at_disk(diagnosis: Diagnosis, state: Path) -> None:
    folder = next(parent for parent in (state, *state.absolute().parents) if parent.exists())
    free = shutil.disk_usage(folder).free
    diagnosis.add(
        "disk", free >= DISK_BYTES, f"{free >> 20} MiB free at {folder}", "make room: receipts are money, kept on this disk"
    )
    writable = os.access(folder, os.W_OK)
    diagnosis.add("state", writable, str(state), f"make {folder} writable for this user, or set `state` in the config")


async def _look_at_chain(diagnosis: Diagnosis, loaded: NodeConfig, provider: Address | None) -> None:
    try:
        async with open_escrow(loaded.deployment, loaded.rpc) as escrow:
            where = f"contract {escrow.deployment.escrow} on chain {escrow.deployment.chain_id}"
            diagnosis.add("chain", True, f"{where}, at {escrow.rpc.url}")
            ahead = await escrow.rpc.now() - time.time()
            local = escrow.deployment.chain_id == 31_337
            diagnosis.add(
                "chain's clock",
                local or abs(ahead) < 300,
                f"{ahead:+.0f} s from here",
                "set this machine's clock (NTP), or try another RPC",
            )
            if provider is not None:
                account, coins = await asyncio.gather(escrow.provider(provider), escrow.rpc.balance(provider))
                diagnosis.add(
                    "stake", True, f"{format_amount(account.stake)} staked, {format_amount(account.credit)} to cash out"
                )
                diagnosis.add(
                    "gas",
                    True,
                    "has coins"
                    if coins
                    else "no coins: the coordinator collects for you, and what it leaves until an order expires is lost; "
                    "`collect` and `cash-out` need some",
                )
            rules = await escrow.rules()
            short = rules.release < loaded.claim_margin
            diagnosis.add(
                "reservations",
                True,
                f"a payer gets one back {rules.release} s after it said so; the longest job and its settlement take "
                f"{loaded.claim_margin} s" + (" (longer: what is reserved secures short jobs only)" if short else ""),
            )
    except TallyError as error:
        diagnosis.add("chain", False, str(error), "check `deployment` and `rpc` in the config; is the chain reachable from here?")


async def _look_at_coordinator(diagnosis: Diagnosis, loaded: NodeConfig, provider: Address | None) -> dict[str, Any] | None:
    """The market's models by name; None if the coordinator does not say."""
    import aiohttp

    from tallystick.chain.deployment import Deployment
    from tallystick.client.config import ClientConfig
    from tallystick.client.coordinator.http_client import CoordinatorClient

    remedy = "check `coordinator` in the config, and that this machine may reach it"
    try:
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=10)) as session,
            session.get(f"{loaded.coordinator.rstrip('/')}/v1/info") as response,
        ):
            date = response.headers.get("date")
        async with CoordinatorClient(loaded.coordinator, ClientConfig()) as coordinator:
            info = await coordinator.info()
            models = {offer.id: offer.to_json() for offer in await coordinator.models()}
            connected = provider is not None and await coordinator.connected(provider)
    except (aiohttp.ClientError, TimeoutError, OSError, ValueError, TallyError) as error:
        diagnosis.add("coordinator", False, f"{loaded.coordinator}: {error or type(error).__name__}", remedy)
        return None
    with contextlib.suppress(TallyError, OSError):
        deployment = Deployment.load(loaded.deployment)
        same = info.domain == deployment.domain
        diagnosis.add(
            "coordinator",
            same,
            f"{loaded.coordinator}, {len(models)} models on offer",
            "it settles elsewhere: you need its deployment file",
        )
    await _look_at_fee(diagnosis, loaded, info)
    if date:
        skew = time.time() - parsedate_to_datetime(date).timestamp()
        diagnosis.add(
            "clock", abs(skew) < SKEW_SECONDS, f"{skew:+.0f} s from the coordinator's", "set this machine's clock (NTP)"
        )
    diagnosis.add(
        "link",
        True,
        "this node's asks stand in the book" if connected else "no ask of this wallet stands: start `tally node run`",
    )
    return models


async def _look_at_fee(diagnosis: Diagnosis, loaded: NodeConfig, info: CoordinatorInfo) -> None:
    """What the coordinator says that it keeps, what it has registered, and what this node bears, in basis points."""
    told, most = info.fee_bps, loaded.admission.max_fee_bps
    remedy = "raise max_fee_bps under [admission] in the config, or work for another coordinator"
    with contextlib.suppress(TallyError):
        async with open_escrow(loaded.deployment, loaded.rpc) as escrow:
            registered = (await escrow.provider(info.coordinator)).fee_bps
        said = f"{registered} bps are registered, it tells clients {told}; {most} are borne"
        diagnosis.add("fee", max(told, registered) <= most, said, remedy)


async def _look_at_engines(diagnosis: Diagnosis, loaded: NodeConfig, market: dict[str, Any] | None) -> None:
    from node.engines.discover import discover
    from node.service.config import EngineConfig

    engines = loaded.engines
    if not engines:
        with contextlib.suppress(TallyError):
            engines = tuple(EngineConfig(url=found.url, api_key=found.api_key) for found in await discover(os.environ))
    if not engines:
        diagnosis.add(
            "engine",
            False,
            "none is configured and none answers on the usual ports",
            "start one, or name it: [[engines]] url = …",
        )
    for engine in engines:
        await diagnosis.tried(
            f"engine {engine.label}",
            partial(_try_engine, engine),
            "is it running, with a model loaded? is `url` right?",
        )
        for model in engine.models if market is not None else ():
            _look_at_price(diagnosis, model, (market or {}).get(model.sold_as))


async def _try_engine(engine: EngineConfig) -> str:
    """Asks an engine what it is, and for one token. Raises TallyError."""
    from node.domain.requests import prepare
    from node.engines.discover import inspect_engine
    from node.engines.openai_http import OpenAIEngine
    from node.ports import ResponseEnd
    from tallystick.protocol.wire import RequestHead, dumps

    settings = engine.settings(os.environ)
    finding = await inspect_engine(engine.url, settings.api_key, seconds=10)
    wanted = [model.name for model in engine.models] or [model.name for model in finding.models]
    listed = {model.name for model in finding.models}
    missing = sorted(set(wanted) - listed) if listed else []  # some engines list nothing and serve what is asked for
    if missing or not wanted:
        raise BadMessage(f"{finding.kind.value} at {finding.url} does not list {', '.join(missing) or 'any model'}")
    offer = engine.offer(
        engine.models[0] if engine.models else engine.model_defaults(wanted[0]), None, engine.spec, datetime.now(UTC), 0.0
    )
    asked = {"model": offer.model, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1, "stream": True}
    adapter, began = OpenAIEngine(settings), time.monotonic()
    try:
        async with asyncio.timeout(60):
            events = [
                event async for event in adapter.answer(prepare(RequestHead("/v1/chat/completions"), dumps(asked), offer, 1))
            ]
    except TimeoutError:
        raise Refusal(Code.TIMED_OUT, f"{finding.url} did not answer one token within 60 s") from None
    finally:
        await adapter.close()
    counted = (
        "tells usage"
        if isinstance(events[-1], ResponseEnd) and events[-1].usage
        else "tells no usage: tokens are counted by bytes"
    )
    seconds = time.monotonic() - began
    return f"{finding.kind.value} {finding.version}, {len(wanted)} model(s), one token in {seconds:.2f} s, {counted}"


def _look_at_price(diagnosis: Diagnosis, model: Any, offered: dict[str, Any] | None) -> None:
    """Above the market is no problem of the node's, but the likeliest reason why nobody buys."""
    if offered is None:
        diagnosis.add(f"price of {model.sold_as}", True, "nobody else sells it here")
        return
    ours, lowest = model.prices.output, int(offered["outputPrice"])
    said = f"{format_amount(Amount(ours))} per million output tokens; the lowest is {format_amount(Amount(lowest))}"
    diagnosis.add(f"price of {model.sold_as}", True, said + (" (above the market)" if ours > lowest else ""))
