"""Files at the gateway: what the SDK and plain HTTP clients upload, list, read and delete, and what is refused."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace

import httpx
import openai
import pytest

from tallystick.client.batches.records import Batch, BatchStatus, StoredFile
from tallystick.client.batches.store import MAX_FILES, BatchStore
from tallystick.client.config import ClientConfig
from tallystick.protocol.eip712 import Signer
from tests.client.fake_coordinator import FakeMarket
from tests.client.gateway.test_batch_routes import gateway, jsonl, request_line

LINES = jsonl(request_line(1))
TYPE = {"content-type": "multipart/form-data; boundary=b"}


@pytest.fixture
async def http(fake: FakeMarket, wallet: Signer, config: ClientConfig) -> AsyncIterator[httpx.AsyncClient]:
    """A plain HTTP client of a gateway."""
    async with gateway(fake, wallet, config) as url, httpx.AsyncClient(base_url=url, timeout=120) as client:
        yield client


async def test_files_by_the_sdk(http: httpx.AsyncClient) -> None:
    """Create, list in pages, retrieve, read and delete, as the official SDK does."""
    async with openai.AsyncOpenAI(base_url=f"{http.base_url}/v1", api_key="unused", max_retries=0) as sdk:
        made = [await sdk.files.create(file=(f"{number}.jsonl", LINES), purpose="batch") for number in range(3)]
        other = await sdk.files.create(
            file=b"\0\xff any bytes",
            purpose="user_data",
            expires_after={"anchor": "created_at", "seconds": 3_600},
        )
        assert (made[0].bytes, made[0].filename, made[0].purpose, made[0].status) == (len(LINES), "0.jsonl", "batch", "processed")
        assert other.expires_at == other.created_at + 3_600
        newest = [file.id async for file in sdk.files.list(limit=1)]
        assert newest == [other.id, made[2].id, made[1].id, made[0].id]
        assert [file.id async for file in sdk.files.list(order="asc", purpose="batch", limit=2)] == [file.id for file in made]
        assert (await sdk.files.retrieve(other.id)) == other
        assert (await sdk.files.content(other.id)).content == b"\0\xff any bytes"
        assert (await sdk.files.delete(other.id)).deleted
        for call in (sdk.files.retrieve(other.id), sdk.files.content(other.id), sdk.files.delete(other.id)):
            with pytest.raises(openai.NotFoundError, match="No such File"):
                await call


async def test_the_disk_tells_nothing(http: httpx.AsyncClient, config: ClientConfig, wallet: Signer) -> None:
    """Contents are sealed in files that only their owner can read, and a deleted file is gone."""
    made = (await http.post("/v1/files", files={"file": LINES}, data={"purpose": "batch"})).json()
    folder = config.batches_path(wallet.address)
    [file] = folder.glob("file-*")
    assert file.stat().st_mode & 0o077 == 0
    assert (folder / "batches.db").stat().st_mode & 0o077 == 0
    assert b"question" not in b"".join(path.read_bytes() for path in folder.iterdir())
    await http.delete(f"/v1/files/{made['id']}")
    assert not list(folder.glob("file-*"))


async def test_a_large_file_is_streamed(http: httpx.AsyncClient) -> None:
    """A file of many pieces, sent in chunks without a length, comes back byte by byte."""
    pieces = [bytes([number]) * 100_003 for number in range(40)]

    async def body() -> AsyncIterator[bytes]:
        yield b'--b\r\nContent-Disposition: form-data; name="file"; filename="big"\r\n\r\n'
        for piece in pieces:
            yield piece
        yield b'\r\n--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--b--\r\n'

    made = (await http.post("/v1/files", content=body(), headers=TYPE)).json()
    assert made["bytes"] == 40 * 100_003
    answer = await http.get(f"/v1/files/{made['id']}/content")
    assert answer.content == b"".join(pieces)
    assert answer.headers["content-length"] == str(made["bytes"])


@pytest.mark.parametrize(
    ("data", "status", "reason"),
    [
        ({}, 400, "purpose: expected batch or user_data, got none"),
        ({"purpose": "assistants"}, 400, "purpose: expected batch or user_data, got 'assistants'"),
        ({"purpose": "batch_output"}, 400, "purpose"),
        ({"purpose": "batch", "expires_after[anchor]": "now"}, 400, "expires_after.anchor"),
        ({"purpose": "batch", "expires_after[seconds]": "3600"}, 400, "expires_after.anchor: expected created_at, got none"),
        ({"purpose": "batch", "expires_after": '{"anchor": "created_at", "seconds": 3600}'}, 400, "expires_after: expected"),
        ({"purpose": "batch", "expires_after[anchor]": "created_at"}, 400, "expires_after.seconds"),
        (
            {"purpose": "batch", "expires_after[anchor]": "created_at", "expires_after[seconds]": "5"},
            400,
            "expires_after.seconds",
        ),
        (
            {"purpose": "batch", "expires_after[anchor]": "created_at", "expires_after[seconds]": "٣600"},
            400,
            "expires_after.seconds",
        ),
    ],
)
async def test_wrong_uploads(http: httpx.AsyncClient, data: dict[str, str], status: int, reason: str) -> None:
    """Each is refused with its member, in OpenAI's form, and nothing is kept."""
    answer = await http.post("/v1/files", files={"file": LINES}, data=data)
    assert answer.status_code == status
    assert answer.json()["error"]["message"].startswith(reason)
    assert (await http.get("/v1/files")).json()["data"] == []


async def test_bodies_that_are_no_upload(http: httpx.AsyncClient) -> None:
    """JSON, a cut form and a compressed form are refused; the connection that broke off leaves nothing."""
    assert (await http.post("/v1/files", json={"file": "x"})).status_code == 400
    cut = await http.post("/v1/files", content=b'--b\r\nContent-Disposition: form-data; name="file"\r\n\r\nx', headers=TYPE)
    assert "cut off" in cut.json()["error"]["message"]
    packed = await http.post("/v1/files", content=b"x", headers={**TYPE, "content-encoding": "gzip"})
    assert packed.status_code == 415
    assert (await http.get("/v1/files")).json()["data"] == []


@pytest.mark.parametrize("query", ["limit=0", "limit=10001", "limit=x", "order=up", "after=file-1", "limit=-1"])
async def test_wrong_queries(http: httpx.AsyncClient, query: str) -> None:
    """The member is named."""
    answer = await http.get(f"/v1/files?{query}")
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith(query.partition("=")[0])


async def test_limits(fake: FakeMarket, wallet: Signer, config: ClientConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """One file, all files together and their number are bounded; what is refused takes no room."""
    small = replace(config, batch_file_mib=1, batches_mib=2)
    half = b"x" * (700 << 10)
    async with gateway(fake, wallet, small) as url, httpx.AsyncClient(base_url=url, timeout=120) as http:

        async def post(content: bytes) -> httpx.Response:
            return await http.post("/v1/files", files={"file": content}, data={"purpose": "batch"})

        large = await post(b"x" * ((1 << 20) + 1))
        assert (large.status_code, large.json()["error"]["code"]) == (413, "body_too_large")
        assert [(await post(half)).status_code for _ in range(2)] == [200, 200]
        full = await post(half)
        assert (full.status_code, full.json()["error"]["code"]) == (507, "storage_full")
        kept = (await http.get("/v1/files")).json()["data"]
        await http.delete(f"/v1/files/{kept[0]['id']}")
        assert (await post(half)).status_code == 200
        monkeypatch.setattr("tallystick.client.batches.store.MAX_FILES", 2)
        many = await post(b"x")
        assert (many.status_code, many.json()["error"]["code"]) == (507, "storage_full")
        assert len(list(small.batches_path(wallet.address).glob("file-*"))) == 2
    assert MAX_FILES == 1_000


async def test_an_input_in_use_is_not_deleted(http: httpx.AsyncClient, fake: FakeMarket) -> None:
    """The input of an open batch stays; after its end it may go."""
    fake.providers.clear()
    made = (await http.post("/v1/files", files={"file": LINES}, data={"purpose": "batch"})).json()
    new = {"input_file_id": made["id"], "endpoint": "/v1/chat/completions", "completion_window": "24h"}
    batch = (await http.post("/v1/batches", json=new)).json()
    refused = await http.delete(f"/v1/files/{made['id']}")
    assert refused.status_code == 400
    assert batch["id"] in refused.json()["error"]["message"]
    await http.post(f"/v1/batches/{batch['id']}/cancel")
    async with asyncio.timeout(120):
        while (await http.get(f"/v1/batches/{batch['id']}")).json()["status"] != "cancelled":  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    assert (await http.delete(f"/v1/files/{made['id']}")).json() == {"id": made["id"], "object": "file", "deleted": True}


async def test_a_damaged_file_is_named(http: httpx.AsyncClient, config: ClientConfig, wallet: Signer) -> None:
    """A file whose bytes changed on the disk is an error, not another content; a batch of it fails and says so."""
    made = (await http.post("/v1/files", files={"file": LINES}, data={"purpose": "batch"})).json()
    path = config.batches_path(wallet.address) / made["id"]
    sealed = bytearray(path.read_bytes())
    sealed[40] ^= 1
    path.write_bytes(sealed)
    answer = await http.get(f"/v1/files/{made['id']}/content")
    assert answer.status_code == 503
    assert "cannot be read" in answer.json()["error"]["message"]
    new = {"input_file_id": made["id"], "endpoint": "/v1/chat/completions", "completion_window": "24h"}
    batch = (await http.post("/v1/batches", json=new)).json()
    async with asyncio.timeout(120):
        while batch["status"] != "failed":
            await asyncio.sleep(0.02)
            batch = (await http.get(f"/v1/batches/{batch['id']}")).json()
    assert batch["errors"]["data"][0]["code"] == "invalid_input_file"


async def test_expired_files_and_old_batches_go(config: ClientConfig, wallet: Signer) -> None:
    """What is too old is forgotten, except for an input that an open batch reads."""
    store = await BatchStore.open(config.batches_path(wallet.address) / "batches.db", 1 << 20)
    try:
        for number in range(3):
            await store.add_file(StoredFile(f"file-{number}", "", "x", "batch", 1, 0, 100 * (number + 1)))
        for number, status in enumerate((BatchStatus.IN_PROGRESS, BatchStatus.COMPLETED, BatchStatus.COMPLETED)):
            batch = Batch(
                id=f"batch_{number}",
                caller="",
                endpoint="/v1/chat/completions",
                input_file=f"file-{number}",
                window="24h",
                status=status,
                created_at=100 * number,
                expires_at=1_000,
            )
            await store.create(batch, None)
        await store.prune(250, 150)
        assert await store.file_ids() == {"file-0", "file-2"}
        batches, _ = await store.list_batches("", limit=10, after=None)
        assert [batch.id for batch in batches] == ["batch_2", "batch_0"]
    finally:
        await store.close()


async def test_a_gateway_without_files(fake: FakeMarket, wallet: Signer, config: ClientConfig) -> None:
    """With batches_mib = 0 the routes say so."""
    async with gateway(fake, wallet, replace(config, batches_mib=0)) as url, httpx.AsyncClient(base_url=url) as http:
        answer = await http.get("/v1/batches")
        assert answer.status_code == 404
        assert "batches_mib is 0" in json.loads(answer.content)["error"]["message"]
