from __future__ import annotations

from collections import Counter
from itertools import pairwise

from scripts.bench_affinity import Policy, Size, possible_share, write_conversation
from tallystick.protocol.types import Address

PROVIDERS = [Address(f"0x{number:040x}") for number in range(3)]


def test_each_turn_begins_with_the_one_before() -> None:
    """A replayed turn sends the earlier messages again, a recorded answer and a new question; other seeds share nothing."""
    turns = write_conversation("a 1", 3)
    assert [len(messages) for messages in turns] == [2, 4, 6]
    assert all(later[: len(earlier)] == earlier for earlier, later in pairwise(turns))
    assert turns == write_conversation("a 1", 3)
    assert turns[0][0] != write_conversation("b 1", 3)[0][0]


def test_the_possible_share_grows_with_the_turns() -> None:
    """A single turn finds nothing."""
    assert possible_share(Size(2, 1, 1, 3)) == 0
    assert 0.4 < possible_share(Size(2, 3, 1, 3)) < possible_share(Size(2, 6, 1, 3)) < 1


def test_the_policies_that_are_compared() -> None:
    """Round robin takes turns, least-loaded takes the least loaded, and affinity is the market's own choice."""
    assert Policy("affinity", PROVIDERS).choose() is None
    in_turn = Policy("round_robin", PROVIDERS)
    assert Counter(in_turn.choose() for _ in range(9)) == dict.fromkeys(PROVIDERS, 3)
    least = Policy("least_loaded", PROVIDERS)
    least.under_way.update({PROVIDERS[0]: 2, PROVIDERS[1]: 1, PROVIDERS[2]: 2})
    assert {least.choose() for _ in range(9)} == {PROVIDERS[1]}
