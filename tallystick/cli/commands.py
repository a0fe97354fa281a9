"""The `tally` command with all its sub-commands."""

from __future__ import annotations

from tallystick.cli import daemons
from tallystick.cli.chain import chain, contract, coordinator_fee, coordinator_probe, deploy
from tallystick.cli.chat import chat
from tallystick.cli.jobs import audits, batch, jobs, match_log, models, receipts
from tallystick.cli.local import demo, engine, start
from tallystick.cli.money import balance, funds, give_back, rotate, safe, sign_in, spending, wallet
from tallystick.cli.node import backup, collect, doctor, earnings, init, status, why
from tallystick.cli.root import new_app

app = new_app()
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
