"""The coordinator cannot read requests or answers: they are not in its files, logs, traffic or memory."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import re
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp

from scripts.relay import processes
from scripts.relay.load import CHAT
from scripts.relay.mock import MODEL
from tallystick.cli.local.processes import free_port

SECRET = "the heron's nest lies north of Žižkov, 4711"
ANSWERED = ("chat.completion.chunk", '"delta":{"content":"word ')


def _forms(text: str) -> list[bytes]:
    """Encodings in which a text might appear: plain, JSON, other encodings, hex, base64 at any offset."""
    plain = text.encode()
    based = [base64.b64encode(b"x" * shift + plain)[4 if shift else 0 : -4] for shift in range(3)]
    safe = [part.replace(b"+", b"-").replace(b"/", b"_") for part in based]
    other = [text.encode("utf-16-le"), text.encode("utf-16-be"), json.dumps(text)[1:-1].encode(), plain.hex().encode()]
    return [plain, plain[:20], plain[-20:], *other, *based, *safe]


def _leaked_forms(data: bytes) -> list[str]:
    """Returns the secrets that the data contains in any form."""
    return [text for text in (SECRET, *ANSWERED) if any(form in data for form in _forms(text))]


class RecordingProxy:
    """Stands before a server and keeps all bytes that pass."""

    def __init__(self, target: int) -> None:
        self.target, self.heard = target, bytearray()
        self._tasks: set[asyncio.Task[None]] = set()

    @contextlib.asynccontextmanager
    async def open(self, port: int) -> AsyncIterator[None]:
        """Starts listening."""
        async with await asyncio.start_server(self._join, "127.0.0.1", port):
            yield
            for task in self._tasks:
                task.cancel()

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            writer.close()
            return
        for source, drain in ((reader, far_writer), (far_reader, writer)):
            task = asyncio.create_task(self._pass(source, drain))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _pass(self, source: asyncio.StreamReader, drain: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(1 << 16):
                self.heard += data
                drain.write(data)
                await drain.drain()
        drain.close()


def _memory(pid: int) -> bytes:
    """The memory of a process; empty if the system does not allow reading it."""
    parts: list[bytes] = []
    with contextlib.suppress(PermissionError), Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            span = re.match(r"([0-9a-f]+)-([0-9a-f]+) rw", line)
            if span:
                start, end = (int(edge, 16) for edge in span.groups())
                with contextlib.suppress(OSError, OverflowError, ValueError):
                    memory.seek(start)
                    parts.append(memory.read(end - start))
    return b"".join(parts)


async def _chat(url: str, *, stream: bool) -> bytes:
    request = {"model": MODEL, "messages": [{"role": "user", "content": SECRET}], "max_tokens": 64, "stream": stream}
    async with aiohttp.ClientSession() as session, session.post(url + CHAT, json=request | {"user": "20 0"}) as response:
        assert response.status == 200
        return await response.read()


def test_search_finds_every_form() -> None:
    """Each form is found where it is present."""
    text = f"before {SECRET} after"
    for data in (
        text.encode(),
        json.dumps(text).encode(),
        text.encode("utf-16-le"),
        text.encode().hex().encode(),
        *(base64.b64encode(b"y" * shift + text.encode()) for shift in range(3)),
        SECRET[:25].encode(),
    ):
        assert _leaked_forms(data) == [SECRET]
    assert _leaked_forms(b"nothing") == []


async def test_coordinator_never_has_the_plaintext(tmp_path: Path) -> None:
    """After streamed and whole answers, the coordinator's files, debug log, both connections and memory have no plaintext."""
    listen, proxy_port = free_port(0), free_port(0)
    recorder = RecordingProxy(listen)
    async with processes.upstream() as mock, recorder.open(proxy_port):
        folder = tmp_path / "market"
        async with processes.market(folder, mock, coordinator_port=listen, proxy_port=proxy_port, log_level="debug") as site:
            answers = [await _chat(site.gateway, stream=stream) for stream in (True, False, True)]
            memory = _memory(site.pids["coordinator"])
            stored = {path.name: path.read_bytes() for path in folder.glob("coordinator*") if path.is_file()}
            plain = _memory(site.pids["gateway"])
    assert _leaked_forms(answers[0]) == list(ANSWERED)
    assert {"coordinator.db", "coordinator.db-wal", "coordinator.log"} <= stored.keys()
    for name, data in stored.items():
        assert (name, _leaked_forms(data)) == (name, [])
    assert len(recorder.heard) > 10_000
    assert _leaked_forms(bytes(recorder.heard)) == []
    assert _leaked_forms(memory) == []
    assert not plain or SECRET in _leaked_forms(plain), "the same search finds it where it is: in the gateway"
