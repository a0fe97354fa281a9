"""The version of the wire protocol, which client, coordinator and node must share. Each tells another version what to upgrade."""

from __future__ import annotations

from tallystick.protocol.errors import BadMessage
from tallystick.protocol.json_members import read_count

PROTOCOL = 2
"""1: submissions, dispatches and receipts as JSON (0.1). 2: in binary form; capacity per slot group."""
SINCE = "0.2.0"
"""The first release that speaks PROTOCOL."""


def check_protocol(spoken: object, where: str, peer: str) -> None:
    """Checks the member `protocol` of a peer's first message, which protocol 1 did not have. `peer`: such as "the node".

    Raises BadMessage that says which side to upgrade.
    """
    number = 1 if spoken is None else read_count(spoken, f"{where}.protocol")
    if number != PROTOCOL:
        raise BadMessage(f"{where}.protocol: expected {PROTOCOL}, got {number}; {_advice(number, peer)}")


def check_first_byte(data: bytes, where: str, peer: str) -> None:
    """Checks the first byte of a binary message, which is PROTOCOL. `peer`: its sender, such as "the client". Raises BadMessage.

    A message of protocol 1 begins with the length of its JSON header, and so with 0.
    """
    number = data[0] if data else None
    if number is None:
        raise BadMessage(f"{where}: cut off: it is empty")
    if number != PROTOCOL:
        spoken = number or 1
        raise BadMessage(f"{where}: expected protocol {PROTOCOL}, got protocol {spoken}; {_advice(spoken, peer)}")


def _advice(number: int, peer: str) -> str:
    if number < PROTOCOL:
        return f"{peer} is too old: upgrade it to Tallystick {SINCE} or later"
    return f"{peer} is newer: upgrade this side to a release of Tallystick that speaks protocol {number}"
