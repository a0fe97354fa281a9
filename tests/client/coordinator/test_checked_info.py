from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from tallystick.client.coordinator.checked_info import CheckedInfo
from tallystick.client.coordinator.info import CoordinatorInfo
from tallystick.client.coordinator.pinning import DeploymentPin
from tallystick.protocol.errors import Refusal
from tests.client.parties import DOMAIN, signer

INFO = CoordinatorInfo(signer("coordinator").address, DOMAIN, None, 6, fee_bps=100)


class Source:
    """A coordinator's answers, counted, and how often one was accepted."""

    def __init__(self) -> None:
        self.answer, self.asked, self.accepted = INFO, 0, 0
        self.info = CheckedInfo(self.read, 200)

    async def read(self) -> CoordinatorInfo:
        """Answers after a turn of the event loop."""
        self.asked += 1
        await asyncio.sleep(0)
        return self.answer

    def accept(self) -> None:
        """Counts."""
        self.accepted += 1


async def test_the_coordinator_is_asked_once() -> None:
    """Callers that come together share one answer, and later ones get the same."""
    source = Source()
    source.info.require(DeploymentPin(), source.accept)
    answers = await asyncio.gather(*(source.info.get() for _ in range(3)))
    assert [*answers, await source.info.get()] == [INFO] * 4
    assert (source.asked, source.accepted) == (1, 1)


async def test_a_new_requirement_is_checked_anew() -> None:
    """A market that is opened again asks again, and does not keep what another deployment file allowed."""
    source = Source()
    source.info.require(DeploymentPin(), source.accept)
    await source.info.get()
    source.info.require(DeploymentPin(chain_id=DOMAIN.chain_id + 1), source.accept)
    with pytest.raises(Refusal, match="pinned to"):
        await source.info.get()
    assert (source.asked, source.accepted) == (2, 1)


async def test_a_new_fee_is_accepted_up_to_the_limit() -> None:
    """Only a fee that changed alone counts; above the limit it is refused and the old one stays."""
    source = Source()
    assert not await source.info.fee_changed()
    source.answer = replace(INFO, fee_bps=150, token=signer("token").address)
    assert not await source.info.fee_changed()
    source.answer = replace(INFO, fee_bps=150)
    assert await source.info.fee_changed()
    source.answer = replace(INFO, fee_bps=300)
    with pytest.raises(Refusal, match="max_fee_bps"):
        await source.info.fee_changed()
    assert (await source.info.get()).fee_bps == 150
