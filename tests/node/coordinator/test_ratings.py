"""What coordinators say of a node's integrity: shown, warned about as it falls or is too low for requests, never trusted."""

from __future__ import annotations

from typing import Any

import pytest

from node.coordinator.ratings import DAY, FALL_PERCENT, READ_SECONDS, Ratings
from tallystick.protocol.criteria import Reason
from tallystick.protocol.errors import Code, Unavailable
from tallystick.protocol.health import CheckResult, Health
from tallystick.protocol.types import Address

NODE = Address("0x" + "ab" * 20)
URL = "wss://market.example/v1/node"


class World:
    """A coordinator whose answer is set by the test, and a clock."""

    def __init__(self, *urls: str) -> None:
        self.now = 1_800_000_000.0
        self.answers: dict[str, Any] = {}
        self.asked: list[str] = []
        self.ratings = Ratings(NODE, lambda: urls or (URL,), lambda: (("m", "q4"),), fetch=self._fetch, now=lambda: self.now)

    async def _fetch(self, url: str) -> object:
        self.asked.append(url)
        answer = next((answer for prefix, answer in self.answers.items() if url.startswith(prefix)), None)
        if answer is None:
            raise Unavailable(Code.COORDINATOR_UNAVAILABLE, "no answer")
        return answer

    async def check(self, integrity: float, audits: int = 9, **further: Any) -> CheckResult | None:
        """The state after the coordinator rates the node so, once the next reading is due."""
        self.now += READ_SECONDS
        self.answers["https://market.example"] = _why(integrity, audits, **further)
        return (await self.ratings.check()).get("integrity")


def _why(integrity: object, audits: object = 9, model: str = "m", reasons: tuple[str, ...] = ()) -> dict[str, Any]:
    rating = {"model": model, "precision": "q4", "integrity": integrity, "audits": audits, "tokensPerSecond": 1}
    return {"ratings": [rating], "decisions": [{"stage": "shortlist", "why": reason, "at": 1} for reason in reasons]}


async def test_integrity_is_shown_and_its_fall_is_a_warning() -> None:
    """A fall within a day warns with the model and the figures, until the day is over or it has risen again."""
    world = World()
    shown = await world.check(98.0)
    assert shown is not None
    assert (shown.status, shown.value) == (Health.PASS, 98.0)
    assert world.ratings.integrity() == {("m", "q4"): 98.0}
    assert world.asked == [f"https://market.example/v1/providers/{NODE}/why?limit=50"]
    less = await world.check(98.0 - FALL_PERCENT + 0.1)
    assert less is not None
    assert less.status is Health.PASS
    fallen = await world.check(98.0 - FALL_PERCENT)
    assert fallen is not None
    assert (fallen.status, fallen.value) == (Health.WARN, 93.0)
    assert fallen.output == "the integrity of m (q4) fell by 5.0 to 93 % within a day"
    assert "tally node why" in fallen.remedy
    risen = await world.check(95.0)
    assert risen is not None
    assert risen.status is Health.PASS
    assert (await world.check(80.0) or risen).status is Health.WARN
    world.now += DAY
    assert (await world.check(80.0) or fallen).status is Health.PASS


async def test_what_no_audit_says_is_no_integrity() -> None:
    """A rating without audits is the coordinator's assumption of a newcomer: it is not shown, and cannot fall."""
    world = World()
    assert await world.check(90.0, audits=0) is None
    assert await world.check(10.0, audits=0) is None
    assert world.ratings.integrity() == {}


@pytest.mark.parametrize(("missed", "others", "warns"), [(2, 0, False), (3, 0, True), (3, 12, True), (3, 13, False)])
async def test_requests_that_ask_for_more(missed: int, others: int, warns: bool) -> None:
    """If a fifth of the latest requests asked for more integrity, the market needs more than this node has."""
    reasons = (Reason.INTEGRITY.value,) * missed + ("offered to the client, place 1 of 1",) * others
    result = await World().check(97.0, reasons=reasons)
    assert result is not None
    assert (result.status is Health.WARN) is warns
    if warns:
        assert f"{missed} of the latest {missed + others} requests" in result.output


async def test_the_strictest_coordinator_counts() -> None:
    """Each coordinator is asked once for all its links' checks, and the lowest integrity is shown."""
    world = World("wss://a.example/v1/node", "ws://b.example:9/x/v1/node")
    world.answers = {"https://a.example/v1": _why(99.0), "http://b.example:9/x/v1": _why(91.5)}
    assert (await world.ratings.check())["integrity"].value == 91.5
    await world.ratings.check()
    assert len(world.asked) == 2


BAD: dict[str, Any] = {
    "no object": [],
    "no ratings": {"decisions": []},
    "too many decisions": _why(97.0, reasons=("x",) * 51),
    "text": _why("97"),
    "more than all": _why(101),
    "no number": _why(float("nan")),
    "audits as text": _why(97.0, audits="9"),
    "another node's model": _why(1.0, model="x" * 10_000),
    "nothing at all": None,
}


@pytest.mark.parametrize("name", BAD)
async def test_answers_that_are_none(name: str) -> None:
    """A coordinator that answers nonsense, or nothing, is no alarm: other checks say that it is away."""
    world = World()
    world.answers["https://market.example"] = BAD[name]
    assert await world.ratings.check() == {}
    assert world.ratings.integrity() == {}


async def test_a_coordinator_that_went_away_is_forgotten() -> None:
    """What it said before is not shown for ever."""
    world = World()
    await world.check(97.0)
    world.now += READ_SECONDS
    world.answers.clear()
    assert await world.ratings.check() == {}
