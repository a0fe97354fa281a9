"""The sub-commands that start a room: `tally gateway`, `tally node`, `tally coordinator`; and `tally chat`."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tallystick.cli.options import DEFAULT_WALLET, Config, Json, PasswordFile, Wallet, deployment_path, unlock
from tallystick.cli.output import err, out, show_json, step
from tallystick.protocol.errors import Code, Refusal, TallyError
from tallystick.protocol.types import format_amount

if TYPE_CHECKING:
    from tallystick.client.config import ClientConfig
    from tallystick.client.job import Job
    from tallystick.client.result import Result
    from tallystick.client.sdk import Market
    from tallystick.protocol.eip712 import Signer

node = typer.Typer(no_args_is_help=True, help="Sell what your engine can do: the provider's daemon.")
coordinator = typer.Typer(no_args_is_help=True, help="Run a coordinator: matches jobs, relays ciphertext, batches claims.")


def start(room: Coroutine[Any, Any, None]) -> None:
    """Runs a room's main coroutine on uvloop, where there is one, until it ends."""
    if sys.platform == "win32":
        asyncio.run(room)
    else:
        import uvloop

        uvloop.run(room)


@node.command("run")
def node_run(
    config: Config = None,
    wallet: Wallet = DEFAULT_WALLET,
    password_file: PasswordFile = None,
) -> None:
    """Connects your engine to the market and works until SIGTERM: then it finishes what runs, hands in its claims and stops.
    SIGHUP makes it read its config again.

    Needs a config (see node/example.toml) that names the coordinator, the deployment file and the engine.
    """
    from node.config import load_config
    from node.daemon import run

    loaded = load_config(config)
    start(run(loaded, unlock(wallet, password_file), lambda: load_config(config)))


@node.command("demo-engine")
def node_demo_engine(
    port: Annotated[int, typer.Option(help="Port to serve on.")] = 8431,
    host: Annotated[str, typer.Option(help="Address to serve on.")] = "127.0.0.1",
) -> None:
    """Serves the stand-in engine: an OpenAI-compatible endpoint that says it is no model. For demos and tests."""
    from node.engines.demo import serve

    err.print(f"stand-in engine on http://{host}:{port}/v1")
    start(serve(host, port))


@coordinator.command("run")
def coordinator_run(
    config: Config = None,
    wallet: Wallet = DEFAULT_WALLET,
    password_file: PasswordFile = None,
    deployment: Annotated[Path | None, typer.Option(help="Deployment file (see `tally deploy`).")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on.")] = None,
    db: Annotated[str | None, typer.Option(help="Database URL, for example sqlite:///coordinator.db.")] = None,
    rpc: Annotated[str | None, typer.Option(help="The chain's JSON-RPC, instead of the deployment file's.")] = None,
) -> None:
    """Serves the market until SIGTERM. Its wallet signs matches and pays the gas of settlements; it never holds client money.

    Everything can be set in a config file (see coordinator/example.toml); flags win over it.
    """
    from coordinator.app import run
    from coordinator.config import load_config

    path = deployment if config or deployment else deployment_path(None)
    flags = {"deployment": path, "host": host, "port": port, "db": db, "rpc": rpc}
    start(run(load_config(config, flags), unlock(wallet, password_file)))


def gateway(
    config: Config = None,
    wallet: Wallet = DEFAULT_WALLET,
    password_file: PasswordFile = None,
    coordinator_url: Annotated[str | None, typer.Option("--coordinator", help="The coordinator's address.")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on; set api_key before you leave localhost.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on.")] = None,
) -> None:
    """Gives any OpenAI SDK a base URL: http://127.0.0.1:8421/v1. Jobs are paid from the wallet's purse.

    Settings come from a config file (see tallystick/client/example.toml); flags win over it.
    """
    from tallystick.client.config import load_config
    from tallystick.client.gateway import run_gateway

    loaded = load_config(config, {"coordinator": coordinator_url, "host": host, "port": port})
    start(run_gateway(loaded, unlock(wallet, password_file)))


def chat(
    prompt: Annotated[str | None, typer.Argument(help="What to say; without it a conversation starts.")] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Model to use; the only or first one on offer by default.")
    ] = None,
    config: Config = None,
    wallet: Wallet = DEFAULT_WALLET,
    password_file: PasswordFile = None,
    coordinator_url: Annotated[str | None, typer.Option("--coordinator", help="The coordinator's address.")] = None,
    save: Annotated[
        Path | None,
        typer.Option("--save", help="Write the answer's proof there, for `tally receipt verify`. It has the plaintext."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Talks to a model on the market and shows what each answer cost. Ctrl-C stops the answer; an empty line or Ctrl-D ends."""
    from tallystick.client.config import load_config

    loaded = load_config(config, {"coordinator": coordinator_url})
    signer = unlock(wallet, password_file)
    with asyncio.Runner() as runner:
        runner.run(_converse(loaded, signer, model, prompt, save, as_json=as_json))


async def _converse(
    config: ClientConfig, signer: Signer, model: str | None, prompt: str | None, save: Path | None, *, as_json: bool
) -> None:
    from tallystick.client.sdk import Market

    async with Market.of(config, signer) as market:
        chosen = model or await _first_model(market)
        history: list[dict[str, str]] = []
        while text := prompt if prompt is not None else await asyncio.to_thread(_ask):
            history.append({"role": "user", "content": text})
            try:
                answer = await _answer(market, chosen, history, save, as_json=as_json)
                history.append({"role": "assistant", "content": answer})
            except TallyError as error:
                if prompt is not None:
                    raise
                history.pop()
                err.print(f"[red]error:[/] {error}", highlight=False)
            if prompt is not None:
                return


async def _first_model(market: Market) -> str:
    models = await market.models()
    if not models:
        raise Refusal(Code.NO_PROVIDER, "no provider is connected to this coordinator")
    return models[0].id


def _ask() -> str:
    try:
        return out.input("[bold cyan]you >[/] ").strip()
    except EOFError:
        return ""


async def _answer(market: Market, model: str, history: list[dict[str, str]], save: Path | None, *, as_json: bool) -> str:
    """Streams one answer to the terminal, then says what it cost; Ctrl-C stops it, and what it cost until then is paid."""
    body = {"model": model, "messages": history, "stream": not as_json}
    from tallystick.client.result import require_success

    async with await market.submit("/v1/chat/completions", body, keep=save is not None) as job:
        if as_json:
            result = require_success(await job.result())
            _save(job, save)
            show_json({"text": result.text, "cost": str(int(result.cost)), "provider": result.provider, "job": result.job.hex()})
            return result.text
        if (await job.start()).status >= 400:
            require_success(await job.result())
        loop, stopping = asyncio.get_running_loop(), asyncio.Event()
        loop.add_signal_handler(signal.SIGINT, stopping.set)
        try:
            text = await _stream(job, stopping)
            ended: Result | None = await job.cancel() if stopping.is_set() else await job.result()
        finally:
            loop.remove_signal_handler(signal.SIGINT)
        _save(job, save)
    if ended is not None:
        spent = f"{format_amount(ended.cost)} for {ended.usage.input} + {ended.usage.output} tokens"
        err.print(f"[dim]{spent}, provider {ended.provider}, {ended.outcome.name.lower()}[/]", highlight=False)
    return text


def _save(job: Job, path: Path | None) -> None:
    """Writes the job's proof, if it was asked for."""
    from tallystick.runtime.keys import write_private

    if path is None:
        return
    if job.proof is None:
        raise Refusal(Code.BODY_TOO_LARGE, "the answer has no receipt or is too long to be kept, so there is no proof to save")
    write_private(path.absolute(), job.proof.dumps())
    step(f"proof of the answer in {path}; check it with: tally receipt verify {path}")


async def _stream(job: Job, stopping: asyncio.Event) -> str:
    parts: list[str] = []
    pending = b""
    async for chunk in job:
        *lines, pending = (pending + chunk).split(b"\n")
        for line in lines:
            parts.append(_delta(line))
            sys.stdout.write(parts[-1])
        sys.stdout.flush()
        if stopping.is_set():
            break
    sys.stdout.write("\n")
    return "".join(parts)


def _delta(line: bytes) -> str:
    """The text in one line of a chat stream; nothing of other lines."""
    if not line.startswith(b"data: {"):
        return ""
    choices = json.loads(line[6:]).get("choices") or [{}]
    return choices[0].get("delta", {}).get("content") or ""
