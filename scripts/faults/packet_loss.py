"""Packets that the kernel drops, so that TCP gets no acknowledgement of them: in a network namespace of this process's own.

Routing rules of the namespace lead some ports and addresses of the loopback to a device that nobody receives from. It needs
Linux, `ip` (Debian's iproute2) and its rights, such as those of root. The kernel removes the namespace with the last process in
it, however that process ends.

`python -m scripts.faults.packet_loss` tries it out, and prints why it does not work here, if so.
"""

from __future__ import annotations

import ctypes
import os
import socket
import subprocess
import sys
from pathlib import Path

_NEW_NETWORK = 0x4000_0000
"""CLONE_NEWNET of unshare(2)."""
_DEVICE, _PEER = "lost0", "lost1"
_TABLE = "77"
_RULES_FIRST, _LOCAL_AFTER = "10", "100"
"""Priorities of the rules that drop, and of the rule that delivers to the loopback, which comes first elsewhere."""
_NOTHING_CAME_SECONDS = 0.3


class NoNamespace(Exception):
    """Packets cannot be dropped here. The text says why."""


def enter_namespace() -> None:
    """Moves this process and its later children into a network namespace with a loopback alone. Raises NoNamespace.

    It is tried out in another process first, so a failure changes nothing here.
    """
    done = subprocess.run([sys.executable, "-m", __name__], capture_output=True, text=True, check=False)
    if done.returncode:
        raise NoNamespace(done.stdout.strip() or done.stderr.strip()[-300:])
    _enter()


def drop(port: int, address: str) -> None:
    """Drops all packets to and from a TCP port, and to and from an address."""
    for selector in _selectors(port, address):
        _ip("rule", "add", "pref", _RULES_FIRST, *selector, "lookup", _TABLE)


def deliver(port: int, address: str) -> None:
    """Ends what `drop` began. What was sent meanwhile arrives once TCP sends it again."""
    for selector in _selectors(port, address):
        _ip("rule", "del", "pref", _RULES_FIRST, *selector, "lookup", _TABLE)


def _selectors(port: int, address: str) -> list[tuple[str, ...]]:
    ports = [("ipproto", "tcp", side, str(port)) for side in ("dport", "sport")]
    return [*ports, *((side, address) for side in ("from", "to"))]


def _enter() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "unshare"):
        raise NoNamespace("it needs Linux")
    if libc.unshare(_NEW_NETWORK):
        raise NoNamespace(f"unshare: {os.strerror(ctypes.get_errno())}")
    _ip("link", "set", "lo", "up")
    _ip("link", "add", _DEVICE, "type", "veth", "peer", "name", _PEER)
    Path(f"/proc/sys/net/ipv4/conf/{_DEVICE}/route_localnet").write_text("1")
    for device in (_DEVICE, _PEER):
        _ip("link", "set", device, "arp", "off", "up")
    _ip("route", "add", "default", "dev", _DEVICE, "src", "127.0.0.1", "table", _TABLE)
    _ip("rule", "add", "pref", _LOCAL_AFTER, "lookup", "local")
    _ip("rule", "del", "pref", "0")


def _ip(*arguments: str) -> None:
    try:
        done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    except OSError as error:
        raise NoNamespace(f"ip: {error.strerror}") from None
    if done.returncode:
        raise NoNamespace(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


def _try_out() -> None:
    """Drops packets of a connection, and delivers again. Raises NoNamespace or OSError."""
    _enter()
    source = "127.0.1.1"
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port), source_address=(source, 0)) as client, server.accept()[0] as accepted:
            for selected in ((port, "127.0.1.2"), (1, source)):
                drop(*selected)
                client.sendall(b"x")
                accepted.settimeout(_NOTHING_CAME_SECONDS)
                try:
                    accepted.recv(1)
                except TimeoutError:
                    pass
                else:
                    raise NoNamespace("a packet came that should have been dropped")
                deliver(*selected)
                accepted.settimeout(None)
                accepted.recv(1)


def main() -> int:
    """Tries it out."""
    try:
        _try_out()
    except (NoNamespace, OSError) as error:
        print(error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
