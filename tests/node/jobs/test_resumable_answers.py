"""Answers whose connection broke after their receipt was signed: their ends are sent again."""

from __future__ import annotations

import pytest

from node.jobs import resumable_answers
from node.jobs.resumable_answers import MAX_ANSWER_BYTES, ResumableAnswers, SentChunks
from node.ports import ResponseEnd, ResponsePart, ResponseStart
from node.testing.memory import MemoryLink, ScriptedEngine
from tallystick.protocol.eip712 import read_signed_bytes
from tallystick.protocol.errors import BadMessage
from tallystick.protocol.messages import Receipt
from tallystick.protocol.types import JobId
from tallystick.protocol.wire import Kind
from tests.node.harness import COORDINATOR, PROVIDER, RunnerHarness

HEAD = ResponseStart(200, "text/event-stream")
ONE, TWO = ResponsePart(b"one ", has_output=True, text_bytes=4), ResponsePart(b"two ", has_output=True, text_bytes=4)
END = ResponseEnd(b"the end")
JOB = JobId(b"j" * 16)


def _sent(*chunks: bytes) -> SentChunks:
    sent = SentChunks()
    for chunk in chunks:
        sent.add(chunk)
    return sent


def _number(value: int) -> bytes:
    return value.to_bytes(4, "big")


async def test_a_new_link_gets_what_the_old_one_lost() -> None:
    """The chunks from the one on that is asked for, and the same receipt: with what came before, the answer is whole."""
    harness = RunnerHarness(ScriptedEngine(HEAD, ONE, TWO, END))
    placed = harness.dispatch()
    receipt = await harness.receipt(placed)
    assert receipt.cost
    chunks, again = harness.link.payloads(placed.job, Kind.CHUNK), harness.connect()
    harness.runner.resumable.resume(again, placed.job, _number(2))
    assert again.payloads(placed.job, Kind.CHUNK) == chunks[2:]
    assert placed.read(chunks[:2] + again.payloads(placed.job, Kind.CHUNK))[3]
    (sent_again,) = again.payloads(placed.job, Kind.RECEIPT)
    assert read_signed_bytes(Receipt, sent_again).message == receipt


async def test_a_link_that_breaks_while_the_receipt_is_stored() -> None:
    """What is asked for before the receipt is on disk is sent as soon as it is."""
    harness = RunnerHarness(ScriptedEngine(HEAD, ONE, END))
    placed, again = harness.dispatch(), harness.connect()
    harness.runner.resumable.resume(again, placed.job, _number(1))
    assert not again.frames
    await harness.receipt(placed)
    assert again.payloads(placed.job, Kind.CHUNK) == harness.link.payloads(placed.job, Kind.CHUNK)[1:]
    assert again.payloads(placed.job, Kind.RECEIPT)


def test_chunks_that_the_coordinator_confirmed_are_not_kept() -> None:
    """Its credit says how many it has. Nobody can ask for one of them again."""
    sent = _sent(b"a", b"b", b"c")
    sent.confirm(2)
    assert (sent.since(1), sent.since(2), sent.since(3), sent.size) == (None, [b"c"], [], 1)
    sent.confirm(32)
    assert (sent.since(3), sent.size) == ([], 0)


def test_an_answer_keeps_its_newest_chunks() -> None:
    """A megabyte of them; without one that is missing, nothing is sent."""
    sent = _sent(b"a", bytes(MAX_ANSWER_BYTES - 1), b"c")
    assert (sent.since(0), sent.size) == (None, MAX_ANSWER_BYTES)
    answers, link = ResumableAnswers(), MemoryLink(COORDINATOR.address)
    answers.keep(link, JOB, sent, b"receipt")
    answers.resume(link, JOB, _number(0))
    assert not link.frames


def test_answers_are_forgotten_once_acknowledged_or_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest make room."""
    monkeypatch.setattr(resumable_answers, "MAX_BYTES", 3_000)
    answers, link = ResumableAnswers(), MemoryLink(COORDINATOR.address)
    jobs = [JobId(bytes((number,)) * 16) for number in range(3)]
    for job in jobs:
        answers.keep(link, job, _sent(b"chunk"), b"receipt")
    answers.resume(link, jobs[0], _number(0))
    assert (len(answers), link.frames) == (2, [])
    for job in jobs:
        answers.forget(job)
        answers.forget(job)
    assert len(answers) == 0
    for job in jobs[1:]:
        answers.keep(link, job, _sent(b"chunk"), b"receipt")
    assert len(answers) == 2, "what was forgotten takes no room"


async def test_requests_for_unknown_jobs_are_bounded() -> None:
    """A coordinator that asks for thousands makes the node hold the newest ones alone."""
    answers, link = ResumableAnswers(), MemoryLink(COORDINATOR.address)
    jobs = [JobId(number.to_bytes(16, "big")) for number in range(1_000)]
    for job in jobs:
        answers.resume(link, job, _number(0))
    for job in jobs:
        answers.keep(link, job, _sent(b"chunk"), b"receipt")
    assert len({job for _, job, _ in link.frames}) == 64


def test_another_coordinator_gets_nothing() -> None:
    """Nor does a frame of the wrong size."""
    answers, other = ResumableAnswers(), MemoryLink(PROVIDER.address)
    answers.keep(MemoryLink(COORDINATOR.address), JOB, _sent(b"chunk"), b"receipt")
    answers.resume(other, JOB, _number(0))
    assert not other.frames
    with pytest.raises(BadMessage, match="expected 4 bytes"):
        answers.resume(other, JOB, b"")
