"""The sub-commands that start a room: `tally gateway`, `tally node`, `tally coordinator`."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Annotated, Any

import typer

from tallystick.cli.options import DEFAULT_WALLET, Config, PasswordFile, Wallet, deployment_path, unlock
from tallystick.cli.output import err

node = typer.Typer(no_args_is_help=True, help="Sell what your engine can do: the provider's daemon.")
coordinator = typer.Typer(no_args_is_help=True, help="Run a coordinator: matches jobs, relays ciphertext, batches claims.")


def start(room: Coroutine[Any, Any, None]) -> None:
    """Runs a room's main coroutine on uvloop, where there is one, until it ends; it logs to stderr."""
    from tallystick.runtime.logs import configure

    configure(json=False)
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
    skip_recovery: Annotated[
        list[str] | None,
        typer.Option(metavar="URL", help="A coordinator that will not come back: go on without what it remembers of this key."),
    ] = None,
) -> None:
    """Connects your engine to the market and works until SIGTERM: then it finishes what runs, hands in its claims and stops.
    SIGHUP makes it read its config again.

    Needs a config (see node/example.toml) that names the coordinator, the deployment file and the engine.
    """
    from node.service.config import load_config
    from node.service.daemon import run

    flags = {"skip_recovery": skip_recovery or None}
    start(run(load_config(config, flags), unlock(wallet, password_file), lambda: load_config(config, flags)))


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
    public_url: Annotated[list[str] | None, typer.Option(help="Where nodes reach it; needed beyond localhost.")] = None,
) -> None:
    """Serves the market until SIGTERM. Its wallet signs matches and pays the gas of settlements; it never holds client money.

    Everything can be set in a config file (see coordinator/example.toml); flags win over it.
    """
    from coordinator.app import run
    from coordinator.config import load_config

    path = deployment if config or deployment else deployment_path(None)
    flags = {"deployment": path, "host": host, "port": port, "db": db, "rpc": rpc, "public_urls": public_url or None}
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
    from tallystick.client.gateway.app import run_gateway

    loaded = load_config(config, {"coordinator": coordinator_url, "host": host, "port": port})
    start(run_gateway(loaded, unlock(wallet, password_file)))
