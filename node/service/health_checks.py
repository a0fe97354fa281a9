"""The node's dependencies, each with a check: its coordinators, engines, state, disk, chain, debts, asks, integrity, clock and
certificates.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace

from node.service.status import StatusSources
from node.storage.store import SqlStore
from tallystick.chain.chain_health import ChainHealth
from tallystick.protocol.health import CheckResult, Health
from tallystick.runtime.disk_space import check_disk
from tallystick.runtime.health_monitor import Check, HealthMonitor
from tallystick.runtime.peer_probe import probe_peer


def watch(node: StatusSources, store: SqlStore, chain: ChainHealth, now: Callable[[], float] = time.time) -> HealthMonitor:
    """The monitor of a node's dependencies. `now` is Unix seconds."""
    remedies = {"database": "check the folder `state` and its disk", "disk": "check the folder `state`"}
    return HealthMonitor(_Checks(node, store, chain, now).by_name(), remedies)


ASK_RENEWAL_SHARE = 0.25
"""Less of its validity left is a warning."""


class _Checks:
    def __init__(self, node: StatusSources, store: SqlStore, chain: ChainHealth, now: Callable[[], float]) -> None:
        self._node, self._store, self._chain, self._now = node, store, chain, now

    def by_name(self) -> dict[str, Check]:
        return {
            "coordinator": self._check_coordinator,
            "engines": self._check_engines,
            "database": self._check_database,
            "disk": self._check_disk,
            "chain": self._check_chain,
            "debts": self._check_debts,
            "asks": self._check_asks,
            "integrity": self._node.ratings.check,
            "peer": self._check_peer,
        }

    async def _check_coordinator(self) -> dict[str, CheckResult]:
        """Fails if no coordinator gives this node jobs; others that are away are a warning."""
        node = self._node
        served = [link for link in node.links if link.session and node.coordinator_credit.serves(link.session.endpoint)]
        problems = (node.state_recovery.problem, *(link.problem for link in node.links), *node.coordinator_credit.problems())
        text = "; ".join(filter(None, problems))
        remedy = "`tally node doctor` finds out why; check `coordinator`, or ask its operator"
        if not served or node.state_recovery.problem:
            return {"coordinator": CheckResult(Health.FAIL, text or "no coordinator gives this node jobs", remedy, len(served))}
        status = Health.PASS if len(served) == len(node.links) else Health.WARN
        return {"coordinator": CheckResult(status, text if status is Health.WARN else "", remedy if text else "", len(served))}

    async def _check_engines(self) -> dict[str, CheckResult]:
        """Fails if nothing can be sold."""
        engines = self._node.engine_pool.engines
        down = sorted(name for name, engine in engines.items() if not engine.up)
        remedy = "start the engine; `tally node doctor` shows what it answers"
        if not self._node.asks.current:
            names = f": {', '.join(down)} does not answer" if down else ": no engine lists a model that the config sells"
            return {"engines": CheckResult(Health.FAIL, f"nothing is offered{names}", remedy, 0)}
        up = len(engines) - len(down)
        if down:
            return {"engines": CheckResult(Health.WARN, f"{', '.join(down)} does not answer", remedy, up)}
        return {"engines": CheckResult(Health.PASS, value=up)}

    async def _check_database(self) -> dict[str, CheckResult]:
        return {"database": CheckResult(Health.PASS, value=round(1_000 * await self._store.ping(), 1), unit="ms")}

    async def _check_disk(self) -> dict[str, CheckResult]:
        return {"disk": await check_disk(self._node.config.state)}

    async def _check_chain(self) -> dict[str, CheckResult]:
        """Trouble with the chain is a warning: it delays settlement, and no job within the provider's trust."""
        try:
            results: Mapping[str, CheckResult] = await self._chain.check()
        except Exception:  # noqa: BLE001 - whatever is wrong with it, jobs go on
            return {"chain": CheckResult(Health.WARN, "it does not answer", "check `rpc` and the chain's endpoint")}
        return {
            name: replace(result, status=Health.WARN) if result.status is Health.FAIL else result
            for name, result in results.items()
        }

    async def _check_debts(self) -> dict[str, CheckResult]:
        """What payers owe and the collector has raised an alarm for: they withdraw, or a claim's deadline is near."""
        events = self._node.collector.open_alarms
        if not events:
            return {"debts": CheckResult(Health.PASS, value=0)}
        kinds = ", ".join(sorted({event for event, _ in events}))
        return {"debts": CheckResult(Health.WARN, f"{len(events)} payers: {kinds}", "tally node collect", len(events))}

    async def _check_asks(self) -> dict[str, CheckResult]:
        """Asks are signed anew at half of their validity; one that is much older was not, because the checks of engines hang."""
        asks = self._node.asks.current
        if not asks:
            return {}
        left = min(ask.message.valid_until for ask in asks) - round(self._now())
        if left > self._node.config.ask_validity * ASK_RENEWAL_SHARE:
            return {"asks": CheckResult(Health.PASS, value=left, unit="s")}
        text = f"an ask expires in {left} s and was not signed anew" if left > 0 else "an ask has expired and was not signed anew"
        remedy = "restart the node; if that does not help, `tally node doctor` shows which engine hangs"
        return {"asks": CheckResult(Health.WARN, text, remedy, left, "s")}

    async def _check_peer(self) -> dict[str, CheckResult]:
        """The states of `clock` and `certificate`, as far as the answer of one coordinator tells them."""
        links = list(self._node.links)
        link = next((link for link in links if link.session), next(iter(links), None))
        return {} if link is None else (await probe_peer(link.url)).checks()
