"""The config file that `tally node init` writes."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tallystick.protocol.types import Address, Amount, format_amount

if TYPE_CHECKING:
    from node.engines.capabilities import Capabilities
    from node.engines.discover import DiscoveredEngine

DEFAULT_SLOTS = 4


@dataclass(frozen=True, slots=True)
class ModelPlan:
    """A model to sell, its prices (base units per million tokens), and where the prices come from."""

    name: str
    context: int | None
    input_price: Amount
    output_price: Amount
    price_source: str
    abilities: Capabilities | None = None
    """None if the model was not probed."""

    @property
    def sold_as(self) -> str:
        """The model's name on the market. An engine that loads a file may name the model by its path on this machine."""
        return Path(self.name).stem if self.name.startswith(("/", "./")) else self.name


@dataclass(frozen=True, slots=True)
class PayoutSetup:
    """The automatic payout: to which address, from which credit on, and the price of a coin (None: a test chain). Base units."""

    address: Address
    min_amount: Amount
    coin_price: Amount | None

    def lines(self) -> list[str]:
        """The table of the config."""
        return [
            "",
            "# Credit is paid to this address by itself, from this many dollars on, if gas costs little of it.",
            "[payout]",
            f"address = {json.dumps(self.address)}",
            f'min_amount = "{format_amount(self.min_amount)}"',
            *([] if self.coin_price is None else [f'coin_price = "{format_amount(self.coin_price)}"']),
        ]


@dataclass(frozen=True, slots=True)
class NodeSetup:
    """What a config says apart from engines. `rpc` is None if the deployment file's endpoint is used."""

    coordinator: str
    deployment: Path
    rpc: str | None
    state: Path
    payout: PayoutSetup | None = None


def describe_models(plans: list[ModelPlan]) -> dict[str, Any]:
    """The models of an engine as a member of a JSON document."""
    models = [
        {
            "name": plan.name,
            "context": plan.context,
            "inputPrice": str(int(plan.input_price)),
            "outputPrice": str(int(plan.output_price)),
            "priceSource": plan.price_source,
            "abilities": None if plan.abilities is None else asdict(plan.abilities),
        }
        for plan in plans
    ]
    return {"models": models}


def to_toml(setup: NodeSetup, findings: list[DiscoveredEngine], plans: dict[str, list[ModelPlan]], slots: int | None) -> str:
    """The config with comments. Names and URLs are written as JSON strings, which are valid TOML."""
    lines = [
        "# Settings of a node; node/example.toml in the source explains every setting.",
        "# Check with `tally node doctor`, start with `tally node run`.",
        "",
        f"coordinator = {json.dumps(setup.coordinator)}",
        "# The market's deployment file. If it is missing, the node fetches it from the coordinator and checks it on the chain.",
        f"deployment = {json.dumps(str(setup.deployment))}",
        *([] if setup.rpc is None else ["# The chain's RPC endpoint.", f"rpc = {json.dumps(setup.rpc)}"]),
        "# Receipts, tabs and keys of this node and no other. Back it up: receipts are money.",
        f"state = {json.dumps(str(setup.state))}",
        *([] if setup.payout is None else setup.payout.lines()),
    ]
    for engine in findings:
        lines += [
            "",
            f"# {engine.kind.value} {engine.version}",
            "[[engines]]",
            f"url = {json.dumps(engine.url)}",
            *(['api_key_env = "OPENAI_API_KEY"'] if engine.api_key else []),
            *_slots(engine, slots),
            *_usage_option(plans[engine.url]),
        ]
        for plan in plans[engine.url]:
            lines += [
                "",
                f"# Dollars per million tokens ({plan.price_source}).",
                "[[engines.models]]",
                f"name = {json.dumps(plan.name)}",
                *([f"sell_as = {json.dumps(plan.sold_as)}"] if plan.sold_as != plan.name else []),
                f'input_price = "{format_amount(plan.input_price)}"',
                f'output_price = "{format_amount(plan.output_price)}"',
                *([f"context_tokens = {plan.context}"] if plan.context else []),
                *_features(engine, plan),
            ]
    return "\n".join(lines) + "\n"


def _usage_option(plans: list[ModelPlan]) -> list[str]:
    """Turns off the request for usage in streams if no model of an engine reports it, and names an unusual output limit."""
    probed = [plan.abilities for plan in plans if plan.abilities is not None and plan.abilities.chat]
    limits = (
        ["# It refuses max_tokens.", 'output_limit_field = "max_completion_tokens"']
        if probed and all(abilities.output_limit_field != "max_tokens" for abilities in probed)
        else []
    )
    if not probed or any(abilities.streams == "usage" for abilities in probed):
        return limits
    return [
        *limits,
        "# Its streams report no usage, so receipts of streams rest on the node's own estimate.",
        "supports_stream_usage = false",
    ]


def _features(engine: DiscoveredEngine, plan: ModelPlan) -> list[str]:
    """The features that the model's ask states: written down only if the node does not find them by itself at each start."""
    from node.engines.probe import may_generate

    if plan.abilities is None or not plan.abilities.features:
        return []
    features = f"features = {json.dumps(list(plan.abilities.features))}"
    if may_generate(engine):
        return ["# The node finds these features by itself. Features that are named here win over those.", f"# spec.{features}"]
    return ["[engines.models.spec]", features]


def _slots(engine: DiscoveredEngine, slots: int | None) -> list[str]:
    """The number of slots, written down only if the engine does not tell it; the depth of its queue, if it has one."""
    from node.engines.kinds import QUEUE_DEPTH, QUEUEING

    depth = (
        [
            "# Jobs beyond these that wait in the engine's own queue, so that a slot which becomes free is taken at once.",
            f"queue_depth = {QUEUE_DEPTH}",
        ]
        if engine.kind in QUEUEING
        else []
    )
    if slots is None and engine.slots is not None:
        return [
            f"# Number of jobs that the engine may run at once. By default what it reports, {engine.slots} now.",
            "# slots = 4",
            *depth,
        ]
    return ["# Number of jobs that the engine may run at once.", f"slots = {slots or DEFAULT_SLOTS}", *depth]
