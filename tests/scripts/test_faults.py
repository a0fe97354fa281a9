"""Parts of `scripts/chaos`: schedules, the proxy that reads along, and what it takes for a phase of a job."""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Awaitable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from websockets.asyncio.client import connect
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed

from scripts.faults import launch
from scripts.faults.packet_loss import NoNamespace, enter_namespace
from scripts.faults.proxy import Hold, MessageSplitter, Proxy
from scripts.faults.schedule import CLOCK_SECONDS, FAULTS_A_SEED, KILLS_A_SEED, POSSIBLE, Fault, Phase, Process, schedule
from scripts.faults.supervisor import RESTART_SECONDS, Supervised
from scripts.faults.watching import Seen, Watch
from tallystick.cli.local.processes import free_port
from tallystick.protocol.job_link import pack_record, pack_submit
from tallystick.protocol.types import JobId
from tallystick.protocol.wire import Kind, pack_link

HEAD = b"GET /v1/node HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\n\r\n"
TIMEOUT_SECONDS = 60


@given(st.integers(0, 10_000))
def test_a_seed_has_one_schedule(seed: int) -> None:
    """The same seed gives the same faults, each of them possible, and the promised number of kills."""
    entries = schedule(seed, list(Process), list(Fault))
    assert entries == schedule(seed, list(Process), list(Fault))
    assert len(entries) == FAULTS_A_SEED
    assert sum(entry.fault is Fault.KILL for entry in entries) == KILLS_A_SEED
    assert all(entry.process in POSSIBLE[entry.fault] for entry in entries)
    assert all(abs(entry.shift) == (CLOCK_SECONDS if entry.fault is Fault.CLOCK else 0) for entry in entries)


@pytest.mark.parametrize("first", [0, 1, 7])
def test_consecutive_seeds_strike_everything(first: int) -> None:
    """Seeds in a row kill each process at each phase before any cell comes a third time."""
    cells = len(Phase) * len(Process)
    seeds = -(-2 * cells // KILLS_A_SEED)
    kills = Counter(
        (entry.phase, entry.process)
        for seed in range(first, first + seeds)
        for entry in schedule(seed, list(Process), list(Fault))
        if entry.fault is Fault.KILL
    )
    assert len(kills) == cells
    assert max(kills.values()) <= 3


def test_only_some_cells() -> None:
    """`only` limits the schedule to a process, a phase or both; one that names nothing is refused with what was expected."""
    for only, want in (("node", (Process.NODE, None)), ("before match", (None, Phase.BEFORE_MATCH))):
        entries = schedule(3, list(Process), list(Fault), only)
        assert all(want[0] in {None, entry.process} and want[1] in {None, entry.phase} for entry in entries)
    assert {entry.cell for entry in schedule(3, list(Process), [Fault.KILL], "rpc/batch sent")} == {"rpc/batch sent"}
    with pytest.raises(ValueError, match="expected PROCESS/PHASE"):
        schedule(3, [Process.NODE], list(Fault), "gateway")


def test_what_a_market_does_not_have_is_left_out() -> None:
    """No schedule strikes a process with a fault that this market does not have."""
    impossible = [(Process.COORDINATOR, Fault.FULL_DISK)]
    cells = {
        (entry.process, entry.fault) for seed in range(40) for entry in schedule(seed, list(Process), list(Fault), "", impossible)
    }
    assert (Process.GATEWAY, Fault.FULL_DISK) in cells
    assert not cells & set(impossible)


def _frame(payload: bytes, *, masked: bool, last: bool = True, opcode: int = 2) -> bytes:
    size = len(payload)
    length = (
        bytes((size,))
        if size < 126
        else b"\x7e" + size.to_bytes(2, "big")
        if size < 1 << 16
        else b"\x7f" + size.to_bytes(8, "big")
    )
    first = bytes((opcode | (0x80 if last else 0),))
    if not masked:
        return first + length + payload
    key = random.Random(size).randbytes(4)
    hidden = bytes(byte ^ key[i % 4] for i, byte in enumerate(payload))
    return first + bytes((length[0] | 0x80,)) + length[1:] + key + hidden


@given(st.lists(st.binary(max_size=300), max_size=6), st.booleans(), st.lists(st.integers(1, 50), max_size=40))
def test_messages_are_recognised_however_they_arrive(messages: list[bytes], masked: bool, sizes: list[int]) -> None:
    """Masked or not, whole or in fragments, with pings between them, and cut anywhere by TCP."""
    stream = HEAD
    for message in messages:
        half = len(message) // 2
        stream += _frame(message[:half], masked=masked, last=False) + _frame(b"ping", masked=masked, opcode=9)
        stream += _frame(message[half:], masked=masked, opcode=0)
    splitter, seen = MessageSplitter(), list[bytes]()
    for size in sizes:
        seen += splitter.feed(stream[:size])
        stream = stream[size:]
    seen += splitter.feed(stream)
    assert seen == messages


@pytest.mark.parametrize("size", [0, 125, 126, 65_535, 65_536, 200_000])
def test_messages_of_every_length(size: int) -> None:
    """Each of the three forms of a length is read."""
    message = random.Random(1).randbytes(size)
    assert list(MessageSplitter().feed(HEAD + _frame(message, masked=True))) == [message]


def test_plain_http_is_passed_as_it_comes() -> None:
    """A request that is no WebSocket is given to the reader piece by piece."""
    splitter = MessageSplitter()
    assert list(splitter.feed(b"POST / HTTP/1.1\r\ncontent-")) == []
    assert list(splitter.feed(b"length: 2\r\n\r\n{}")) == [b"POST / HTTP/1.1\r\ncontent-length: 2\r\n\r\n{}"]
    assert list(splitter.feed(b"more")) == [b"more"]


async def _echo(connection: ServerConnection) -> None:
    async for message in connection:
        await connection.send(message)


async def test_the_proxy_holds_loses_and_dies() -> None:
    """Messages pass; one is held until its hold lets it pass; lost packets arrive once the link heals; a close resets links."""
    order = list[str]()

    def read(to_server: bool, message: bytes) -> Hold | None:
        if message != b"hold me" or not to_server:
            return None

        async def hold(pass_on: Awaitable[None]) -> None:
            order.append("held")
            await pass_on

        return hold

    async with serve(_echo, "127.0.0.1", 0) as server:
        port, target = free_port(0), int(server.sockets[0].getsockname()[1])
        proxy = Proxy(port, target, lambda: read)
        await proxy.open()
        async with asyncio.timeout(TIMEOUT_SECONDS), connect(f"ws://127.0.0.1:{port}", proxy=None, compression=None) as client:
            for message in (b"first", b"hold me", b""):
                await client.send(message)
                order.append(str(await client.recv()))
            assert order == ["b'first'", "held", "b'hold me'", "b''"]
            proxy.lose()
            await client.send(b"late")
            answer = asyncio.create_task(client.recv())
            proxy.heal()
            assert await answer == b"late"
            await proxy.close()
            with pytest.raises(ConnectionClosed):
                await client.recv()
        with pytest.raises(OSError, match=r"refused|failed"):
            await asyncio.open_connection("127.0.0.1", port)
        await proxy.open()
        async with asyncio.timeout(TIMEOUT_SECONDS), connect(f"ws://127.0.0.1:{port}", proxy=None, compression=None) as client:
            await client.send(b"again")
            assert await client.recv() == b"again"
        await proxy.close()


async def test_a_reset_loses_the_message_that_is_held() -> None:
    """Both sides see their connection end, the other side never gets the message, and a new connection works."""
    arrived = list[bytes | str]()

    async def receive(connection: ServerConnection) -> None:
        async for message in connection:
            arrived.append(message)
            await connection.send(message)

    def read(_to_server: bool, message: bytes) -> Hold | None:
        async def hold(pass_on: Awaitable[None]) -> None:
            proxy.reset()
            await pass_on

        return hold if message == b"lose me" else None

    async with serve(receive, "127.0.0.1", 0) as server:
        port = free_port(0)
        proxy = Proxy(port, int(server.sockets[0].getsockname()[1]), lambda: read)
        await proxy.open()
        async with asyncio.timeout(TIMEOUT_SECONDS):
            async with connect(f"ws://127.0.0.1:{port}", proxy=None, compression=None) as client:
                await client.send(b"lose me")
                with pytest.raises(ConnectionClosed):
                    await client.recv()
            async with connect(f"ws://127.0.0.1:{port}", proxy=None, compression=None) as client:
                await client.send(b"again")
                assert await client.recv() == b"again"
        await proxy.close()
    assert arrived == [b"again"]


def test_dropped_packets_are_not_acknowledged() -> None:
    """A connection in a network namespace gets nothing while its packets are dropped, and everything afterwards."""
    done = subprocess.run([sys.executable, "-m", "scripts.faults.packet_loss"], capture_output=True, text=True, check=False)
    if done.returncode and "came that should have been dropped" not in done.stdout:
        pytest.skip(f"no network namespace here: {done.stdout.strip()}")
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_market_without_namespaces_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the right or the tools, nothing changes for this process, and the reason is the report's."""
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(NoNamespace, match=r"ip: No such file|unshare: |it needs Linux"):
        enter_namespace()


async def test_a_process_that_is_held_down_stays_down(tmp_path: Path) -> None:
    """It is started again only when it may."""
    process = Supervised("sleep", [sys.executable, "-c", "import time; time.sleep(600)"], tmp_path / "log")
    await process.start()
    first = process.process
    assert first is not None
    process.hold_down()
    await first.wait()
    await asyncio.sleep(2 * RESTART_SECONDS)
    assert process.starts == 1
    process.let_up()
    async with asyncio.timeout(TIMEOUT_SECONDS):
        while process.starts < 2:  # noqa: ASYNC110 - what is waited for is another process
            await asyncio.sleep(0.01)
    await process.stop()


async def test_the_last_chunk_is_a_phase() -> None:
    """Chunks before it do not mark it."""
    watch = Watch()

    async def strike(_seen: Seen, _pass_on: Awaitable[None] | None) -> None:
        pass

    read = watch.links("replica", {"0xCD": "node-b"})()
    assert read(True, pack_link(Kind.HELLO, payload=b'{"provider":"0xcd"}')) is None
    watch.arm(Phase.LAST_CHUNK, strike)
    assert read(True, pack_link(Kind.CHUNK, JOB, b"\0sealed")) is None
    assert read(True, pack_link(Kind.CHUNK, JOB, b"\1sealed")) is not None


JOB = JobId(b"j" * 16)
NODE_MESSAGES = [
    (Phase.AFTER_DISPATCH, False, Kind.DISPATCH),
    (Phase.FIRST_CHUNK, True, Kind.CHUNK),
    (Phase.RECEIPT_SENT, True, Kind.RECEIPT),
    (Phase.RECEIPT_STORED, False, Kind.RECEIPT_ACK),
    (Phase.CLAIM_HANDED_IN, True, Kind.CLAIM),
]


@pytest.mark.parametrize(("phase", "to_server", "kind"), NODE_MESSAGES)
async def test_phases_on_the_node_link(phase: Phase, to_server: bool, kind: Kind) -> None:
    """Each phase is marked by its frame, in its direction, once, and only while it is waited for."""
    watch, struck = Watch(), list[Seen]()

    async def strike(seen: Seen, pass_on: Awaitable[None] | None) -> None:
        struck.append(seen)
        if pass_on is not None:
            await pass_on

    read, frame = watch.links("replica", {"0xAB": "node-a", "0xCD": "node-b"})(), pack_link(kind, JOB, b"x")
    assert read(True, pack_link(Kind.HELLO, payload=b'{"provider":"0xcd"}')) is None
    assert read(to_server, frame) is None
    watch.arm(phase, strike)
    assert read(not to_server, frame) is None
    assert read(to_server, pack_link(Kind.BEAT)) is None
    hold = read(to_server, frame)
    assert hold is not None
    passed = asyncio.Event()

    async def pass_on() -> None:
        passed.set()

    await hold(pass_on())
    assert (struck, passed.is_set(), watch.struck.is_set(), watch.armed) == ([Seen("node-b", "replica")], True, True, None)
    assert read(to_server, frame) is None


async def test_phases_elsewhere() -> None:
    """A submission on the gateway's link, a batch that is sent to the chain, and the receipt of one that was mined."""
    watch = Watch()

    async def strike(_seen: Seen, _pass_on: Awaitable[None] | None) -> None:
        return

    submit = pack_record(1, Kind.SUBMIT, pack_submit(b"sealed", None))
    cases = (
        (Phase.BEFORE_MATCH, watch.links("replica", {})(), True, submit),
        (Phase.BATCH_SENT, watch.rpc(), True, b'POST / HTTP/1.1\r\n\r\n{"method":"eth_sendRawTransaction"}'),
        (Phase.BATCH_MINED, watch.rpc(), False, b'{"result":{"cumulativeGasUsed":"0x1"}}'),
    )
    for phase, read, to_server, message in cases:
        assert read(to_server, message) is None
        watch.arm(phase, strike)
        assert read(not to_server, message) is None
        assert read(to_server, b"GET /health HTTP/1.1\r\n\r\n") is None
        assert read(to_server, message) is not None
    assert pack_record(1, Kind.CANCEL) != submit
    watch.arm(Phase.BEFORE_MATCH, strike)
    assert watch.links("replica", {})()(True, pack_record(1, Kind.CANCEL)) is None


def test_a_shifted_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The wall clock of the launched process follows the file, also when that changes; its monotonic clock does not."""
    file = tmp_path / "clock"
    launch.write_offset(file, 0.0)
    for name in ("time", "time_ns"):
        monkeypatch.setattr(time, name, getattr(time, name))
    real = time.time
    launch.shift_clock(file)
    for shift in (0.0, 10_000.0, -10_000.0):
        launch.write_offset(file, shift)
        assert abs(time.time() - real() - shift) < 5_000
        assert abs(time.time_ns() / 1e9 - real() - shift) < 5_000
