"""`tally`: one command for clients, providers, operators and contract developers."""

from __future__ import annotations

import sys

import typer

from tallystick import __version__
from tallystick.cli import daemons
from tallystick.cli.chain import chain, contract, coordinator_fee
from tallystick.cli.chat import chat
from tallystick.cli.jobs import jobs, models, receipts
from tallystick.cli.local import demo, start
from tallystick.cli.money import balance, funds, rotate, safe, spending, wallet
from tallystick.cli.node import doctor, engine, init, provider, status
from tallystick.cli.output import fail
from tallystick.protocol.errors import TallyError
from tallystick.runtime.logs import configure_quiet

app = typer.Typer(
    name="tally",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Tallystick, an open market for inference. **First steps:** `tally start` brings you to a first paid answer; "
    "`tally demo` shows the whole market on this machine; `tally gateway` gives your OpenAI SDK a base URL; "
    "`tally node run` sells what your engine can do.",
)
app.command("start")(start.start)
app.command("demo")(demo.demo)
app.command("chat")(chat.chat)
app.command("gateway")(daemons.gateway)
app.command("engine")(engine.engine)
app.command("models")(models.models)
app.command("explain")(models.explain)
app.command("spending")(spending.spending)
daemons.coordinator.command("fee")(coordinator_fee.fee)
daemons.node.command("init")(init.init)
daemons.node.command("doctor")(doctor.doctor)
daemons.node.command("status")(status.status)
daemons.node.command("why")(provider.why)
daemons.node.command("earnings")(provider.earnings)
daemons.node.command("collect")(provider.collect)
daemons.node.command("backup")(provider.backup)
daemons.node.command("restore")(provider.restore)
app.add_typer(daemons.node, name="node")
app.add_typer(daemons.coordinator, name="coordinator")
app.add_typer(jobs.job, name="job")
app.add_typer(receipts.app, name="receipt")
wallet.app.command("rotate")(rotate.rotate)
app.add_typer(wallet.app, name="wallet")
app.add_typer(safe.app, name="safe")
app.command("deposit")(balance.deposit)
app.command("balance")(balance.balance)
for command in (funds.thaw, funds.withdraw, funds.reserve, funds.release, funds.cash_out, funds.stake, funds.unstake):
    app.command(command.__name__.replace("_", "-"))(command)
app.add_typer(chain.app, name="chain")
app.command("deploy")(chain.deploy)
app.add_typer(contract.app, name="contract")


def _version(show: bool) -> None:
    if show:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def root(version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Show the version.")) -> None:
    """See the help above."""


def main() -> None:
    """The console script: errors of ours become one clear line (or JSON with --json) and exit code 1."""
    configure_quiet()
    try:
        app()
    except TallyError as error:
        fail(error, as_json="--json" in sys.argv)
