"""The bus: frames on their way between jobs and nodes, addressed by subject. In one process it is a table of handlers; between
replicas the same verbs run over a broker.
"""

from __future__ import annotations

from coordinator.ports import Handler


class InProcessBus:
    """Delivers at once to the handler of the subject. Handlers never block: they queue, or raise when their queue is full."""

    def __init__(self) -> None:
        self._handlers: dict[str, Handler] = {}

    def attach(self, subject: str, handler: Handler) -> None:
        """From now on frames for the subject go to this handler, and no longer to any former one."""
        self._handlers[subject] = handler

    def detach(self, subject: str, handler: Handler) -> None:
        """Stops delivery to this handler, if it is still the subject's."""
        if self._handlers.get(subject) == handler:
            del self._handlers[subject]

    def send(self, subject: str, frame: bytes) -> bool:
        """Delivers a frame; False where nobody listens."""
        handler = self._handlers.get(subject)
        if handler is None:
            return False
        handler(frame)
        return True
