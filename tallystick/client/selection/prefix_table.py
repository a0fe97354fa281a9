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
        if tag not in data:
            return []
        entries = [self._parse(data, begin) for begin in _BEGINNINGS if data.startswith(tag, begin)]
        holders = [Holder(Address(f"0x{entry[1].hex()}"), entry[2], entry[3]) for entry in entries if entry is not None]
        return sorted(holders, key=lambda holder: holder.used_at, reverse=True)

    def record(self, tag: bytes, provider: Address, cached_percent: int | None = None) -> bool:
        """Records that a provider holds a prefix, and returns whether it did before.

        `cached_percent`: None leaves it as it is, at first 0.
        """
        data, raw, now = self._read(tag), bytes.fromhex(provider[2:]), self._now()
        for begin in _BEGINNINGS:
            if data.startswith(tag, begin) and (entry := self._parse(data, begin)) is not None and entry[1] == raw:
                used_at, known = entry[2:]
                percent = known if cached_percent is None else cached_percent
                if (percent, now) != (known, used_at):
                    self._write(tag, begin, _pack(tag, raw, now, percent))
                return True
        self._write(tag, self._oldest(data), _pack(tag, raw, now, cached_percent or 0))
        return False

    def forget(self, tag: bytes, provider: Address) -> None:
        """Records that a provider does not hold a prefix."""
        data, raw = self._read(tag), bytes.fromhex(provider[2:])
        for begin in _BEGINNINGS:
            if data.startswith(tag, begin) and (entry := self._parse(data, begin)) is not None and entry[1] == raw:
                self._write(tag, begin, bytes(_ENTRY_BYTES))

    def _oldest(self, data: bytes) -> int:
        """Where the entry of a set begins that is empty, or was used longest ago."""
        oldest, since = 0, None
        for begin in _BEGINNINGS:
            entry = self._parse(data, begin)
            if entry is None:
                return begin
            if since is None or entry[2] < since:
                oldest, since = begin, entry[2]
        return oldest

    def _parse(self, data: bytes, begin: int) -> tuple[bytes, bytes, int, int] | None:
        """The tag, provider, last use and percent of the entry that begins at this byte of a set; None if it is empty."""
        end, now = begin + _ENTRY.size, self._now()
        body = data[begin:end]
        if len(data) < end + _CHECKSUM.size or _CHECKSUM.unpack_from(data, end)[0] != zlib.crc32(body):
            return None
        entry: tuple[bytes, bytes, int, int] = _ENTRY.unpack(body)
        if entry[3] > 100 or not now - MAX_AGE_SECONDS < entry[2] <= now + MAX_AGE_SECONDS:
            return None
        return entry

    def _read(self, tag: bytes) -> bytes:
        try:
            self._file.seek(_offset(tag))
            return self._file.read(_SET_BYTES) or b""
        except (OSError, ValueError) as error:
            self._give_up(error)
            return b""

    def _write(self, tag: bytes, begin: int, entry: bytes) -> None:
        try:
            self._file.seek(_offset(tag) + begin)
            self._file.write(entry)
        except (OSError, ValueError) as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        if not self._file.closed:
            log.warning("which provider holds which conversation is no longer kept", error=str(error))
            self._file.close()


def _pack(tag: bytes, provider: bytes, used_at: int, percent: int) -> bytes:
    body = _ENTRY.pack(tag, provider, used_at, percent)
    return body + _CHECKSUM.pack(zlib.crc32(body))


def _offset(tag: bytes) -> int:
    return len(_MAGIC) + int.from_bytes(tag[:4], "little") % SETS * _SET_BYTES
