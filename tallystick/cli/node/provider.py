"""What a provider asks of its node's books: `tally node earnings`, `tally node collect`."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tallystick.cli.onchain import account_of, open_escrow, require_coins
from tallystick.cli.options import DEFAULT_WALLET, Config, Json, PasswordFile, Wallet, unlock
from tallystick.cli.output import out, show_facts, show_json, show_rows, step
from tallystick.protocol.errors import BadMessage
from tallystick.protocol.types import Address, Amount, format_amount

if TYPE_CHECKING:
    from node.ports import ClaimableTab
    from node.service.config import NodeConfig
    from node.storage.store import SqlStore
    from tallystick.chain.escrow import Escrow

DAY = 86_400


def earnings(
    config: Config = None,
    wallet: Wallet = DEFAULT_WALLET,
    days: Annotated[int, typer.Option(min=1, max=3_650, help="How far to look back.")] = 30,
    offline: Annotated[bool, typer.Option("--offline", help="Do not ask the chain.")] = False,
    as_json: Json = False,
) -> None:
    """Shows what a node earned, by day, model and payer, and where every unit of it is now. Needs no password.

    Earned: on receipts. Settled: paid into your credit on chain; `tally cash-out` brings it home. Claimable: can be collected
    now; the node does so by itself, or `tally node collect`. Out of reach: the orders behind it have expired. Written off: the
    part of that which the node has booked as lost, and no longer counts on.
    """
    loaded, provider = _config(config), account_of(wallet, "--wallet")

    async def run() -> None:
        from node.storage.earnings import read_gas, read_lines, read_totals

        now = int(time.time())
        async with _store(loaded, provider) as store:
            lines = await store.read(lambda c: read_lines(c, now - days * DAY))
            totals = await store.read(read_totals)
            gas = await store.read(lambda c: read_gas(c, now - days * DAY))
            claimable = sum(tab.due for tab in await store.claimable(now, 100_000))
        pending = totals.earned - totals.settled
        places = {
            "earned": totals.earned,
            "settled": totals.settled,
            "claimable": Amount(claimable),
            "out_of_reach": Amount(max(0, pending - claimable)),
            "written_off": totals.written_off,
        }
        if not offline:
            async with open_escrow(loaded.deployment, loaded.rpc) as escrow:
                account = await escrow.provider(provider)
            places |= {"credit": account.credit, "stake": account.stake}
        if as_json:
            told = [{"day": n.day, "model": n.model, "payer": n.payer, "jobs": n.jobs} | _amounts(n) for n in lines]
            where = {name: str(int(value)) for name, value in places.items()}
            paid = {"transactions": gas.transactions, "gasUsed": gas.gas_used, "fee": str(gas.fee)}
            show_json({"provider": provider, "days": told, "where": where, "gas": paid})
            return
        rows = (
            (n.day, n.model, n.payer, n.jobs, f"{n.input_tokens} + {n.output_tokens}", format_amount(n.revenue)) for n in lines
        )
        show_rows(("day", "model", "payer", "jobs", "tokens", "revenue"), rows, title=f"the last {days} days")
        facts = [(name.replace("_", " "), format_amount(value)) for name, value in places.items()]
        coins = f"{gas.fee // 10**9} gwei for {gas.transactions} transaction(s)"
        spent = coins if gas.transactions else "none: coordinators paid"
        show_facts([*facts, ("gas", spent)], title="where it is")

    asyncio.run(run())


def _amounts(line: Any) -> dict[str, Any]:
    return {"inputTokens": line.input_tokens, "outputTokens": line.output_tokens, "revenue": str(int(line.revenue))}


def why(
    config: Config = None,
    wallet: Wallet = DEFAULT_WALLET,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, max=500, help="How many decisions, the newest.")] = 20,
    as_json: Json = False,
) -> None:
    """Tells why the last jobs came to this node or went elsewhere, in the coordinator's own reasons. Needs no password."""
    loaded, provider = _config(config), account_of(wallet, "--wallet")
    told = asyncio.run(_ask_why(f"{loaded.coordinator.rstrip('/')}/v1/providers/{provider}/why?limit={limit}"))
    if as_json:
        show_json(told)
        return
    rows = (
        (f"{datetime.fromtimestamp(one['at']).astimezone():%m-%d %H:%M:%S}", one["model"], one["stage"], one["why"])
        for one in told["decisions"]
    )
    show_rows(("when", "model", "stage", "what came of it"), rows)
    if not told["connected"]:
        text = f"The node of {provider} is not connected now, so it gets nothing: tally node doctor. Is --wallet right?"
        out.print(text, highlight=False)
    elif not told["decisions"]:
        out.print("Nobody asked for its models since the coordinator started.", highlight=False)
    else:
        counts = Counter(one["why"].partition(", place")[0] for one in told["decisions"])
        show_rows(("times", "reason"), ((count, reason) for reason, count in counts.most_common()))


async def _ask_why(url: str) -> Any:
    import aiohttp

    from tallystick.protocol.errors import Code, Unavailable, error_from_json

    try:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=15)) as session, session.get(url) as response:
            body = await response.json()
    except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
        raise Unavailable(Code.COORDINATOR_UNAVAILABLE, f"{url}: {error or type(error).__name__}") from None
    if response.status != 200:
        raise error_from_json(body, response.status)
    return body


def collect(
    config: Config = None,
    wallet: Wallet = DEFAULT_WALLET,
    password_file: PasswordFile = None,
    least: Annotated[str, typer.Option("--min-amount", help="Leave tabs alone on which less is owed, in dollars.")] = "0.01",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would be collected.")] = False,
    as_json: Json = False,
) -> None:
    """Collects what payers owe straight on chain, without any coordinator. The wallet pays the gas; the node may go on meanwhile.

    Then `tally cash-out` brings the credit home.
    """
    from tallystick.protocol.types import parse_amount

    loaded, limit = _config(config), parse_amount(least)
    signer = None if dry_run else unlock(wallet, password_file)
    provider = signer.address if signer else account_of(wallet, "--wallet")

    async def run() -> None:
        from tallystick.chain.claims import ClaimBatch, SettleRow
        from tallystick.chain.events import RowSkipped, Settled
        from tallystick.chain.rpc import Sender

        async with _store(loaded, provider) as store, open_escrow(loaded.deployment, loaded.rpc) as escrow:
            every = [tab for tab in await store.claimable(int(time.time()), 100_000) if tab.due >= 1]
            tabs = [tab for tab in every if tab.due >= limit]
            owed = {tab.payer: due for tab in tabs if (due := await _owed(escrow, tab, provider)) >= max(1, limit)}
            rows = tuple(SettleRow(tab.order, tab.seq, tab.cumulative) for tab in tabs if tab.payer in owed)
            paid: dict[Address, int] = {}
            skipped: dict[Address, str] = {}
            hashes: list[str] = []
            if rows and signer:
                await require_coins(escrow, provider)
                claims = ClaimBatch.sign(signer, rows, escrow.deployment.domain)
                for result in await escrow.settle_all(Sender(escrow.rpc, signer), claims):
                    hashes.append(result.hash)
                    await store.record_gas(result.hash, int(time.time()), result.gas_used, result.fee)
                    paid |= {event.payer: int(event.paid) for event in result.of(Settled)}
                    skipped |= {event.payer: event.reason.name.lower() for event in result.of(RowSkipped)}
        if as_json:
            found = [
                {"payer": payer, "owed": str(due), "paid": str(paid.get(payer, 0)), "skipped": skipped.get(payer)}
                for payer, due in owed.items()
            ]
            show_json({"provider": provider, "tabs": found, "transactions": hashes})
            return
        if not owed:
            small = sum(tab.due for tab in every if tab.due < limit)
            note = f"; {format_amount(Amount(small))} is owed on tabs of less than --min-amount {least}" if small else ""
            out.print(f"nothing to collect{note}", highlight=False)
            return
        lines = ((payer, format_amount(Amount(due)), _outcome(payer, paid, skipped)) for payer, due in owed.items())
        show_rows(("payer", "owed", "collected"), lines)
        if hashes:
            step(f"collected {format_amount(Amount(sum(paid.values())))} in {len(hashes)} transaction(s); next: tally cash-out")

    asyncio.run(run())


def backup(
    file: Annotated[Path, typer.Argument(help="The file to write; it is its owner's alone.")],
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Copies the node's state, also while it works: receipts, orders, tabs, and the key that opens requests. Not the wallet."""
    from node.storage.backup import back_up

    about = back_up(_config(config).state, file)
    if as_json:
        show_json({"file": str(file)} | about)
    else:
        step(f"{file}: {about['receipts']} receipts of provider {about['provider']}; keep it secret, and the wallet elsewhere")


def restore(
    file: Annotated[Path, typer.Argument(help="A file that `tally node backup` wrote.")],
    config: Config = None,
    force: Annotated[
        bool, typer.Option("--force", help="Put it in the place of a state that is there, which is kept aside.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Puts a copy of a node's state in place. What the node signed since, it asks its coordinators for before it works again."""
    from node.storage.backup import restore as put_back

    state = _config(config).state
    about = put_back(file, state, force=force)
    if as_json:
        show_json({"state": str(state)} | about)
    else:
        step(f"{state}: {about['receipts']} receipts of provider {about['provider']}; next: tally node run")


async def _owed(escrow: Escrow, tab: ClaimableTab, provider: Address) -> int:
    """What is still owed on a tab, as the chain says now."""
    settled = (await escrow.tab(tab.payer, provider)).settled
    return min(tab.cumulative, tab.order.message.ceiling) - settled


def _outcome(payer: Address, paid: dict[Address, int], skipped: dict[Address, str]) -> str:
    if payer in paid:
        return format_amount(Amount(paid[payer]))
    return f"skipped: {skipped[payer]}" if payer in skipped else "not sent"


def _config(path: Path | None) -> NodeConfig:
    from node.service.config import load_config

    return load_config(path)


@contextlib.asynccontextmanager
async def _store(loaded: NodeConfig, provider: Address) -> AsyncIterator[SqlStore]:
    """The node's books, also while the node runs. Raises BadMessage where there are none."""
    from node.storage.store import SqlStore
    from tallystick.chain.deployment import Deployment

    if not (loaded.state / "node.db").exists():
        raise BadMessage(f"no node has worked on {loaded.state} yet; `state` in the config says where its books are")
    try:
        domain = Deployment.load(loaded.deployment).domain
    except OSError as error:
        raise BadMessage(f"deployment file {loaded.deployment}: {error.strerror}") from None
    store = SqlStore(loaded.database, provider, domain)
    await store.start()
    try:
        yield store
    finally:
        await store.close()
