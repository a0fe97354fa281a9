from __future__ import annotations

from coordinator.bus.in_process import InProcessBus
from coordinator.ports import node_subject
from tests.coordinator.harness import PAYER


def test_a_frame_goes_to_the_subjects_handler() -> None:
    """A frame reaches the handler of its subject at once, and no other."""
    bus, first_frames, second_frames = InProcessBus(), list[bytes](), list[bytes]()
    bus.attach("a", first_frames.append)
    bus.attach("b", second_frames.append)
    assert bus.send("a", b"frame")
    assert (first_frames, second_frames) == ([b"frame"], [])


def test_a_subject_without_a_handler() -> None:
    """Sending to a subject without a handler returns False and does nothing."""
    assert not InProcessBus().send("a", b"frame")


def test_the_last_handler_has_the_subject() -> None:
    """A second handler takes over the subject; detaching the first one does not affect it."""
    bus, first, second = InProcessBus(), list[bytes](), list[bytes]()
    bus.attach("a", first.append)
    bus.attach("a", second.append)
    bus.detach("a", first.append)
    assert bus.send("a", b"frame")
    assert (first, second) == ([], [b"frame"])
    bus.detach("a", second.append)
    assert not bus.send("a", b"frame")


def test_subjects_are_distinct() -> None:
    """Each node has a subject of its own."""
    assert node_subject(PAYER.address) == f"node.{PAYER.address}"
