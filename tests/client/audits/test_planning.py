from __future__ import annotations

import os
import random

import pytest

from tallystick.audit.integrity import Integrity
from tallystick.audit.verdicts import Verdict
from tallystick.client.audits.planning import MAX_RATE, choose_positions, draw, is_drawn


def seeded(seed: int) -> random.Random:
    """Repeatable randomness."""
    return random.Random(seed)


def test_draws_are_uniform() -> None:
    """From 0 to below 1."""
    numbers = [draw(seeded(seed).randbytes) for seed in range(2_000)]
    assert 0 <= min(numbers) < 0.01
    assert 0.99 < max(numbers) < 1
    assert 0.45 < sum(numbers) / len(numbers) < 0.55


@pytest.mark.parametrize("tokens", [1, 15, 16, 63, 64, 65, 1_000, 100_000])
def test_positions(tokens: int) -> None:
    """As many as asked for at most, ascending, with the beginning and the end."""
    positions = choose_positions(tokens, 64, os.urandom)
    assert len(positions) == min(64, tokens + 1)
    assert list(positions) == sorted(set(positions))
    assert (positions[0], positions[-1]) == (0, tokens)
    assert positions[:24] == tuple(range(min(24, tokens + 1)))


def test_positions_are_secret() -> None:
    """Two audits of one answer look at different places."""
    assert choose_positions(1_000, 64, os.urandom) != choose_positions(1_000, 64, os.urandom)


def test_rates() -> None:
    """A newcomer's jobs are drawn more often than a trusted provider's, and nobody's more often than MAX_RATE."""
    trusted = Integrity()
    for _ in range(400):
        trusted = trusted.after(Verdict.PASS)
    assert is_drawn(0.29, Integrity(), 0)
    assert is_drawn(0.29, trusted, 10)
    assert not is_drawn(0.29, trusted, 1_000)
    assert is_drawn(0.019, trusted, 1_000)
    assert not is_drawn(MAX_RATE, Integrity(), 0)
