"""Measured speeds: what the coordinator sees counts, not what a node says of itself."""

from __future__ import annotations

from dataclasses import replace

import pytest

from coordinator.domain import speeds as module
from coordinator.domain.listed_ask import Speed
from coordinator.domain.speeds import MEASURED, SpeedRecord, Speeds, Timing
from tallystick.protocol.criteria import Demand
from tallystick.protocol.link import Capacity
from tallystick.protocol.types import JobId
from tests.coordinator.harness import MODEL, FakeNode, World, person, quiet

ANN, BOB = person("ann").address, person("bob").address
STREAM = Timing(sent=10.0, body=10.5, last=12.5, chunks=50)
"""Half a second to the first token, then two seconds."""


def test_a_stream_tells_both_speeds() -> None:
    """The first token counts from the dispatch to the body, the output from there to the end."""
    speeds = Speeds()
    for number in range(MEASURED):
        assert speeds.measured(ANN, MODEL) is None, number
        speeds.record(ANN, MODEL, STREAM, 100)
    assert speeds.measured(ANN, MODEL) == Speed(500, 50)
    assert (speeds.measured(BOB, MODEL), speeds.measured(ANN, "other")) == (None, None)


def test_a_response_in_one_piece_tells_no_first_token() -> None:
    """A body that comes at once, in however many chunks, tells the speed of its tokens alone; one token tells the other one."""
    speeds = Speeds()
    for _ in range(MEASURED):
        speeds.record(ANN, MODEL, Timing(0.0, 4.0, 4.0, 2), 200)
        speeds.record(BOB, MODEL, Timing(0.0, 3.9, 4.0, 9), 1)
    assert speeds.measured(ANN, MODEL) == Speed(0, 50)
    assert speeds.measured(BOB, MODEL) == Speed(4_000, 0)


def test_a_slow_reader_is_not_the_providers_time() -> None:
    """The output of a response whose reader was slow is not measured; its first token is."""
    record = SpeedRecord().after(replace(STREAM, reader=1.0), 100)
    assert (record.first_tokens, record.outputs) == (1, 0)
    record = SpeedRecord().after(replace(STREAM, reader=0.1), 100)
    assert (record.first_tokens, record.outputs) == (1, 1)


def test_what_a_provider_did_once_fades() -> None:
    """A provider that was fast once and is slow now is soon known as slow, and the other way round."""
    record = SpeedRecord()
    for _ in range(100):
        record = record.after(Timing(0.0, 0.01, 0.1, 10), 100)
    assert record.speed == Speed(10, 1_111)
    for _ in range(24):
        record = record.after(Timing(0.0, 2.0, 22.0, 10), 100)
    assert record.speed.first_token_ms > 1_900
    assert record.speed.tokens_per_second == 5


def test_a_speed_that_stays_the_same_is_not_reported_again() -> None:
    """Each report moves the provider's asks in the book, so there is one for each change, and none before enough is known."""
    reported = list[Speed]()
    speeds = Speeds(lambda _provider, _model, speed: reported.append(speed))
    for _ in range(MEASURED + 5):
        speeds.record(ANN, MODEL, STREAM, 100)
    assert reported == [Speed(500, 50)]
    for _ in range(100):
        speeds.record(ANN, MODEL, Timing(sent=10.0, body=11.0, last=15.0, chunks=50), 100)
    assert reported[-1] == speeds.measured(ANN, MODEL)
    assert len(reported) == len(set(reported)) > 2


def test_being_outrun_only_makes_slower() -> None:
    """A provider that was late counts as at least that late; one that is known to be slower gains nothing."""
    speeds = Speeds()
    for _ in range(MEASURED):
        speeds.record(ANN, MODEL, STREAM, 100)
    speeds.record_late(ANN, MODEL, 100.0)
    assert speeds.measured(ANN, MODEL) == Speed(500, 50)
    speeds.record_late(ANN, MODEL, 4_500.0)
    assert speeds.measured(ANN, MODEL) == Speed(1_500, 50)


def test_the_mean_output_of_a_model() -> None:
    """It follows the last jobs, counts no empty response, and is unknown for a model without any."""
    speeds = Speeds()
    assert speeds.mean_output(MODEL) is None
    for tokens in (100, 300, 0):
        speeds.record(ANN, MODEL, STREAM, tokens)
    assert speeds.mean_output(MODEL) == 200
    for _ in range(1_000):
        speeds.record(BOB, MODEL, STREAM, 50)
    assert speeds.mean_output(MODEL) == 50


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the pairs and models measured last are remembered; names that a database might refuse are not measured."""
    monkeypatch.setattr(module, "MAX_REMEMBERED", 3)
    monkeypatch.setattr(module, "MAX_MODELS", 2)
    speeds = Speeds()
    for number in range(10):
        speeds.record(ANN, f"{number}", STREAM, 100)
    assert set(speeds.take_changed()) == {(ANN, f"{number}") for number in (7, 8, 9)}
    assert [speeds.mean_output(f"{number}") for number in (7, 8, 9)] == [None, 100, 100]
    for name in ("x" * 257, "nul\0", "\ud800"):
        speeds.record(ANN, name, STREAM, 100)
        speeds.record_late(ANN, name, 100.0)
    assert speeds.take_changed() == {}


def test_what_could_not_be_stored_is_stored_later() -> None:
    """Records that were marked are returned again; what was restored is not."""
    speeds = Speeds()
    speeds.record(ANN, MODEL, STREAM, 100)
    changed = speeds.take_changed()
    assert (set(changed), speeds.take_changed()) == ({(ANN, MODEL)}, {})
    speeds.mark_unsaved(changed)
    assert speeds.take_changed() == changed
    other = Speeds()
    other.restore(changed)
    assert (other.take_changed(), other.mean_output(MODEL)) == ({}, 100)


async def _answer(world: World, node: FakeNode, *, wait: float, output: float) -> JobId:
    client = await world.started(node)
    job = client.job.id
    node.chunk(job)
    await quiet()
    world.clock.seconds += wait
    for _ in range(4):
        node.chunk(job)
        await quiet()
        world.clock.seconds += output / 4
    node.last_chunk(job)
    await quiet()
    node.hand_in(job, node.receipt(job))
    await quiet()
    return job


async def test_a_lie_about_speed_gains_nothing_lasting() -> None:
    """A slow node that claims to be fast is behind an honest one as soon as enough of its jobs were measured; a restart or a
    reconnection does not make its word count again.
    """
    world = World()
    liar, honest = world.node("liar"), world.node("honest")
    world.market.matchmaker.set_capacity(liar.address, Capacity(4, 4, 9_999, 1))
    world.market.matchmaker.set_capacity(honest.address, Capacity(4, 4, 50, 200))

    def first() -> str:
        return world.market.matchmaker.shortlist(Demand(MODEL, sort="latency"))[0].provider

    assert first() == liar.address
    for _ in range(MEASURED):
        await _answer(world, liar, wait=3.0, output=4.0)
        await _answer(world, honest, wait=0.2, output=1.0)
    assert world.market.matchmaker.speeds.measured(liar.address, MODEL) == Speed(3_000, 1)
    assert first() == honest.address
    assert world.market.matchmaker.shortlist(Demand(MODEL, sort="speed"))[0].provider == honest.address
    liar.leave()
    liar.connect(Capacity(4, 4, 9_999, 1))
    assert first() == honest.address
    await world.pass_time(1)
    await world.restart()
    world.market.matchmaker.set_capacity(liar.address, Capacity(4, 4, 9_999, 1))
    assert first() == honest.address
