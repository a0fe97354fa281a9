"""A table of tags and of the providers that hold them, in one file that the processes of a wallet share.

The table is a hint: an entry that is lost or stale costs a cache hit and nothing else. So it needs neither locks nor syncs, and
reading or writing it takes microseconds. The file is a set-associative cache: a tag has its place in one set of WAYS entries, and
a new entry displaces the one of the set that was used longest ago. Each entry has a checksum, by which one that two processes
wrote at the same time, or a crash cut off, counts as empty. What a process wrote outlives kill -9 of it, because the system
holds it.
"""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

import structlog

from tallystick.protocol.types import Address

log = structlog.get_logger()
SETS: Final = 8_192
WAYS: Final = 8
"""SETS x WAYS entries: 65,536, in a file of at most 3 MiB."""
MAX_AGE_SECONDS: Final = 86_400
"""Seconds after which an entry that was not used counts as empty: no engine keeps a cache for so long."""
_MAGIC: Final = b"tallystick prefixes 1\n".ljust(32, b"\0")
_ENTRY: Final = struct.Struct("<16s20sIB3x")
_CHECKSUM: Final = struct.Struct("<I")
_ENTRY_BYTES: Final = _ENTRY.size + _CHECKSUM.size
_SET_BYTES: Final = WAYS * _ENTRY_BYTES
_BEGINNINGS: Final = range(0, _SET_BYTES, _ENTRY_BYTES)


@dataclass(frozen=True, slots=True)
class Holder:
    """A provider that answered a request with a prefix. `used_at`: Unix time in seconds, of the last one.

    `cached_percent`: the share of that request's input tokens that it billed as cached.
    """

    provider: Address
    used_at: int
    cached_percent: int


class PrefixTable:
    """The table in an open file. `now`: Unix time in seconds. Disk errors are logged once, and then the table forgets."""

    def __init__(self, file: io.FileIO | io.BytesIO, now: Callable[[], int]) -> None:
        self._file, self._now = file, now

    @classmethod
    def open(cls, path: Path, now: Callable[[], int]) -> Self:
        """Opens or creates the file, with mode 0600. A table in memory takes its place if that fails."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            file = io.FileIO(os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o600), "r+")
        except OSError as error:
            return cls._in_memory(path, error, now)
        try:
            if file.read(len(_MAGIC)) != _MAGIC:
                file.truncate(0)
                file.seek(0)
                file.write(_MAGIC)
        except OSError as error:
            file.close()
            return cls._in_memory(path, error, now)
        return cls(file, now)

    @classmethod
    def _in_memory(cls, path: Path, error: OSError, now: Callable[[], int]) -> Self:
        log.warning("which provider holds which conversation is kept in memory alone", path=str(path), error=str(error))
        return cls(io.BytesIO(), now)

    def close(self) -> None:
        """Closes the file. Later calls find and change nothing."""
        self._file.close()

    def holders(self, tag: bytes) -> list[Holder]:
        """The providers that hold a prefix, the one that was used last first."""
        data = self._read(tag)
        holders = [self._parse(data, begin)[1] for begin in _BEGINNINGS if data.startswith(tag, begin)]
        holders = [holder for holder in holders if holder is not _EMPTY]
        return sorted(holders, key=lambda holder: holder.used_at, reverse=True)

    def record(self, tag: bytes, provider: Address, cached_percent: int | None = None) -> bool:
        """Records that a provider holds a prefix, and returns whether it did before.

        `cached_percent`: None leaves it as it is, at first 0.
        """
        entries = self._entries(self._read(tag))
        place = _place_for(entries, tag, provider)
        stored, holder = entries[place]
        is_known = stored == tag and holder.provider == provider
        percent = (holder.cached_percent if is_known else 0) if cached_percent is None else cached_percent
        body = _ENTRY.pack(tag, bytes.fromhex(provider[2:]), self._now(), percent)
        self._write(tag, place, body + _CHECKSUM.pack(zlib.crc32(body)))
        return is_known

    def forget(self, tag: bytes, provider: Address) -> None:
        """Records that a provider does not hold a prefix."""
        for place, (stored, holder) in enumerate(self._entries(self._read(tag))):
            if stored == tag and holder.provider == provider:
                self._write(tag, place, bytes(_ENTRY_BYTES))

    def _entries(self, data: bytes) -> list[tuple[bytes, Holder]]:
        return [self._parse(data, begin) for begin in _BEGINNINGS]

    def _parse(self, data: bytes, begin: int) -> tuple[bytes, Holder]:
        """The entry of a set that begins at this byte. An empty one has an empty tag and was never used."""
        end, now = begin + _ENTRY.size, self._now()
        body = data[begin:end]
        if len(data) < end + _CHECKSUM.size or _CHECKSUM.unpack_from(data, end)[0] != zlib.crc32(body):
            return b"", _EMPTY
        tag, provider, used_at, percent = _ENTRY.unpack(body)
        if percent > 100 or not now - MAX_AGE_SECONDS < used_at <= now + MAX_AGE_SECONDS:
            return b"", _EMPTY
        return tag, Holder(Address(f"0x{provider.hex()}"), used_at, percent)

    def _read(self, tag: bytes) -> bytes:
        try:
            self._file.seek(_offset(tag))
            return self._file.read(_SET_BYTES) or b""
        except (OSError, ValueError) as error:
            self._give_up(error)
            return b""

    def _write(self, tag: bytes, place: int, entry: bytes) -> None:
        try:
            self._file.seek(_offset(tag) + place * _ENTRY_BYTES)
            self._file.write(entry)
        except (OSError, ValueError) as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        if not self._file.closed:
            log.warning("which provider holds which conversation is no longer kept", error=str(error))
            self._file.close()


_EMPTY = Holder(Address("0x" + "00" * 20), 0, 0)


def _offset(tag: bytes) -> int:
    return len(_MAGIC) + int.from_bytes(tag[:4], "little") % SETS * _SET_BYTES


def _place_for(entries: list[tuple[bytes, Holder]], tag: bytes, provider: Address) -> int:
    """Where a set has, or gets, the entry of a tag and a provider."""
    for place, (stored, holder) in enumerate(entries):
        if stored == tag and holder.provider == provider:
            return place
    return min(range(WAYS), key=lambda place: entries[place][1].used_at)
