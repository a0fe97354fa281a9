"""Waiting with a deadline that costs nothing where nothing has to wait: most sends and reads of a server end at once."""

from __future__ import annotations

import asyncio
import types
from collections.abc import Awaitable, Generator
from typing import Any, TypeVar

T = TypeVar("T")


async def wait_within(seconds: float, awaitable: Awaitable[T]) -> T:
    """The result of `awaitable`, which begins to run at once. A timer is set only if it has to wait.

    Raises TimeoutError after `seconds`; the awaitable is cancelled then.
    """
    steps = awaitable.__await__()
    try:
        waits_for = next(steps)
    except StopIteration as end:
        result: T = end.value
        return result
    async with asyncio.timeout(seconds):
        return await _resume(steps, waits_for)


@types.coroutine
def _resume(steps: Generator[Any, Any, T], waits_for: Any) -> Generator[Any, Any, T]:
    """Goes on with an awaitable that has yielded `waits_for` to the event loop, as `await` would have from its beginning."""
    while True:
        try:
            yield waits_for
        except BaseException as error:  # noqa: BLE001 - a cancellation, which concerns the awaitable
            try:
                waits_for = steps.throw(error)
            except StopIteration as end:
                result: T = end.value
                return result
        else:
            return (yield from steps)
