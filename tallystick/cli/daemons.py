"""The sub-commands that run a daemon: `tally gateway`, `tally node run`, `tally coordinator run`."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Coroutine
from dataclasses import replace
from typing import Annotated, Any

import typer

from tallystick.cli.market_deployment import ensure_deployment_file, pinned_deployment
from tallystick.cli.options import (
    DEFAULT_WALLET,
    Config,
    CoordinatorUrl,
    DeploymentFile,
    PasswordFile,
    Rpc,
    Wallet,
    deployment_path,
    unlock,
)
from tallystick.cli.root import new_app

node = typer.Typer(no_args_is_help=True, help="Sell inference: run and operate a provider's node.")
coordinator = typer.Typer(
    no_args_is_help=True, help="Run a coordinator, which matches jobs, relays ciphertext and settles claims."
)


def load_server() -> None:
    """Loads uvicorn without what it would reload changed code with: 1 MiB of a daemon, as long as it runs."""
    from tallystick.runtime.optional_import import without_module

    with without_module("watchfiles"):
        import uvicorn  # noqa: F401 - the daemon uses it


def run_daemon(daemon: Coroutine[Any, Any, None], *, json_log: bool | None = False, log_level: str = "info") -> None:
    """Runs a daemon's main coroutine until it ends, on uvloop where that exists. The daemon logs to stderr."""
    from tallystick.runtime.logs import configure
    from tallystick.runtime.supervision import attach_to_parent

    configure(json=json_log, level=log_level)
    attach_to_parent()
    if sys.platform == "win32":
        asyncio.run(daemon)
    else:
        import uvloop

        uvloop.run(daemon)


@node.command("run")
def node_run(
    config: Config = None,
    wallet: Wallet = DEFAULT_WALLET,
    password_file: PasswordFile = None,
    skip_recovery: Annotated[
        list[str] | None,
        typer.Option(
            metavar="URL",
            help="Do not wait for this coordinator's copy of receipts that this state lacks, for one that is gone (repeatable).",
        ),
    ] = None,
) -> None:
    """Run the node: serve jobs of the market with your engine until SIGTERM.

    On SIGTERM the node finishes running jobs, submits its claims and stops. On SIGHUP it reads its config again. The config (see
    node/example.toml, or run `tally node init`) names the coordinator, the deployment file and the engine.
    """
    load_server()
    from node.service.config import load_config
    from node.service.daemon import run

    flags = {"skip_recovery": skip_recovery or None}
    loaded = load_config(config, flags)
    asyncio.run(ensure_deployment_file(loaded.deployment, loaded.coordinator, loaded.rpc))
    run_daemon(run(loaded, unlock(wallet, password_file), lambda: load_config(config, flags), config))


@node.command("demo-engine")
def node_demo_engine(
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8431,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
) -> None:
    """Run a stand-in engine: an OpenAI-compatible endpoint whose answers say that it is no model."""
    from node.engines.demo import serve

    run_daemon(serve(host, port))


@coordinator.command("run")
def coordinator_run(
    config: Config = None,
    wallet: Wallet = DEFAULT_WALLET,
    password_file: PasswordFile = None,
    deployment: DeploymentFile = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on; default: 127.0.0.1.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; default: 8420.")] = None,
    db: Annotated[str | None, typer.Option(help="Database URL, for example sqlite:///coordinator.db.")] = None,
    rpc: Rpc = None,
    public_url: Annotated[
        list[str] | None, typer.Option(help="URL at which nodes reach this coordinator (repeatable); required beyond localhost.")
    ] = None,
    bus: Annotated[
        str | None,
        typer.Option(help="NATS servers, such as nats://127.0.0.1:4222. Makes this process a replica; needs PostgreSQL."),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="Replicas to run on this machine, on one shared port and one port each; default: 1.")
    ] = None,
) -> None:
    """Run the coordinator until SIGTERM. Its wallet signs matches and pays gas for settlements; it never holds client money.

    With --bus, any number of processes with one wallet and one PostgreSQL database serve together. Every option can also stand in
    the config (see coordinator/example.toml); options win over the config.
    """
    load_server()
    from coordinator.app import run
    from coordinator.config import load_config

    flags = {"deployment": deployment, "host": host, "port": port, "db": db, "rpc": rpc, "public_urls": public_url or None}
    loaded = load_config(config, flags | {"bus": bus, "workers": workers})
    deployment_path(loaded.deployment)
    signer, shared = unlock(wallet, password_file), None
    if loaded.workers > 1:
        from coordinator.processes import split

        loaded, shared = split(loaded)
    run_daemon(run(loaded, signer, shared))


def gateway(
    config: Config = None,
    wallet: Wallet = DEFAULT_WALLET,
    password_file: PasswordFile = None,
    coordinator_url: CoordinatorUrl = None,
    host: Annotated[
        str | None, typer.Option(help="Address to listen on; default: 127.0.0.1. Set api_key in the config for any other.")
    ] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; default: 8421.")] = None,
) -> None:
    """Serve an OpenAI-compatible API on http://127.0.0.1:8421/v1. The wallet's purse pays for the jobs.

    Settings come from the config (see tallystick/client/example.toml); options win over the config.
    """
    load_server()
    from tallystick.client.config import load_config
    from tallystick.client.gateway.app import run_gateway

    loaded = load_config(config, {"coordinator": coordinator_url, "host": host, "port": port})
    loaded = replace(loaded, deployment=asyncio.run(pinned_deployment(loaded)))
    run_daemon(run_gateway(loaded, unlock(wallet, password_file)), json_log=loaded.log_json, log_level=loaded.log_level)


def daemon_app() -> typer.Typer:
    """Returns the `tally` command with the sub-commands of this module alone."""
    app = new_app()
    app.command("gateway")(gateway)
    app.add_typer(node, name="node")
    app.add_typer(coordinator, name="coordinator")
    return app
