"""A client that does not read slows the engine down instead of filling memory on the way; when it leaves, the engine stops."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

from scripts.relay import load, processes

OFFERED = 400_000
"""Chunks that the engine would send at once: some 60 MB."""
GROWTH_MIB = 24


def _last_job(log: Path) -> dict[str, object]:
    """The node's record of the job that ended last."""
    records: list[dict[str, object]] = [json.loads(line) for line in log.read_text().splitlines() if '"job ended"' in line]
    return records[-1]


async def test_client_that_does_not_read(tmp_path: Path) -> None:
    """Gateway, coordinator and node hold a bounded part of the answer; the job ends as cancelled by its client."""
    folder = tmp_path / "market"
    async with processes.upstream() as mock, processes.market(folder, mock) as site:
        await load.ask(site.gateway, requests=10, concurrency=2, chunks=5)
        before = {name: processes.rss_mib(pid) for name, pid in site.pids.items()}
        port = int(site.gateway.rpartition(":")[2])
        request = {"model": "bench", "messages": [], "stream": True, "user": f"{OFFERED} 0", "max_tokens": 4_000}
        body = json.dumps(request).encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1_024)
        writer.write(b"POST %s HTTP/1.1\r\nhost: 127.0.0.1\r\n" % load.CHAT.encode())
        writer.write(b"content-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
        assert b"200" in await reader.readline()
        for _ in range(10):
            await asyncio.sleep(0.3)
            grown = {name: processes.rss_mib(pid) - before[name] for name, pid in site.pids.items()}
            assert max(grown.values()) < GROWTH_MIB, grown
        writer.transport.abort()
        async with asyncio.timeout(60):
            while (record := _last_job(folder / "node.log"))["outcome"] != "client_cancelled":  # noqa: ASYNC110 - another process
                await asyncio.sleep(0.05)
    assert record["reason"] == "the job was cancelled"
