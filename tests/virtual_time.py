"""An event loop whose clock moves only when nothing is left to do, so that tests of waits depend on no machine's speed.

For tests without sockets and threads: a wait for those would pass at once.
"""

from __future__ import annotations

import asyncio
import functools
import selectors
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, ParamSpec

P = ParamSpec("P")
Key = tuple[selectors.SelectorKey, int]


class _Selector(selectors.DefaultSelector):
    """Moves the clock by the time that the loop would wait."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[Key]:
        ready = super().select(0)
        if ready or timeout == 0:
            return ready
        if timeout is None:
            return super().select(None)
        self.now += timeout
        return ready


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """See the module's docstring."""

    def __init__(self) -> None:
        self._clock = _Selector()
        super().__init__(self._clock)

    def time(self) -> float:
        """Seconds that its tasks have waited."""
        return self._clock.now


def loop_factories() -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """For a conftest's `pytest_asyncio_loop_factories`."""
    return {"virtual time": VirtualTimeLoop}


def on_virtual_time(test: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    """Decorates one test of a module whose other tests need real time."""

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
            runner.run(test(*args, **kwargs))

    return run
