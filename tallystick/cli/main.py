"""The `tally` command: assembles the sub-commands and turns errors into exit codes."""

from __future__ import annotations

import sys

import typer

from tallystick import __version__
from tallystick.cli import daemons
from tallystick.cli.chain import chain, contract, coordinator_fee, coordinator_probe, deploy
from tallystick.cli.chat import chat
from tallystick.cli.jobs import audits, batch, jobs, match_log, models, receipts
from tallystick.cli.local import demo, engine, start
from tallystick.cli.money import balance, funds, give_back, rotate, safe, sign_in, spending, wallet
from tallystick.cli.node import backup, collect, doctor, earnings, init, status, why
from tallystick.cli.output import exit_with_error
from tallystick.protocol.errors import BadMessage, TallyError

app = typer.Typer(
    name="tally",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Tallystick, a decentralised marketplace for inference jobs. **First steps:** `tally start` sets up everything for a "
    "first paid answer; `tally demo` runs a whole market on this machine; `tally gateway` serves an OpenAI-compatible API; "
    "`tally node run` sells the capacity of your engine.",
)
BUY, MONEY, SELL, CHAIN = "Buy inference", "Wallets and money", "Sell inference, run a coordinator", "Chain and contracts"

app.command("start")(start.start)
app.command("demo")(demo.demo)
app.command("chat", rich_help_panel=BUY)(chat.chat)
app.command("gateway", rich_help_panel=BUY)(daemons.gateway)
app.command("models", rich_help_panel=BUY)(models.models)
app.command("explain", rich_help_panel=BUY)(models.explain)
app.add_typer(jobs.job, name="job", rich_help_panel=BUY)
app.add_typer(batch.app, name="batch", rich_help_panel=BUY)
app.add_typer(receipts.app, name="receipt", rich_help_panel=BUY)
app.add_typer(audits.app, name="audit", rich_help_panel=BUY)
app.add_typer(match_log.app, name="log", rich_help_panel=BUY)
app.command("spending", rich_help_panel=BUY)(spending.spending)

wallet.app.command("rotate")(rotate.rotate)
app.add_typer(wallet.app, name="wallet", rich_help_panel=MONEY)
app.command("deposit", rich_help_panel=MONEY)(balance.deposit)
app.command("balance", rich_help_panel=MONEY)(balance.balance)
for command in (
    funds.thaw,
    funds.withdraw,
    funds.reserve,
    funds.release,
    give_back.give_back,
    funds.cash_out,
    funds.stake,
    funds.unstake,
):
    app.command(command.__name__.replace("_", "-"), rich_help_panel=MONEY)(command)
app.add_typer(safe.app, name="safe", rich_help_panel=MONEY)
app.command("sign-in", rich_help_panel=MONEY)(sign_in.sign_in)

daemons.node.command("init")(init.init)
daemons.node.command("doctor")(doctor.doctor)
daemons.node.command("status")(status.status)
daemons.node.command("why")(why.why)
daemons.node.command("earnings")(earnings.earnings)
daemons.node.command("collect")(collect.collect)
daemons.node.command("backup")(backup.backup)
daemons.node.command("restore")(backup.restore)
app.add_typer(daemons.node, name="node", rich_help_panel=SELL)
app.command("engine", rich_help_panel=SELL)(engine.engine)
daemons.coordinator.command("fee")(coordinator_fee.fee)
daemons.coordinator.command("probe")(coordinator_probe.probe)
app.add_typer(daemons.coordinator, name="coordinator", rich_help_panel=SELL)

app.add_typer(chain.app, name="chain", rich_help_panel=CHAIN)
app.command("deploy", rich_help_panel=CHAIN)(deploy.deploy)
app.add_typer(contract.app, name="contract", rich_help_panel=CHAIN)


def _print_version(requested: bool) -> None:
    if requested:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def root(
    version: bool = typer.Option(  # noqa: ARG001 - its callback prints it
        False, "--version", callback=_print_version, is_eager=True, help="Print the version."
    ),
) -> None:
    """See the help of the application."""
    from tallystick.runtime.optional_import import without_module

    with without_module("pygments"):  # by which structlog would colour tracebacks: 4 MiB, and the slowest of all imports
        from tallystick.runtime.logs import configure_quiet

    configure_quiet()


def main() -> None:
    """The console script: a TallyError, or a file that cannot be used, becomes one message (JSON with --json) and exit code 1."""
    try:
        app()
    except TallyError as error:
        exit_with_error(error, as_json="--json" in sys.argv)
    except OSError as error:
        if error.filename is None:  # no file of the user
            raise
        exit_with_error(BadMessage(f"{error.filename}: {error.strerror}"), as_json="--json" in sys.argv)
