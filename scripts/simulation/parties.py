"""The parties of a simulation: models, nodes with their asks, speeds, failures and prefix caches, and payers."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from itertools import accumulate
from random import Random

from coordinator.domain.reputation import ProviderRecord
from scripts.simulation.clock import Signal
from scripts.simulation.scenario import ANSWER, REGIONS, Scenario, choose
from tallystick.client.openai.needs import bucket, round_down
from tallystick.protocol.criteria import Demand
from tallystick.protocol.eip712 import Verified
from tallystick.protocol.link import Capacity
from tallystick.protocol.messages import Ask, Spec
from tallystick.protocol.requirements import Requirements
from tallystick.protocol.sealing import X25519
from tallystick.protocol.types import Address, Hash

NOW = 1_800_000_000
"""Unix seconds at which a run begins."""
CONTEXT = 65_536
DEMAND_EXPONENT, PAYER_EXPONENT = 0.9, 0.8
"""The share of a model in the demand, and of a payer in the traffic, falls with its rank (Zipf)."""
EVEN_SUPPLY = 0.1
"""The share of asks that are spread evenly over the models. The others follow the demand, so popular models are scarcer, and by
the same factor in a market of any size.
"""
CACHED_TOKENS = 60_000
"""Tokens of conversations that an engine keeps per slot."""
_SIZES = ((3, 90_000, 110, 9_000), (4, 250_000, 70, 5_000), (2, 700_000, 45, 3_000), (1, 2_000_000, 30, 2_000))
"""Model sizes: weight, list price of a million input tokens in base units, output tokens and input tokens per second."""
_FAILURES = ((90, 0.002), (7, 0.03), (3, 0.4))
"""Weights of providers, and the share of their attempts that fail."""
_RESERVES = ((50, 0), (35, 500_000), (15, 5_000_000))
"""Weights of payers, and what they reserve with each provider, in base units."""
NEWCOMERS = 0.05


def _pick(random: Random, weighted: tuple[tuple[int, float], ...]) -> float:
    return random.choices([value for _, value in weighted], [weight for weight, _ in weighted])[0]


@dataclass(frozen=True, slots=True)
class Model:
    """A model: its list price of a million input tokens, and the speed of an ordinary node."""

    rank: int
    name: str
    price: int
    output_rate: int
    input_rate: int


def models_of(scenario: Scenario) -> list[Model]:
    """Returns the models, the most demanded one first."""
    random = scenario.random("models")
    sizes = random.choices([size[1:] for size in _SIZES], [size[0] for size in _SIZES], k=scenario.models)
    return [Model(rank, f"model-{rank}", *size) for rank, size in enumerate(sizes)]


@dataclass(slots=True, eq=False)
class Session:
    """A node from its connection to its end. `gone`: set if its connection is lost with jobs under way."""

    gone: Signal
    running: int = 0


@dataclass(slots=True, eq=False)
class SimulatedNode:
    """A provider with one node. `speed` is relative to an ordinary node; `failures`: the share of attempts that fail."""

    number: int
    provider: Address
    asks: list[Verified[Ask]]
    capacity: Capacity
    speed: float
    failures: float
    list_price: bool
    history: ProviderRecord | None
    session: Session | None = None
    income: int = 0
    attempts: int = 0
    slot_seconds: float = 0.0
    cache: OrderedDict[int, int] = field(default_factory=OrderedDict)
    """Tokens of each conversation that the engine still has, the least recently used first."""
    cached: int = 0

    def lookup(self, conversation: int) -> int:
        """Returns the tokens of a conversation that need no work."""
        return self.cache.get(conversation, 0)

    def remember(self, conversation: int, tokens: int) -> None:
        """Keeps a conversation, in place of those that were used the longest ago."""
        self.cached += tokens - self.cache.pop(conversation, 0)
        self.cache[conversation] = tokens
        while self.cached > CACHED_TOKENS * self.capacity.slots and len(self.cache) > 1:
            self.cached -= self.cache.popitem(last=False)[1]

    def forget(self) -> None:
        """Empties the cache: the engine was restarted."""
        self.cache.clear()
        self.cached = 0


def demand_shares(models: int) -> list[float]:
    """Returns the share of each model in the demand, by rank."""
    weights = [(rank + 1) ** -DEMAND_EXPONENT for rank in range(models)]
    return [weight / sum(weights) for weight in weights]


def supply_shares(models: int) -> list[float]:
    """Returns the share of each model in the asks, by rank."""
    return [(1 - EVEN_SUPPLY) * share + EVEN_SUPPLY / models for share in demand_shares(models)]


def nodes_of(scenario: Scenario, models: list[Model]) -> list[SimulatedNode]:
    """Returns the nodes. Each model has some, and popular ones have more."""
    random, supply = scenario.random("nodes"), list(accumulate(supply_shares(len(models))))
    return [_node(number, random, models, supply) for number in range(scenario.nodes)]


def _node(number: int, random: Random, models: list[Model], supply: list[float]) -> SimulatedNode:
    provider = Address(f"0x{random.getrandbits(160):040x}")
    own = [number] if number < len(models) else []
    own += choose(random, supply, random.choice((1, 1, 2, 3)) - len(own))
    list_price = random.random() < 0.4
    factor = 1.0 if list_price else round(random.lognormvariate(0.05, 0.2), 2)
    region, speed = random.choice(REGIONS), random.lognormvariate(0, 0.3)
    slots = random.choices((1, 2, 4), (75, 20, 5))[0]
    sold = [models[rank] for rank in dict.fromkeys(own)]
    asks = [_ask(provider, model, factor, region, random) for model in sold]
    output_rate, first_token = round(sold[0].output_rate * speed), round(1_000 * (0.2 + 1_000 / sold[0].input_rate / speed))
    failures, newcomer = _pick(random, _FAILURES), random.random() < NEWCOMERS
    jobs = random.randrange(50, 500)
    history = None if newcomer else ProviderRecord(jobs * (1 - failures), jobs * failures, jobs)
    capacity = Capacity(slots, slots, output_rate, first_token)
    return SimulatedNode(number, provider, asks, capacity, speed, failures, list_price, history)


def _ask(provider: Address, model: Model, factor: float, region: str, random: Random) -> Verified[Ask]:
    price = round(model.price * factor)
    ask = Ask(
        provider=provider,
        model=model.name,
        input_price=price,
        cached_input_price=price // 4,
        output_price=3 * price,
        context_tokens=CONTEXT,
        max_output_tokens=ANSWER.most,
        sealing_suite=X25519,
        sealing_key=bytes(32),
        valid_from=NOW - 60,
        valid_until=NOW + 10_000_000,
        seq=1,
        spec=Spec(region=region, engine="vllm", precision="fp8"),
    )
    return Verified(ask, bytes(65), Hash(random.randbytes(32)))  # nobody checks a signature here


@dataclass(slots=True, eq=False)
class Payer:
    """A payer with one client. `reserved`: base units with each provider. `price_factor`: its maximum over the list price."""

    number: int
    address: Address
    weight: float
    models: list[Model]
    reserved: int
    price_factor: float
    region: str | None
    stalled: bool
    flooding: bool = False
    spent: int = 0
    live: int = 0
    """Jobs under way."""
    weights: list[float] = field(default_factory=list)
    """How often it uses each of its models."""

    def pick(self, random: Random) -> Model:
        """Returns the model of a conversation."""
        return random.choices(self.models, self.weights)[0]

    def demand(self, model: Model, input_tokens: int, limit: int) -> Demand:
        """Returns the demand of one request. Lengths are rounded, as the client does."""
        maximum = round(model.price * self.price_factor)
        return Demand(
            model.name,
            max_input_price=maximum,
            max_output_price=3 * maximum,
            require=Requirements(region=(self.region,) if self.region else ()),
            input_tokens=round_down(input_tokens),
            likely_tokens=bucket(input_tokens),
            max_output=ANSWER.most,
            limit=limit,
        )


def payers_of(scenario: Scenario, models: list[Model]) -> list[Payer]:
    """Returns the payers, those with the most traffic first."""
    random, demand = scenario.random("payers"), demand_shares(len(models))
    cumulative, payers = list(accumulate(demand)), list[Payer]()
    for number in range(scenario.payers):
        draws = random.randrange(4, 40)
        ranks = sorted(choose(random, cumulative, draws))
        payer = Payer(
            number=number,
            address=Address(f"0x{random.getrandbits(160):040x}"),
            weight=(number + 1) ** -PAYER_EXPONENT,
            models=[models[rank] for rank in ranks],
            weights=[demand[rank] / (1 - (1 - demand[rank]) ** draws) for rank in ranks],  # all payers together: the demand
            reserved=int(_pick(random, _RESERVES)),
            price_factor=random.choice((1.3, 1.6, 2.5, 5.0)),
            region=random.choice(REGIONS) if random.random() < 0.1 else None,
            stalled=random.random() < scenario.stalled_share,
        )
        payers.append(payer)
    return payers
