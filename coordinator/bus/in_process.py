"""The bus: delivers frames between jobs and nodes, addressed by subject. Within one process it is a table of handlers."""

from __future__ import annotations

from coordinator.ports import Handler


class InProcessBus:
    """Delivers synchronously to the handler of the subject. Handlers do not block: they queue, or raise if full."""

    def __init__(self) -> None:
        self._handlers: dict[str, Handler] = {}

    def attach(self, subject: str, handler: Handler) -> None:
        """Registers the handler of a subject and replaces a former one."""
        self._handlers[subject] = handler

    def detach(self, subject: str, handler: Handler) -> None:
        """Unregisters this handler, if it is still the subject's."""
        if self._handlers.get(subject) == handler:
            del self._handlers[subject]

    def send(self, subject: str, frame: bytes) -> bool:
        """Delivers a frame. Returns False if the subject has no handler."""
        handler = self._handlers.get(subject)
        if handler is None:
            return False
        handler(frame)
        return True
