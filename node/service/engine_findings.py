"""What a node knows of its engines: kind, slots, and the capabilities of each model. Asked again when they may have changed."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field

import structlog

from node.engines.api_key import Key
from node.engines.capabilities import Capabilities
from node.engines.discover import DiscoveredEngine, inspect_engine
from node.engines.kinds import EngineKind
from node.engines.probe import may_generate, model_for_routes, probe
from tallystick.protocol.errors import Unavailable
from tallystick.protocol.messages import UNKNOWN
from tallystick.protocol.routes import MESSAGES, RESPONSES

log = structlog.get_logger()
CHECKS_BETWEEN_INSPECTIONS = 30
"""Checks of an engine after which it is inspected again: it may have restarted with other settings in between."""
RETRY_CHECKS = 3
"""Checks after which an engine is inspected again that could not be: some have no model list, others were busy."""
MAX_GENERATED, MAX_PROBED = 8, 64
"""Models of one engine that are tried out, and that are probed at all. Of an engine with more, the first one stands for all."""
TRIAL_SECONDS, ENGINE_SECONDS = 20.0, 60.0
"""Time for one request of a probe, and for all models of an engine. Until then nothing is offered."""
_SHARED = (RESPONSES, MESSAGES)
"""Routes that an engine serves for every model that generates text."""

Inspect = Callable[[str, Key], Awaitable[DiscoveredEngine]]
Probe = Callable[[DiscoveredEngine, str, bool], Awaitable[Capabilities]]
"""Probes a model of an engine. The last argument: whether it may generate."""


@dataclass(frozen=True, slots=True)
class Findings:
    """What is known of one engine: what it reports, and what each model can do."""

    engine: DiscoveredEngine
    capabilities: Mapping[str, Capabilities] = field(default_factory=dict)


@dataclass(slots=True)
class _Known:
    findings: Findings
    models: frozenset[str]
    returns: int
    checks: int = 0


async def _probe(engine: DiscoveredEngine, model: str, generate: bool) -> Capabilities:
    routes_of = model_for_routes(engine, model)
    return await probe(engine.url, model, engine.api_key, seconds=TRIAL_SECONDS, generate=generate, routes_of=routes_of)


class EngineFindings:
    """The findings by engine. `inspect` and `probe` do the I/O."""

    def __init__(self, inspect: Inspect = inspect_engine, probe: Probe = _probe) -> None:
        self._inspect, self._probe = inspect, probe
        self._known: dict[str, _Known] = {}

    def forget(self, name: str) -> None:
        """Forgets an engine whose address changed or that is gone."""
        self._known.pop(name, None)

    async def find(self, name: str, url: str, api_key: Key, models: Sequence[str], *, returns: int, may_probe: bool) -> Findings:
        """Returns what is known of an engine; asks it at first contact, after it was down, for other models, and now and then.

        `returns`: how often it came back. An engine that cannot be inspected is probed as an unknown kind.
        """
        known, wanted = self._known.get(name), frozenset(models)
        same = known is not None and (known.models, known.returns) == (wanted, returns)
        if known is not None and same and known.checks < CHECKS_BETWEEN_INSPECTIONS:
            known.checks += 1
            return known.findings
        checks = 0
        try:
            engine = await self._inspect(url, api_key)
        except Unavailable:
            if known is not None and same:
                return known.findings
            engine, checks = (
                DiscoveredEngine(url, EngineKind.OTHER, UNKNOWN, (), api_key),
                CHECKS_BETWEEN_INSPECTIONS - RETRY_CHECKS,
            )
        if known is not None and same and engine == known.findings.engine:
            known.checks = 0
            return known.findings
        findings = Findings(engine, await self._probe_models(engine, tuple(dict.fromkeys(models))) if may_probe else {})
        self._known[name] = _Known(findings, wanted, returns, checks)
        for model, capabilities in findings.capabilities.items():
            log.info("model probed", engine=name, kind=engine.kind.value, model=model, features=list(capabilities.features))
        return findings

    async def _probe_models(self, engine: DiscoveredEngine, models: tuple[str, ...]) -> dict[str, Capabilities]:
        """Probes one model at a time, since an engine may run one request at a time."""
        generate = may_generate(engine) and len(models) <= MAX_GENERATED
        found: dict[str, Capabilities] = {}
        if len(models) > MAX_PROBED:
            first = await self._probe(engine, models[0], False)
            shared = Capabilities(True, True, "unknown", tuple(path for path in first.features if path in _SHARED))
            return dict.fromkeys(models, shared)
        try:
            async with asyncio.timeout(ENGINE_SECONDS):
                for model in models:
                    found[model] = await self._probe(engine, model, generate)
        except TimeoutError:
            log.warning("the engine is too slow to probe all of its models", engine=engine.url, probed=len(found), of=len(models))
        return found
