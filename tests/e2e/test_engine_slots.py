"""One node with two engines, through the whole market: each has slots of its own, and one of them queues."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai

from scripts.relay import processes
from tests.e2e.extra_node import node_beside

_ANSWER = {
    "object": "chat.completion",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "hi"}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 5, "completion_tokens": 1, "total_tokens": 6},
}


@dataclass
class HeldEngine:
    """An engine that answers when the test says so. `most`: requests that it takes at once; it refuses others with 429."""

    models: tuple[str, ...]
    most: int = 1_000
    url: str = ""
    running: Counter[str] = field(default_factory=Counter)
    highest: int = 0
    refused: int = 0
    open: asyncio.Event = field(default_factory=asyncio.Event)
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answers one request."""
        with suppress(OSError, asyncio.IncompleteReadError):
            head = await reader.readuntil(b"\r\n\r\n")
            if head.startswith(b"GET"):
                known = b" /v1/models " in head
                await _reply(writer, 200 if known else 404, {"data": [{"id": model} for model in self.models]} if known else {})
                return
            length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
            request = json.loads(await reader.readexactly(length))
            if self.running.total() >= self.most:
                self.refused += 1
                await _reply(writer, 429, {"error": {"message": "busy", "type": "rate_limit"}})
                return
            await self._answer(writer, request["model"])

    async def _answer(self, writer: asyncio.StreamWriter, model: str) -> None:
        await self._count(model, 1)
        self.highest = max(self.highest, self.running.total())
        try:
            await self.open.wait()
            await _reply(writer, 200, {**_ANSWER, "model": model})
        finally:
            await self._count(model, -1)

    async def _count(self, model: str, change: int) -> None:
        async with self.changed:
            self.running[model] += change
            self.changed.notify_all()

    async def until(self, **running: int) -> None:
        """Waits until it runs this many requests of each model."""
        async with self.changed, asyncio.timeout(120):
            await self.changed.wait_for(lambda: all(self.running[model] == count for model, count in running.items()))


async def _reply(writer: asyncio.StreamWriter, status: int, document: dict[str, Any]) -> None:
    body = json.dumps(document).encode()
    head = f"HTTP/1.1 {status} X\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
    writer.write(head.encode() + body)
    await writer.drain()
    writer.close()


@asynccontextmanager
async def _held(engine: HeldEngine) -> AsyncIterator[HeldEngine]:
    server = await asyncio.start_server(engine.serve, "127.0.0.1", 0)
    engine.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield engine
    finally:
        engine.open.set()
        server.close()


def _engine(engine: HeldEngine, name: str, **settings: int) -> str:
    lines = [f"{setting} = {value}" for setting, value in settings.items()]
    return "\n".join([f'[[engines]]\nurl = "{engine.url}"\nname = "{name}"\nprobe = false', *lines, ""])


@asynccontextmanager
async def _client(folder: Path, engines: str, model: str) -> AsyncIterator[openai.AsyncOpenAI]:
    """Yields a client of a market whose only node for these models has these engines."""
    async with (
        processes.upstream() as mock,
        processes.market(folder, mock) as site,
        node_beside(folder, site, engines, model=model),
        openai.AsyncOpenAI(base_url=f"{site.gateway}/v1", api_key="-", max_retries=8, timeout=300) as client,
    ):
        yield client


async def test_a_full_engine_does_not_hold_up_the_other(tmp_path: Path) -> None:
    """Two models share the slot of an engine, a third is on an engine that queues two jobs: each engine gets just its share."""
    first, second = HeldEngine(("twin_a", "twin_b")), HeldEngine(("single",))
    async with _held(first), _held(second):
        engines = _engine(first, "first", slots=1) + _engine(second, "second", slots=1, queue_depth=2)
        async with _client(tmp_path / "market", engines, "single") as client:
            jobs = [asyncio.create_task(_ask(client, model)) for model in ("twin_a", "twin_b") * 2]
            jobs += [asyncio.create_task(_ask(client, "single")) for _ in range(5)]
            await second.until(single=3)
            first.open.set()
            second.open.set()
            assert [answer async for answer in _answers(jobs)] == ["hi"] * 9
    assert (first.highest, second.highest) == (1, 3)


async def test_two_engines_with_one_model_share_its_jobs(tmp_path: Path) -> None:
    """A burst for a model that two engines of a node have runs on both, as many jobs at a time as both have slots."""
    engines = HeldEngine(("both",)), HeldEngine(("both",))
    async with _held(engines[0]), _held(engines[1]):
        config = "".join(_engine(engine, f"engine {number}", slots=2) for number, engine in enumerate(engines))
        async with _client(tmp_path / "market", config, "both") as client:
            jobs = [asyncio.create_task(_ask(client, "both")) for _ in range(8)]
            for engine in engines:
                await engine.until(both=2)
            for engine in engines:
                engine.open.set()
            assert [answer async for answer in _answers(jobs)] == ["hi"] * 8
    assert [engine.highest for engine in engines] == [2, 2]


async def test_what_an_engine_refuses_is_learned_at_once(tmp_path: Path) -> None:
    """An engine with eight slots in its config that takes two jobs refuses few: the others wait until it has room."""
    engine = HeldEngine(("small",), most=2)
    engine.open.set()
    async with _held(engine), _client(tmp_path / "market", _engine(engine, "small", slots=8), "small") as client:
        jobs = [asyncio.create_task(_ask(client, "small")) for _ in range(30)]
        assert [answer async for answer in _answers(jobs)] == ["hi"] * 30
    assert engine.highest <= 2


async def _answers(jobs: list[asyncio.Task[str | None]]) -> AsyncIterator[str | None]:
    async with asyncio.timeout(280):
        for job in jobs:
            yield await job


async def _ask(client: openai.AsyncOpenAI, model: str) -> str | None:
    messages: Any = [{"role": "user", "content": "hello"}]
    answer = await client.chat.completions.create(model=model, messages=messages, max_tokens=4)
    return answer.choices[0].message.content
