"""SIGKILL of a process that signs ahead of its disk: what left is stored, and no number left twice."""

from __future__ import annotations

import asyncio
import random
import sys
from pathlib import Path

from tallystick.protocol.eip712 import read_signed_bytes
from tallystick.protocol.messages import Receipt
from tallystick.protocol.types import Address
from tests.node.harness import COORDINATOR, DOMAIN, NOW, PROVIDER
from tests.node.storage.test_store import open_store

RUNS = 4
SECONDS = 180


async def _run_and_kill(folder: Path, run: int, receipts: int) -> list[Receipt]:
    """Runs the process until it has let some receipts leave, kills it, and returns all that left."""
    command = [sys.executable, "-m", "tests.node.storage.run_signer", str(folder), str(run)]
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    if process.stdout is None:
        raise RuntimeError("expected a pipe")
    lines = list[bytes]()
    async with asyncio.timeout(SECONDS):
        while len(lines) < receipts:
            lines.append(await process.stdout.readline())
            assert lines[-1], "the process ended by itself"
        process.kill()
        lines += (await process.stdout.read()).split(b"\n")
        await process.wait()
    whole = [line for line in lines if len(line.strip()) == 2 * len(bytes.fromhex(lines[0].decode()))]
    return [read_signed_bytes(Receipt, bytes.fromhex(line.decode())).verify(DOMAIN).message for line in whole]


async def test_what_left_is_stored_and_numbered_once(tmp_path: Path) -> None:
    """After each kill the next process continues every tab after the last stored receipt."""
    chance, left = random.Random(7), dict[tuple[Address, int], Receipt]()
    for run in range(1, RUNS + 1):
        for receipt in await _run_and_kill(tmp_path, run, chance.randint(20, 60)):
            number = receipt.payer, receipt.seq
            assert number not in left, "two receipts with one number left"
            left[number] = receipt
    store = open_store(tmp_path)
    await store.start()
    ends = {row.payer: row.seq for row in await store.tabs(NOW)}
    late = await store.unacknowledged(COORDINATOR.address, NOW + 1, 0, 100_000)
    stored = {
        (message.payer, message.seq): message for entry in late for message in [entry.late_receipt.receipt.verify(DOMAIN).message]
    }
    await store.close()
    assert left.items() <= stored.items()
    assert all(message.provider == PROVIDER.address for message in stored.values())
    for payer, end in ends.items():
        total = 0
        for seq in range(1, end + 1):
            receipt = stored[payer, seq]
            total += receipt.cost
            assert receipt.cumulative_cost == total
