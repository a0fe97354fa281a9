"""A caller that disconnects ends the work on its request, at once or a while later; nothing else does."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from starlette.types import Message

from tallystick.client.gateway.disconnects import DisconnectWatch, watch_by_task
from tests.virtual_time import on_virtual_time


def leaves_after(seconds: float) -> Callable[[], object]:
    """A `receive` whose caller sends another event, and disconnects after some seconds."""
    events = [{"type": "http.disconnect"}, {"type": "http.request"}]

    async def receive() -> Message:
        if len(events) == 1:
            await asyncio.sleep(seconds)
        return events.pop()

    return receive


class Answer:
    """An answer that takes some seconds. `cleanup`: seconds that it takes when it is cancelled."""

    def __init__(self, seconds: float, cleanup: float = 0, *, swallows: bool = False) -> None:
        self.seconds, self.cleanup, self.swallows, self.log = seconds, cleanup, swallows, list[str]()

    async def run(self) -> None:
        try:
            await asyncio.sleep(self.seconds)
            self.log.append("answered")
        except asyncio.CancelledError:
            await asyncio.sleep(self.cleanup)
            self.log.append("cleaned up")
            if not self.swallows:
                raise


@on_virtual_time
@pytest.mark.parametrize(
    ("linger", "seconds", "log", "ends"),
    [
        (0, 1, ["answered"], 1),
        (0, 9, ["cleaned up"], 2 + 3),
        (4, 5, ["answered"], 5),
        (4, 9, ["cleaned up"], 2 + 4 + 3),
    ],
)
@pytest.mark.parametrize("swallows", [False, True])
async def test_a_caller_that_leaves_ends_the_answer(
    linger: float, seconds: float, log: list[str], ends: float, swallows: bool
) -> None:
    """It is cancelled `linger` seconds later, what it does then is waited for, and the task goes on uncancelled."""
    answer, clock = Answer(seconds, cleanup=3, swallows=swallows), asyncio.get_running_loop().time
    began = clock()
    await DisconnectWatch(watch_by_task(leaves_after(2)), linger).run(answer.run())  # type: ignore[arg-type]
    assert (answer.log, clock() - began) == (log, ends)
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0
    await asyncio.sleep(20)  # nothing cancels the task later
    assert len(asyncio.all_tasks()) == 1


@on_virtual_time
async def test_errors_and_cancellations_are_passed_on() -> None:
    """An answer's error is raised; so is a cancellation from outside, also if the caller left before it."""

    async def fails() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        await DisconnectWatch(watch_by_task(leaves_after(2))).run(fails())  # type: ignore[arg-type]
    for seconds in (1.0, 100.0):
        answer = Answer(50, cleanup=10)
        serving = asyncio.create_task(DisconnectWatch(watch_by_task(leaves_after(seconds))).run(answer.run()))  # type: ignore[arg-type]
        await asyncio.sleep(5)
        serving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await serving
    assert len(asyncio.all_tasks()) == 1
