"""The link between a parent process and a child that it starts: a socket pair, of which the child inherits one end.

Over it the child reports the port on which it listens. No other process has that socket, so the report proves that the child
itself serves the port, where an answer on the port proves nothing. The child ends when its parent does, however that ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
from threading import Thread

PARENT_SOCKET_ENV = "TALLYSTICK_PARENT_SOCKET"
"""Environment variable with the descriptor of the child's end. node/engines/embedded_server.py reads it too."""
MAX_REPORT_BYTES = 200


class _Link:
    """The end of this process, if a parent gave it one."""

    parent: socket.socket | None = None


def take_parent() -> socket.socket | None:
    """Takes the inherited socket over, and returns it if there is one. It ends when the parent does."""
    descriptor = os.environ.pop(PARENT_SOCKET_ENV, "")
    if descriptor.isdecimal():
        _Link.parent = socket.socket(fileno=int(descriptor))
        _Link.parent.set_inheritable(False)
        return _Link.parent
    return None


def attach_to_parent() -> None:
    """Takes the inherited socket over, if there is one. From then on, the end of the parent sends SIGTERM to this process."""
    link = take_parent()
    if link is not None:
        attach_to(link)


def attach_to(link: socket.socket) -> None:
    """Makes the process at the other end of `link` the parent, to which this one reports and with which it ends."""
    _Link.parent = link
    Thread(target=_end_with_parent, args=(link,), name="parent", daemon=True).start()


def report_port(port: int) -> None:
    """Tells the parent, if there is one, that this process listens on `port`. Only the first report counts."""
    if _Link.parent is not None:
        report = json.dumps({"pid": os.getpid(), "port": port}).encode() + b"\n"
        with contextlib.suppress(OSError):  # the parent has ended, and so will this process
            _Link.parent.sendall(report)


def parse_report(report: bytes) -> tuple[int, int] | None:
    """The process id and the port of a report; None if it is malformed."""
    try:
        fields = json.loads(report)
        return int(fields["pid"]), int(fields["port"])
    except (ValueError, TypeError, KeyError):
        return None


def _end_with_parent(link: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while link.recv(MAX_REPORT_BYTES):
            pass
    os.kill(os.getpid(), signal.SIGTERM)
