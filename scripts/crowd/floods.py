"""Floods from one address, each at a stated rate and for a stated time, only against this machine.

Run as a process of its own: python -m scripts.crowd.floods FLOOD PORT SECONDS FILE. FILE has the submissions that it posts, each
after 4 bytes of length, or the purse of slow readers. The process prints a line when it has its first connection, and at its end
what became of all, as JSON.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import sys
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from scripts.relay.load import EnginelessNode, sign_jobs
from tallystick.chain.deployment import Deployment
from tallystick.protocol.eip712 import Signer
from tallystick.protocol.types import Address

SOURCE = "127.0.0.66"
"""The address of the strangers: the limits per address are theirs, not those of the honest."""
CONNECTIONS_PER_SECOND, HELD_CONNECTIONS = 200, 500
POSTS_PER_SECOND = 100
SLOW_READERS, SLOW_SENDERS, SLOW_PER_SECOND = 150, 200, 20
"""At most so many, and so many new ones a second. A slow reader gets a megabyte before its job waits for it."""
SLOW_CHUNKS, SLOW_CHUNK_BYTES = 200, 16_384
SLOW_BYTES, SLOW_BODY = 64, 1 << 20
"""What a slow sender sends each second, of a body of this length."""
MAX_SECONDS = 120.0
_STATUS = 12
Seen = Counter[str]


def read_submissions(file: Path) -> Iterator[bytes]:
    """The submissions of a file."""
    data, at = file.read_bytes(), 0
    while at < len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        yield data[at + 4 : at + 4 + size]
        at += 4 + size


@dataclass(frozen=True, slots=True)
class Purse:
    """What slow readers need to buy answers: the coordinator's URL and account, the deployment's file, and a key with money."""

    url: str
    coordinator: str
    deployment: str
    secret: str

    def save(self, file: Path) -> None:
        """Writes it to a file that only its owner can read."""
        file.touch(0o600)
        file.write_text(json.dumps(asdict(self)))


def write_submissions(file: Path, submissions: list[bytes]) -> None:
    """Writes the file of a flood."""
    file.write_bytes(b"".join(len(submission).to_bytes(4, "big") + submission for submission in submissions))


class Flood:
    """One flood of a coordinator at a port of this machine."""

    def __init__(self, port: int, file: Path) -> None:
        self._port, self._file = port, file
        self.seen: Seen = Counter()
        self._open: list[asyncio.StreamWriter] = []

    async def run(self, name: str, seconds: float) -> None:
        """Floods for some seconds. Raises ValueError for an unknown flood."""
        floods: dict[str, Callable[[], Awaitable[None]]] = {
            "connections": self._connections,
            "bad_signatures": self._posts,
            "unfunded_orders": self._posts,
            "slow_readers": self._slow_readers,
            "slow_senders": self._slow_senders,
        }
        if name not in floods:
            raise ValueError(f"flood: expected one of {', '.join(floods)}, got {name}")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(min(seconds, MAX_SECONDS)):
                await floods[name]()
                await asyncio.Event().wait()  # what is open stays open for the rest of the time
        for writer in self._open:
            writer.transport.abort()

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter] | None:
        try:
            streams = await asyncio.open_connection("127.0.0.1", self._port, local_addr=(SOURCE, 0))
        except OSError:
            self.seen["not connected"] += 1
            return None
        if not self.seen["connected"]:
            print(flush=True)
        self.seen["connected"] += 1
        self._open.append(streams[1])
        return streams

    async def _connections(self) -> None:
        while True:
            await self._connect()
            if len(self._open) > HELD_CONNECTIONS:
                self._open.pop(0).transport.abort()
            await asyncio.sleep(1 / CONNECTIONS_PER_SECOND)

    async def _posts(self) -> None:
        posts = set[asyncio.Task[None]]()
        for body in list(read_submissions(self._file)):
            post = asyncio.create_task(self._post(body))
            posts.add(post)
            post.add_done_callback(posts.discard)
            await asyncio.sleep(1 / POSTS_PER_SECOND)

    async def _post(self, body: bytes) -> None:
        """Posts a job and counts the status of the response."""
        if (streams := await self._connect()) is None:
            return
        reader, writer = streams
        try:
            writer.write(_head(len(body)) + body)
            status = (await reader.read(64))[:_STATUS].decode("latin-1")
            self.seen[status or "closed"] += 1
        except OSError:
            self.seen["closed"] += 1
        finally:
            self._open.remove(writer)
            writer.transport.abort()

    async def _slow_readers(self) -> None:
        """Buys long answers of a node of its own, and reads none of them."""
        purse = Purse(**json.loads(self._file.read_text()))
        domain = Deployment.load(Path(purse.deployment)).domain
        node = await EnginelessNode.join(purse.url, Signer(secrets.token_bytes(32)), domain, models=("flood",), source=SOURCE)
        node.chunks, node.piece = SLOW_CHUNKS, bytes(SLOW_CHUNK_BYTES)
        self._serving = asyncio.create_task(node.run())
        payer, coordinator = Signer(bytes.fromhex(purse.secret)), Address(purse.coordinator)
        for body in sign_jobs(SLOW_READERS, payer=payer, coordinator=coordinator, domain=domain, ask=node.ask):
            if (streams := await self._connect()) is not None:
                streams[0]._transport.pause_reading()  # type: ignore[attr-defined]  # noqa: SLF001 - nothing is ever read
                streams[1].write(_head(len(body)) + body)
            await asyncio.sleep(1 / SLOW_PER_SECOND)

    async def _slow_senders(self) -> None:
        begun = 0
        while True:
            for writer in self._open:
                writer.write(bytes(SLOW_BYTES))
            for _ in range(min(SLOW_PER_SECOND, SLOW_SENDERS - begun)):
                begun += 1
                if (streams := await self._connect()) is not None:
                    streams[1].write(_head(SLOW_BODY))
            await asyncio.sleep(1)


def _head(size: int) -> bytes:
    head = "POST /v1/jobs HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/vnd.tallystick.job\r\n"
    return f"{head}content-length: {size}\r\n\r\n".encode()


def main() -> None:
    """Runs the command line."""
    name, port, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
    os.nice(10)  # the clients that are measured share its core
    flood = Flood(port, Path(sys.argv[4]))
    asyncio.run(flood.run(name, seconds))
    print(json.dumps(flood.seen))


if __name__ == "__main__":
    main()
