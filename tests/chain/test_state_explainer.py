from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tallystick.chain.escrow import ProviderAccount, Purse, TabState
from tallystick.chain.state_explainer import REPORTER_PERCENT, Explanation, StateExplainer, moment, span
from tallystick.protocol.types import Amount, Seconds
from tests.chain.harness import DOLLAR, RULES, World, person

NOW = 1_800_000_000
OWNER, PROVIDER = person("owner").address, person("provider").address
EXPLAIN = StateExplainer(RULES, NOW)
EMPTY = Purse(OWNER, Amount(0), Amount(0), Seconds(0))
FULL = replace(EMPTY, free=Amount(10 * DOLLAR))
UNUSED = TabState(Amount(0), Amount(0), Seconds(0))
ACCOUNT = ProviderAccount(Amount(0), PROVIDER, Amount(0), Amount(0), Seconds(0), 0)


def _calls(meaning: Explanation) -> list[tuple[str, int]]:
    return [(step.call, step.at) for step in meaning.next_steps]


def _text(meaning: Explanation) -> str:
    return " ".join(meaning.sentences)


@pytest.mark.parametrize(
    ("purse", "state", "calls"),
    [
        (replace(EMPTY, owner=None), "unopened", [("open", 0)]),
        (EMPTY, "empty", [("deposit", 0)]),
        (FULL, "open", [("deposit", 0), ("reserve", 0), ("thaw", 0)]),
        (
            replace(FULL, thawing=Amount(4 * DOLLAR), thaw_at=Seconds(NOW + 60)),
            "thawing",
            [("withdraw", NOW + 60), ("cancelThaw", 0), ("deposit", 0), ("reserve", 0)],
        ),
        (
            replace(FULL, thawing=Amount(10 * DOLLAR), thaw_at=Seconds(NOW)),
            "thawed",
            [("withdraw", 0), ("cancelThaw", 0), ("deposit", 0)],
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_states_and_calls_of_a_purse(purse: Purse, state: str, calls: list[tuple[str, int]]) -> None:
    """Each state of a purse has its name, and exactly the calls that the contract accepts now or from an announced time on."""
    meaning = EXPLAIN.purse(purse)
    assert (meaning.state, _calls(meaning)) == (state, calls)
    assert all(step.account == OWNER for step in meaning.next_steps if state != "unopened")


@pytest.mark.parametrize(
    ("tab", "purse", "state", "calls"),
    [
        (UNUSED, replace(EMPTY, owner=None), "unused", []),
        (UNUSED, FULL, "unused", [("settle", 0), ("reserve", 0)]),
        (replace(UNUSED, settled=Amount(1)), FULL, "open", [("settle", 0), ("reserve", 0)]),
        (
            replace(UNUSED, reserved=Amount(5)),
            FULL,
            "reserved",
            [("settle", 0), ("reserve", 0), ("release", 0), ("giveBack", 0)],
        ),
        (
            TabState(Amount(1), Amount(5), Seconds(NOW + 9)),
            FULL,
            "releasing",
            [("settle", 0), ("finishRelease", NOW + 9), ("reserve", 0), ("giveBack", 0)],
        ),
        (
            TabState(Amount(6), Amount(0), Seconds(NOW - 1)),
            FULL,
            "released",
            [("settle", 0), ("finishRelease", 0), ("reserve", 0)],
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_states_and_calls_of_a_tab(tab: TabState, purse: Purse, state: str, calls: list[tuple[str, int]]) -> None:
    """Each state of a tab has its name and its possible calls, also after the provider collected during a release."""
    meaning = EXPLAIN.tab(tab, purse)
    assert (meaning.state, _calls(meaning)) == (state, calls)


@pytest.mark.parametrize(
    ("account", "state", "calls"),
    [
        (ACCOUNT, "unstaked", [("stake", 0)]),
        (replace(ACCOUNT, credit=Amount(7)), "unstaked", [("cashOut", 0), ("stake", 0)]),
        (replace(ACCOUNT, stake=Amount(7)), "staked", [("unstake", 0)]),
        (
            replace(ACCOUNT, stake=Amount(7), unstaking=Amount(2), unstake_at=Seconds(NOW + 5)),
            "unstaking",
            [("unstake", 0), ("withdrawStake", NOW + 5), ("unstake", 0)],
        ),
        (
            replace(ACCOUNT, unstaking=Amount(2), unstake_at=Seconds(NOW)),
            "withdrawable",
            [("unstake", 0), ("withdrawStake", 0), ("unstake", 0)],
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_states_and_calls_of_an_account(account: ProviderAccount, state: str, calls: list[tuple[str, int]]) -> None:
    """Each state of an account's credit and stake has its name and its possible calls."""
    meaning = EXPLAIN.provider(account, PROVIDER)
    assert (meaning.state, _calls(meaning)) == (state, calls)


def test_money_and_times_are_written_for_people() -> None:
    """Sentences name amounts in dollars and waits in words; a coordinator's rate is a percentage."""
    thawing = EXPLAIN.purse(replace(FULL, thawing=Amount(DOLLAR // 4), thaw_at=Seconds(NOW + 3_700)))
    assert "0.25 is under thaw" in _text(thawing)
    assert "in 1 hour 1 minute, at 2027-01-15 09:01:40 UTC" in _text(thawing)
    assert "9.75 is free" in _text(thawing)
    assert "2.5 %" in _text(EXPLAIN.provider(replace(ACCOUNT, fee_bps=250), PROVIDER))
    assert "1 minute 40 seconds" in _text(EXPLAIN.rules())
    assert RULES.treasury in _text(EXPLAIN.rules())
    assert moment(NOW, NOW) == moment(NOW - 5, NOW) == "now"


@given(st.integers(0, 10**10))
def test_any_length_of_time_has_words(seconds: int) -> None:
    """A duration is written with at most two units, rounded down by less than one smaller unit."""
    words = span(seconds).split()
    units = {"day": 86_400, "hour": 3_600, "minute": 60, "second": 1}
    stated_seconds = sum(int(count) * units[name.rstrip("s")] for count, name in zip(words[::2], words[1::2], strict=True))
    assert len(words) in {2, 4}
    assert stated_seconds <= seconds
    assert seconds - stated_seconds < max(60, stated_seconds)


async def test_the_reporters_part_is_the_contracts(world: World) -> None:
    """The share in the text is the one that the contract pays."""
    (bps,) = await world.escrow.read("REPORTER_BPS")
    assert bps == REPORTER_PERCENT * 100
