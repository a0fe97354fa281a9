"""`tally node doctor`: checks everything that a node needs to earn."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from tallystick.cli.market_deployment import ensure_deployment_file
from tallystick.cli.node.init_identity import state_folders
from tallystick.cli.node.money_report import payout_text
from tallystick.cli.onchain import LOCAL_CHAIN_ID, open_escrow, parse_account
from tallystick.cli.options import DEFAULT_WALLET, Config, Json, Wallet
from tallystick.cli.output import counted, dollars, show_checks, show_json, step
from tallystick.cli.progress import run_shown
from tallystick.protocol.errors import BadMessage, Code, Refusal, TallyError
from tallystick.protocol.proxies import uses_proxy
from tallystick.protocol.types import Address
from tallystick.runtime.peer_probe import SKEW_SECONDS
from tallystick.runtime.ports import describe_holder

if TYPE_CHECKING:
    from node.domain.published_asks import Offer
    from node.engines.discover import DiscoveredEngine
    from node.engines.openai_http import OpenAIEngine
    from node.service.config import EngineConfig, NodeConfig
    from node.storage.state_folder import StateFolder
    from tallystick.chain.escrow import Escrow
    from tallystick.client.coordinator.info import CoordinatorInfo

MAX_CHAIN_SKEW_SECONDS = 300
MIN_DISK_BYTES = 500 << 20


@dataclass
class Diagnosis:
    """The results of the checks: name, whether it passed, what was found, and the remedy."""

    results: list[tuple[str, bool, str, str]] = field(default_factory=list)

    def add(self, check: str, ok: bool, finding: str, remedy: str = "") -> None:
        """Adds a result. `ok` is false for what keeps the node from earning."""
        self.results.append((check, ok, finding, remedy))

    async def run(self, check: str, act: Callable[[], Awaitable[str]], remedy: str) -> None:
        """Runs a check that returns its finding, or fails with a TallyError."""
        try:
            self.add(check, True, await act())
        except TallyError as error:
            self.add(check, False, str(error), remedy)

    @property
    def ready(self) -> bool:
        """Whether every check passed."""
        return all(ok for _, ok, _, _ in self.results)


def doctor(
    config: Config = None,
    wallet: Wallet = DEFAULT_WALLET,
    as_json: Json = False,
) -> None:
    """Check everything that a node needs to earn; report "ready", or each problem with its remedy. Needs no password.

    Checks wallet, disk, chain and contract, clock, coordinator, engines (each generates one token), and prices against the
    market. The exit code is 1 if there is a problem.
    """
    diagnosis = Diagnosis()
    run_shown("examining the node", _examine(diagnosis, config, wallet))
    if as_json:
        names = ("check", "ok", "found", "remedy")
        checks = [dict(zip(names, result, strict=True)) for result in diagnosis.results]
        show_json({"ready": diagnosis.ready, "checks": checks})
    else:
        show_checks(diagnosis.results)
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
        diagnosis.add("config", False, str(error), "correct the file; node/example.toml explains every setting")
        return
    provider: Address | None = None
    try:
        provider = parse_account(wallet, "--wallet")
        diagnosis.add("wallet", True, provider)
    except TallyError as error:
        diagnosis.add("wallet", False, str(error), f"tally wallet new {wallet}")
    _check_disk(diagnosis, loaded.state)
    running = _check_state(diagnosis, loaded, path, provider)
    _check_metrics_port(diagnosis, loaded, running=running)
    await _check_chain(diagnosis, loaded, provider)
    market = await _check_coordinator(diagnosis, loaded, provider, runs=lambda: running or _runs(loaded, path))
    await _check_engines(diagnosis, loaded, market)


def _check_disk(diagnosis: Diagnosis, state: Path) -> None:
    folder = next(parent for parent in (state, *state.absolute().parents) if parent.exists())
    free = shutil.disk_usage(folder).free
    remedy = "free some space: receipts are money, and they are kept on this disk"
    diagnosis.add("disk", free >= MIN_DISK_BYTES, f"{free >> 20} MiB free at {folder}", remedy)
    writable = os.access(folder, os.W_OK)
    remedy = f"make {folder} writable for this user, or set `state` in the config"
    diagnosis.add("disk access", writable, "writable" if writable else f"{folder} is not writable", remedy)


def _check_state(diagnosis: Diagnosis, loaded: NodeConfig, config: Path | None, provider: Address | None) -> bool:
    """Whether this node's state is its own, and its wallet no other node's. Returns whether this node runs now."""
    from node.storage.state_folder import describe_running, find_states, inspect_state

    state = inspect_state(loaded.state)
    foreign_config = _is_foreign(state, config)
    own_remedy = "give this node a `state` of its own in the config; tally node init writes such a config"
    if provider is not None and state.provider not in (None, provider):
        diagnosis.add(
            "state", False, f"{loaded.state} belongs to the wallet {state.provider}", f"name that wallet, or {own_remedy}"
        )
    elif foreign_config:
        text = describe_running(state) if state.running is not None else f"the config {state.config} uses this state"
        diagnosis.add("state", False, f"{loaded.state}: {text}", own_remedy)
    else:
        use = "" if state.running is None else f", in use by this node (process {state.running or 'unknown'})"
        diagnosis.add("state", True, f"{loaded.state}{use}")
    others = [
        other
        for other in find_states(state_folders())
        if other.running is not None and other.provider == provider and other.path.absolute() != loaded.state.absolute()
    ]
    for other in others if provider is not None else ():
        text = f"{describe_running(other)}, in {other.path}: two nodes with one wallet would sign one receipt number twice"
        diagnosis.add("wallet", False, text, "give each node a wallet of its own: tally wallet new NAME")
    return state.running is not None and not foreign_config


def _is_foreign(state: StateFolder, config: Path | None) -> bool:
    return state.config is not None and state.config != (config.absolute() if config else None)


def _runs(loaded: NodeConfig, config: Path | None) -> bool:
    """Whether this node runs now."""
    from node.storage.state_folder import inspect_state

    state = inspect_state(loaded.state)
    return state.running is not None and not _is_foreign(state, config)


def _check_metrics_port(diagnosis: Diagnosis, loaded: NodeConfig, *, running: bool) -> None:
    """Whether the port of the metrics is free for this node."""
    port = loaded.metrics_port
    if port is None or running:
        return
    with socket.socket(socket.AF_INET6 if ":" in loaded.metrics_host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((loaded.metrics_host, port))
        except OSError as error:
            finding = f"{loaded.metrics_host}:{port}: {describe_holder(port) or error.strerror}"
            diagnosis.add("metrics", False, finding, "set another metrics_port in the config, or stop that program")
        else:
            diagnosis.add("metrics", True, f"{loaded.metrics_host}:{port} is free")


async def _check_chain(diagnosis: Diagnosis, loaded: NodeConfig, provider: Address | None) -> None:
    try:
        await ensure_deployment_file(loaded.deployment, loaded.coordinator, loaded.rpc)
        async with open_escrow(loaded.deployment, loaded.rpc) as escrow:
            contract = f"contract {escrow.deployment.escrow} on chain {escrow.deployment.chain_id}"
            diagnosis.add("chain", True, f"{contract}, at {escrow.rpc.shown_url}")
            ahead = await escrow.rpc.now() - time.time()
            in_step = escrow.deployment.chain_id == LOCAL_CHAIN_ID or abs(ahead) < MAX_CHAIN_SKEW_SECONDS
            diagnosis.add(
                "chain's clock",
                in_step,
                f"{ahead:+.0f} s from this machine's",
                "set this machine's clock (NTP), or use another RPC endpoint",
            )
            if provider is not None:
                await _check_account(diagnosis, escrow, provider)
            await diagnosis.run("payout", partial(_check_payout, loaded, escrow), "set coin_price under [payout] in the config")
            rules = await escrow.rules()
            finding = (
                f"a payer can take one back {rules.release} s after announcing it; the longest job and its settlement take "
                f"{loaded.claim_margin} s"
            )
            short = rules.release < loaded.claim_margin
            diagnosis.add("reservations", True, finding + (" (so a reservation secures short jobs only)" if short else ""))
    except TallyError as error:
        remedy = "check `deployment` and `rpc` in the config, and whether this machine can reach the chain"
        diagnosis.add("chain", False, str(error), remedy)


async def _check_payout(loaded: NodeConfig, escrow: Escrow) -> str:
    """When the node pays out by itself. Raises BadMessage if it could not weigh the gas."""
    from node.chain.payouts import check_policy

    check_policy(loaded.payout, escrow.deployment.chain_id)
    return payout_text(loaded)


async def _check_account(diagnosis: Diagnosis, escrow: Escrow, provider: Address) -> None:
    account, coins = await asyncio.gather(escrow.provider(provider), escrow.rpc.balance(provider))
    diagnosis.add("stake", True, f"{dollars(account.stake)} staked, {dollars(account.credit)} to cash out")
    finding = (
        "has coins"
        if coins
        else (
            "no coins: the coordinator settles for you, and what it has not settled when an order expires is lost; "
            "`tally node collect` and `tally cash-out` need coins"
        )
    )
    diagnosis.add("gas", True, finding)


async def _check_coordinator(
    diagnosis: Diagnosis, loaded: NodeConfig, provider: Address | None, *, runs: Callable[[], bool]
) -> dict[str, Any] | None:
    """The market's offers by model; None if the coordinator does not answer.

    `runs`: whether this node runs, asked after the coordinator said whether it is connected: it may just have started.
    """
    import aiohttp

    from tallystick.chain.deployment import Deployment
    from tallystick.client.config import ClientConfig
    from tallystick.client.coordinator.http_client import CoordinatorClient

    try:
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=10), trust_env=uses_proxy(loaded.coordinator)) as session,
            session.get(f"{loaded.coordinator.rstrip('/')}/v1/info") as response,
        ):
            date = response.headers.get("date")
        async with CoordinatorClient(loaded.coordinator, ClientConfig()) as coordinator:
            info = await coordinator.info()
            offers = {offer.id: offer.to_json() for offer in await coordinator.models()}
            connected = provider is not None and await coordinator.connected(provider)
    except (aiohttp.ClientError, TimeoutError, OSError, ValueError, TallyError) as error:
        remedy = "check `coordinator` in the config, and whether this machine can reach it"
        diagnosis.add("coordinator", False, f"{loaded.coordinator}: {error or type(error).__name__}", remedy)
        return None
    with contextlib.suppress(TallyError, OSError):
        deployment = Deployment.load(loaded.deployment)
        remedy = "it settles on another contract: get the deployment file from its operator"
        finding = f"{loaded.coordinator}, {counted(len(offers), 'model')} on offer"
        diagnosis.add("coordinator", info.domain == deployment.domain, finding, remedy)
    await _check_fee(diagnosis, loaded, info)
    if date:
        skew = time.time() - parsedate_to_datetime(date).timestamp()
        finding = f"{skew:+.0f} s from the coordinator's"
        diagnosis.add("clock", abs(skew) <= SKEW_SECONDS, finding, "set this machine's clock (NTP)")
    _check_link(diagnosis, connected=connected, running=runs())
    return offers


def _check_link(diagnosis: Diagnosis, *, connected: bool, running: bool) -> None:
    """Whether the connection with this wallet, if there is one, is this node's."""
    if connected and not running:
        text = "a node with this wallet is connected, but none runs on this state: it is another node"
        diagnosis.add("link", False, text, "give each node a wallet of its own: tally wallet new NAME; or stop the other node")
        return
    finding = "this node's asks are published" if connected else "this wallet has no published ask: start `tally node run`"
    diagnosis.add("link", True, finding)


async def _check_fee(diagnosis: Diagnosis, loaded: NodeConfig, info: CoordinatorInfo) -> None:
    """The coordinator's fee, as announced and as registered on chain, against the highest that this node accepts."""
    announced, accepted = info.fee_bps, loaded.admission.max_fee_bps
    remedy = "raise max_fee_bps under [admission] in the config, or use another coordinator"
    with contextlib.suppress(TallyError):
        async with open_escrow(loaded.deployment, loaded.rpc) as escrow:
            registered = (await escrow.provider(info.coordinator)).fee_bps
        finding = (
            f"{registered / 100:g} % registered, {announced / 100:g} % announced to clients; accepted up to {accepted / 100:g} %"
        )
        diagnosis.add("fee", max(announced, registered) <= accepted, finding, remedy)


async def _check_engines(diagnosis: Diagnosis, loaded: NodeConfig, market: dict[str, Any] | None) -> None:
    from node.engines.discover import discover
    from node.service.config import EngineConfig

    engines = loaded.engines
    if not engines:
        with contextlib.suppress(TallyError):
            key = os.environ.get("OPENAI_API_KEY") or None
            engines = tuple(
                EngineConfig(url=engine.url, api_key=key if engine.api_key else None) for engine in await discover(os.environ)
            )
    if not engines:
        finding = "the config names none, and none answers on the usual ports"
        diagnosis.add("engine", False, finding, "start an engine, or name it in the config: [[engines]] url = …")
    for engine in engines:
        remedy = "check that the engine runs with a model loaded, and `url` in the config"
        await diagnosis.run(f"engine {engine.label}", partial(_try_engine, engine), remedy)
        for model in engine.models if market is not None else ():
            _check_price(diagnosis, model, (market or {}).get(model.sold_as))


async def _try_engine(engine: EngineConfig) -> str:
    """Lists an engine's models and has it generate one token. Raises TallyError."""
    from node.domain.requests import prepare
    from node.engines.discover import DiscoveredEngine, NoModelList, inspect_engine
    from node.engines.kinds import EngineKind
    from node.engines.openai_http import OpenAIEngine
    from node.ports import ResponseEnd, ResponseStart
    from tallystick.protocol.messages import UNKNOWN
    from tallystick.protocol.plaintext_heads import RequestHead
    from tallystick.protocol.wire import dumps

    settings = engine.settings(os.environ)
    try:
        discovered = await inspect_engine(engine.url, settings.api_key, seconds=10)
    except NoModelList:
        if not engine.models:
            raise
        discovered = DiscoveredEngine(engine.url, EngineKind.OTHER, UNKNOWN, (), settings.api_key)
    names = [model.name for model in engine.models] or [model.name for model in discovered.models]
    listed = {model.name for model in discovered.models}
    missing = sorted(set(names) - listed) if listed else []  # some engines list nothing and serve any model
    if missing or not names:
        raise BadMessage(f"{discovered.kind.value} at {discovered.url} does not list {', '.join(missing) or 'any model'}")
    model = engine.models[0] if engine.models else engine.model_defaults(names[0])
    offer = engine.offer(model, None, engine.spec, datetime.now(UTC), 0.0)
    body = {"model": offer.model, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1, "stream": True}
    adapter, began = OpenAIEngine(settings), time.monotonic()
    try:
        async with asyncio.timeout(60):
            request = prepare(RequestHead("/v1/chat/completions"), dumps(body), offer, 1)
            events = [event async for event in adapter.answer(request)]
            evidence = await _evidence_words(engine, discovered, adapter, offer)
    except TimeoutError:
        raise Refusal(Code.TIMED_OUT, f"{discovered.url} did not generate one token within 60 s") from None
    finally:
        await adapter.close()
    statuses = [event.status for event in events if isinstance(event, ResponseStart)]
    if statuses and statuses[-1] >= 400:
        words = b"".join(event.tail for event in events if isinstance(event, ResponseEnd))[:300].decode(errors="replace")
        hint = "; if it names max_tokens or stream_options, set output_limit_field or supports_stream_usage in the config"
        raise BadMessage(f"{discovered.url} refuses a request for one token with status {statuses[-1]}: {words}{hint}")
    reports_usage = isinstance(events[-1], ResponseEnd) and events[-1].usage
    usage = "reports usage" if reports_usage else "reports no usage: tokens are estimated from bytes"
    seconds = time.monotonic() - began
    models = counted(len(names), "model")
    return f"{discovered.kind.value} {discovered.version}, {models}, one token in {seconds:.2f} s, {usage}, {evidence}"


async def _evidence_words(engine: EngineConfig, discovered: DiscoveredEngine, adapter: OpenAIEngine, offer: Offer) -> str:
    """Whether answers of the engine will have evidence."""
    from node.engines.evidence_probe import gives_evidence
    from node.engines.probe import may_generate

    if not (engine.evidence and engine.probe):
        return "no evidence, as its settings say"
    if not may_generate(discovered):
        return "no evidence: such an engine is not tried out unasked"
    gives = await gives_evidence(adapter, offer)
    return "answers have evidence" if gives else "no evidence: it gives no log-probabilities with token ids"


def _check_price(diagnosis: Diagnosis, model: Any, offer: dict[str, Any] | None) -> None:
    """Compares with the market's lowest price. A higher price is no problem, but the likeliest reason for few jobs."""
    if offer is None:
        diagnosis.add(f"price of {model.sold_as}", True, "no other provider sells it here")
        return
    price, lowest = model.prices.output, int(offer["outputPrice"])
    finding = f"{dollars(price)} per million output tokens; the lowest is {dollars(lowest)}"
    diagnosis.add(f"price of {model.sold_as}", True, finding + (" (above the market)" if price > lowest else ""))
