"""The table of prefixes: shared by processes, bounded, and harmless if it is damaged."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tallystick.client.selection.prefix_table import MAX_AGE_SECONDS, SETS, WAYS, PrefixTable
from tallystick.protocol.types import Address

TAG = bytes(range(16))
ALICE, BOB = Address("0x" + "a1" * 20), Address("0x" + "b2" * 20)


class Clock:
    """Unix time that a test sets."""

    def __init__(self) -> None:
        self.now = 1_700_000_000

    def __call__(self) -> int:
        self.now += 1
        return self.now


@pytest.fixture
def clock() -> Clock:
    """A clock that advances by a second whenever it is read."""
    return Clock()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """The file of a table."""
    return tmp_path / "folder" / "payer.affinity"


@pytest.fixture
def table(path: Path, clock: Clock) -> Iterator[PrefixTable]:
    """An open table."""
    table = PrefixTable.open(path, clock)
    yield table
    table.close()


def _tag(number: int, in_set: int = 7) -> bytes:
    return in_set.to_bytes(4, "little") + number.to_bytes(12, "big")


def _providers(table: PrefixTable, tag: bytes) -> list[Address]:
    return [holder.provider for holder in table.holders(tag)]


def test_the_holder_that_was_used_last_comes_first(table: PrefixTable) -> None:
    """A prefix may have several holders; the share that one billed as cached stays until it bills again."""
    assert not table.record(TAG, ALICE)
    assert not table.record(TAG, BOB, 70)
    assert _providers(table, TAG) == [BOB, ALICE]
    assert table.record(TAG, ALICE)
    assert _providers(table, TAG) == [ALICE, BOB]
    assert table.record(TAG, BOB)
    assert [holder.cached_percent for holder in table.holders(TAG)] == [70, 0]
    table.record(TAG, BOB, 5)
    assert table.holders(TAG)[0].cached_percent == 5
    table.forget(TAG, ALICE)
    assert _providers(table, TAG) == [BOB]
    assert _providers(table, _tag(1)) == []


def test_two_processes_share_a_file(table: PrefixTable, path: Path, clock: Clock) -> None:
    """What one records the other finds at once, and a file that exists is not emptied."""
    other = PrefixTable.open(path, clock)
    table.record(TAG, ALICE)
    assert _providers(other, TAG) == [ALICE]
    other.record(TAG, BOB)
    assert _providers(table, TAG) == [BOB, ALICE]
    other.close()


def test_what_a_killed_process_recorded_is_kept(path: Path, clock: Clock) -> None:
    """The system has it as soon as it is recorded."""
    code = (
        "import sys, signal, os, pathlib\n"
        "from tallystick.client.selection.prefix_table import PrefixTable\n"
        f"PrefixTable.open(pathlib.Path(sys.argv[1]), lambda: {clock.now}).record(bytes(range(16)), '{ALICE}', 40)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], check=False, timeout=120)
    assert done.returncode == -signal.SIGKILL
    table = PrefixTable.open(path, clock)
    assert [(holder.provider, holder.cached_percent) for holder in table.holders(TAG)] == [(ALICE, 40)]
    table.close()


def test_the_oldest_entry_of_a_set_is_displaced(table: PrefixTable, path: Path) -> None:
    """A set is full with WAYS entries; the file never exceeds its size."""
    for number in range(WAYS):
        table.record(_tag(number), ALICE)
    table.record(_tag(0), ALICE)
    table.record(_tag(WAYS), ALICE)
    assert [bool(_providers(table, _tag(number))) for number in range(WAYS + 1)] == [True, False] + [True] * (WAYS - 1)
    table.record(_tag(1, SETS - 1), BOB)
    table.record(_tag(1, 2 * SETS - 1), ALICE)
    assert path.stat().st_size <= 32 + SETS * WAYS * 48 <= 4 * 2**20
    assert _providers(table, _tag(1, SETS - 1)) == [BOB]


def test_old_entries_count_as_empty(table: PrefixTable, clock: Clock) -> None:
    """Also one that a clock set forward has dated far ahead."""
    table.record(TAG, ALICE)
    clock.now += MAX_AGE_SECONDS - 10
    assert _providers(table, TAG) == [ALICE]
    clock.now += 20
    assert _providers(table, TAG) == []
    clock.now -= 3 * MAX_AGE_SECONDS
    assert _providers(table, TAG) == []
    table.record(TAG, BOB)
    assert _providers(table, TAG) == [BOB]


def test_a_damaged_entry_counts_as_empty(table: PrefixTable, path: Path, clock: Clock) -> None:
    """Whichever bit was lost: entries are written without locks, and a disk may lose them."""
    table.record(TAG, ALICE)
    whole = path.read_bytes()
    begin = whole.index(TAG)
    for place in range(begin, begin + 48):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x20]) + whole[place + 1 :])
        assert _providers(table, TAG) == []
    path.write_bytes(whole[: begin + 20])
    assert _providers(table, TAG) == []
    table.record(TAG, BOB)
    assert _providers(table, TAG) == [BOB]


@pytest.mark.parametrize("content", [b"", b"tallystick prefixes 9\n", os.urandom(5_000), b"\0" * 500])
def test_a_file_of_another_format_begins_anew(content: bytes, path: Path, clock: Clock) -> None:
    """It is a cache: nothing in it is worth a refusal."""
    path.parent.mkdir()
    path.write_bytes(content)
    table = PrefixTable.open(path, clock)
    assert _providers(table, TAG) == []
    table.record(TAG, ALICE)
    table.close()
    table = PrefixTable.open(path, clock)
    assert _providers(table, TAG) == [ALICE]
    table.close()


def test_only_the_owner_can_read_the_file(table: PrefixTable, path: Path) -> None:
    """It tells which providers were used when."""
    table.record(TAG, ALICE)
    assert path.stat().st_mode & 0o077 == 0


def test_without_a_file_it_is_kept_in_memory(tmp_path: Path, clock: Clock) -> None:
    """A folder that cannot be written, or no folder at all, refuses no request."""
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "payer.affinity", tmp_path):
        table = PrefixTable.open(path, clock)
        table.record(TAG, ALICE)
        assert _providers(table, TAG) == [ALICE]
        table.close()


def test_a_disk_error_ends_the_memory_and_nothing_else(clock: Clock) -> None:
    """A full disk, for one: the same request would be refused again and again."""
    with Path("/dev/full").open("r+b", buffering=0) as full:
        table = PrefixTable(full, clock)
        table.record(TAG, ALICE)
        table.record(TAG, ALICE)
        table.forget(TAG, ALICE)
        assert _providers(table, TAG) == []
        table.close()
