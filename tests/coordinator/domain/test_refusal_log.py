"""The log of refusals: newest first, bounded for each payer and for all."""

from __future__ import annotations

import pytest

from coordinator.domain import refusal_log
from coordinator.domain.refusal_log import MAX_REFUSALS, MAX_TEXT, RefusalLog
from tallystick.protocol.errors import Code, Refusal
from tallystick.protocol.types import Address, JobId
from tests.coordinator.harness import person


def test_newest_first() -> None:
    """A payer's refusals are listed newest first, so many and no more, with texts that are not too long."""
    log, payer = RefusalLog(), person("payer").address
    for number in range(MAX_REFUSALS + 2):
        log.note(payer, JobId(bytes(16)), "m", Refusal(Code.UNSECURED, "x" * 9_000), number)
    assert [refused.at for refused in log.of(payer)] == list(range(MAX_REFUSALS + 1, 1, -1))
    assert {len(refused.text) for refused in log.of(payer)} == {MAX_TEXT}
    assert log.of(person("other").address) == []


def test_the_payer_of_longest_ago_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the number of payers, the one without a refusal for longest is forgotten."""
    monkeypatch.setattr(refusal_log, "MAX_PAYERS", 2)
    log = RefusalLog()
    for name in ("ann", "bob", "ann", "cid"):
        log.note(Address(name), JobId(bytes(16)), "m", Refusal(Code.UNSECURED, "x"), 1)
    assert [bool(log.of(Address(name))) for name in ("ann", "bob", "cid")] == [True, False, True]
