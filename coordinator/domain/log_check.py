"""Replays a match log from its first leaf: computes its root, and names each leaf that broke the coordinator's own rule. Pure."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field, fields

from coordinator.domain.match_leaf import check_leaf
from tallystick.protocol.criteria import Reason
from tallystick.protocol.eip712 import Verified
from tallystick.protocol.errors import BadMessage
from tallystick.protocol.match_log import AskFacts, MatchLeaf, RestartLeaf, load_leaf
from tallystick.protocol.merkle import Edge, leaf_hash
from tallystick.protocol.messages import Ask
from tallystick.protocol.types import Address, Hash, JobId

_REMEMBERED_JOBS = 100_000
"""Jobs whose earlier attempts are remembered, to check which providers had them."""
_REMEMBERED_ASKS = 100_000
"""Asks whose facts are remembered, to compare them with the signed asks."""
_CLAIMS_AN_ASK = 8
_MAX_TIME = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong with one leaf."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class AskClaim:
    """What leaves say of a signed ask. Prices are base units per 1,000,000 tokens, times are Unix seconds."""

    provider: Address
    model: str
    input_price: int
    cached_input_price: int
    output_price: int
    valid_from: int
    valid_until: int

    @classmethod
    def of_leaf(cls, model: str, provider: Address, facts: AskFacts) -> AskClaim:
        """What a leaf says."""
        prices = facts.input_price, facts.cached_input_price, facts.output_price
        return cls(provider, model, *prices, facts.valid_from, facts.valid_until)

    @classmethod
    def of_ask(cls, ask: Ask) -> AskClaim:
        """What the provider signed, as a leaf has it."""
        prices = ask.input_price, ask.cached_input_price, ask.output_price
        return cls(ask.provider, ask.model, *prices, min(ask.valid_from, _MAX_TIME), min(ask.valid_until, _MAX_TIME))


@dataclass(slots=True)
class LogReplay:
    """Takes the leaves of a log in order. `matches`, `restarts`, `forgotten`: what was counted so far."""

    edge: Edge = field(default_factory=Edge)
    matches: int = 0
    restarts: int = 0
    forgotten: int = 0
    """Leaves whose contents the coordinator has deleted; only their hashes were checked."""
    _at: int = 0
    _epoch: int | None = None
    _tried: OrderedDict[JobId, list[Address]] = field(default_factory=OrderedDict)
    _claims: dict[Hash, dict[AskClaim, int]] = field(default_factory=dict)
    """For each ask, what leaves say of it, and the first leaf that says so."""

    def add(self, digest: Hash, data: bytes | None) -> Iterator[Fault]:
        """Takes the next leaf: its hash, and its contents if they are kept. Yields what is wrong with it."""
        index = self.edge.size
        self.edge.append(digest)
        if data is None:
            self.forgotten += 1
            return
        if leaf_hash(data) != digest:
            yield Fault(index, "its contents do not have the hash that the log has")
            return
        try:
            leaf = load_leaf(data)
        except BadMessage as error:
            yield Fault(index, str(error))
            return
        if leaf.at < self._at:
            yield Fault(index, f"it is of {leaf.at}, and an earlier leaf is of {self._at}: it is back-dated")
        self._at = max(self._at, leaf.at)
        texts = self._restart(index) if isinstance(leaf, RestartLeaf) else self._match(index, leaf)
        for text in texts:
            yield Fault(index, text)

    def _restart(self, index: int) -> Iterator[str]:
        self.restarts += 1
        self._epoch = index
        yield from ()

    @property
    def models(self) -> set[str]:
        """The models whose asks the leaves name."""
        return {claim.model for claims in self._claims.values() for claim in claims}

    def check_ask(self, ask: Verified[Ask]) -> Iterator[Fault]:
        """Yields the leaves that say something else of an ask than what its provider signed."""
        signed = AskClaim.of_ask(ask.message)
        for claim, index in self._claims.get(ask.digest, {}).items():
            for member in fields(AskClaim):
                recorded, own = getattr(claim, member.name), getattr(signed, member.name)
                if recorded != own:
                    yield Fault(
                        index, f"{signed.provider}: its {member.name} is recorded as {recorded}, and its signed ask says {own}"
                    )

    def _note_asks(self, index: int, leaf: MatchLeaf) -> None:
        for entry in leaf.considered:
            if entry.facts is not None and (entry.ask in self._claims or len(self._claims) < _REMEMBERED_ASKS):
                claims = self._claims.setdefault(entry.ask, {})
                if len(claims) < _CLAIMS_AN_ASK:
                    claims.setdefault(AskClaim.of_leaf(leaf.model, entry.provider, entry.facts), index)

    def _match(self, index: int, leaf: MatchLeaf) -> Iterator[str]:
        self.matches += 1
        self._note_asks(index, leaf)
        if self._epoch is not None and leaf.epoch != self._epoch:
            yield f"it names {leaf.epoch} as the last restart, which was leaf {self._epoch}"
        tried = self._tried.setdefault(leaf.job, [])
        unlogged = leaf.attempt - len(tried)  # a job that was cancelled before its dispatch has no leaf of that attempt
        excluded = [entry.provider for entry in leaf.considered if entry.outcome is Reason.FAILED and entry.provider not in tried]
        if not self.forgotten and unlogged < 0:
            yield f"it is attempt {leaf.attempt} of job {leaf.job.hex()}, and {len(tried)} were logged before"
        if not self.forgotten and len(excluded) > max(unlogged, 0):
            yield f"{excluded[0]} is said to have had the job before, and no earlier leaf says so"
        tried.append(leaf.chosen.provider)
        while len(self._tried) > _REMEMBERED_JOBS:
            self._tried.popitem(last=False)
        yield from check_leaf(leaf)
