from __future__ import annotations

import json

import pytest

from scripts.contract_mutants import PARTS, SOURCES, mutants
from scripts.mutate_contracts import REASONS


@pytest.mark.parametrize("path", PARTS)
def test_every_mutant_is_one_change(path: str) -> None:
    """Each mutant has a name of its own and differs from the source in one place only."""
    source = (SOURCES / path).read_text()
    listed = list(mutants(path))
    assert len({mutant.name for mutant in listed}) == len(listed) > 0
    for mutant in listed:
        text = mutant.text()
        assert text != source
        assert text == source[: mutant.start] + mutant.replacement + source[mutant.end :]


def test_kinds_of_mutants() -> None:
    """Comparisons are flipped both ways; requires, state updates, events and modifiers are removed."""
    names = "\n".join(mutant.name for mutant in mutants("parts/Settlement.sol"))
    for expected in (
        "'>' -> '<=' in 'if (block.timestamp > row.claimBy()) return SkipReason.Expired;'",
        "'>' -> '>=' in 'if (block.timestamp > row.claimBy()) return SkipReason.Expired;'",
        "without 'if (payer == provider) return SkipReason.SelfDealing;'",
        "without 'tab_.write(total, reserved, releaseAt);'",
        "without 'emit RowsSettled(provider, results);'",
        "without 'nonReentrant'",
        "'-=' -> '+=' in 'reserved -= fromReserved;'",
    ):
        assert expected in names


def test_recorded_survivors_exist() -> None:
    """Each mutant that may survive has a reason and still exists."""
    reasons = json.loads(REASONS.read_text())
    assert reasons.keys() <= {mutant.name for path in PARTS for mutant in mutants(path)}
    assert all(len(reason) > 20 for reason in reasons.values())
