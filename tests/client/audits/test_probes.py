"""Probes of the coordinator: newcomers and idle providers first, none safe for ever, and in the shape of the traffic."""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

import pytest

from tallystick.client.audits.probes import (
    MAX_INPUT_TOKENS,
    MAX_OUTPUT_TOKENS,
    MIN_OUTPUT_TOKENS,
    ProbeTarget,
    choose_target,
    read_targets,
    shape_of_traffic,
)
from tallystick.client.audits.synthetic import make_up_request
from tallystick.protocol.log_facts import RequestFacts
from tallystick.protocol.match_log import MatchLeaf
from tallystick.protocol.messages import Spec
from tallystick.protocol.routes import CHAT
from tallystick.protocol.types import Address, Hash, JobId
from tallystick.protocol.wire import loads
from tests.builders import build_ask
from tests.client.parties import DOMAIN, signer

ANN, BOB, CAT = (signer(name) for name in ("ann", "bob", "cat"))


def target(provider: Address, audits: int, free: int = 1) -> ProbeTarget:
    """An ask that can be probed."""
    return ProbeTarget(provider, "m", audits, free)


def entry(key: Any = ANN, *, features: tuple[str, ...] = (), **members: Any) -> dict[str, Any]:
    """An entry of POST /v1/explain."""
    ask = key.sign(build_ask(key.address, spec=Spec(features=features)), DOMAIN)
    return {"ask": ask.to_json(), "free": 1, "audits": 0} | members


def leaf(model: str, input_tokens: int, output_tokens: int = 100) -> MatchLeaf:
    """A match of a request of this size."""
    request = RequestFacts(input_tokens, output_tokens)
    return MatchLeaf(1, 0, JobId(bytes(16)), 0, Hash(bytes(32)), False, 0.5, model, request, ())


def test_only_asks_that_can_be_probed_are_read() -> None:
    """Those for chats with a free slot; what a coordinator lists besides is left out."""
    listed = [entry(), entry(BOB, free=0), entry(CAT, features=(f"-{CHAT}",)), {"ask": 1}, entry(audits="x"), {}]
    assert [found.provider for found in read_targets(listed)] == [ANN.address]
    assert read_targets([entry(audits=7, free=3)])[0] == ProbeTarget(ANN.address, build_ask(ANN.address).model, 7, 3)


def test_newcomers_come_first_and_nobody_is_safe() -> None:
    """The fewest audits first, the idlest among equals, and each of the others sometimes."""
    targets = [target(ANN.address, 9, 9), target(BOB.address, 0, 1), target(CAT.address, 0, 4)]
    counts = Counter(chosen.provider for _ in range(2_000) if (chosen := choose_target(targets, os.urandom)) is not None)
    assert counts[CAT.address] > 1_400
    assert min(counts[ANN.address], counts[BOB.address]) > 80
    assert choose_target([], os.urandom) is None


@pytest.mark.parametrize("draw", [bytes(8), b"\xff" * 8])
def test_the_shape_is_that_of_the_traffic(draw: bytes) -> None:
    """As long as a request for this model that the log has, within bounds, and never a text of anybody."""
    leaves = [leaf("m", 500), leaf("other", 9)]
    body = shape_of_traffic("m", leaves, lambda size: draw[:size])
    assert len(body["messages"][-1]["content"]) == 2_000
    assert (body["model"], body["max_tokens"]) == ("m", 100)
    assert set(body["messages"][-1]["content"]) == {"x"}
    made = loads(make_up_request(CHAT, body, os.urandom), "body")
    assert made["model"] == "m"
    assert 1_900 < len(made["messages"][-1]["content"]) < 2_300
    assert "xxx" not in made["messages"][-1]["content"]


def test_the_shape_is_bounded() -> None:
    """A coordinator pays no more for a probe than these bounds; without any traffic there is a shape all the same."""
    huge = shape_of_traffic("m", [leaf("m", 1 << 31, 1 << 31)], os.urandom)
    assert len(huge["messages"][-1]["content"]) == 4 * MAX_INPUT_TOKENS
    assert huge["max_tokens"] == MAX_OUTPUT_TOKENS
    assert shape_of_traffic("m", [leaf("m", 0, 0)], os.urandom)["max_tokens"] == MIN_OUTPUT_TOKENS
    assert shape_of_traffic("m", [], os.urandom)["max_tokens"] >= MIN_OUTPUT_TOKENS
    other = shape_of_traffic("m", [leaf("other", 50)], os.urandom)
    assert len(other["messages"][-1]["content"]) == 200
