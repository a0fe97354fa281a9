"""Bytes and places on the disk: what callers, uploads and batches may take, all together."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import httpx
import pytest

from tallystick.client.batches.records import Batch, BatchStatus, InputLine, StoredFile
from tallystick.client.batches.service import MAX_UPLOADS, BatchService
from tallystick.client.config import ClientConfig
from tallystick.client.gateway.batch_answers import BatchAnswers
from tallystick.client.gateway.handler import RequestHandler
from tallystick.client.sdk.market import Market
from tallystick.protocol.eip712 import Signer
from tallystick.protocol.errors import Refusal, Unavailable
from tests.client.fake_coordinator import CHAT, FakeMarket
from tests.client.gateway.test_batch_routes import gateway, jsonl, request_line

MIB = 1 << 20


async def _post_file(http: httpx.AsyncClient, content: bytes) -> httpx.Response:
    return await http.post("/v1/files", files={"file": content}, data={"purpose": "batch"})


async def _create(http: httpx.AsyncClient, file_id: str) -> httpx.Response:
    new = {"input_file_id": file_id, "endpoint": CHAT, "completion_window": "1h"}
    return await http.post("/v1/batches", json=new)


async def _until(http: httpx.AsyncClient, batch_id: str, ready: Callable[[str], bool]) -> dict[str, Any]:
    async with asyncio.timeout(120):
        while True:
            batch: dict[str, Any] = (await http.get(f"/v1/batches/{batch_id}")).json()
            if ready(batch["status"]):
                return batch
            await asyncio.sleep(0.02)


async def _run_and_cancel(http: httpx.AsyncClient, file_id: str) -> str:
    """Creates a batch that nobody answers and cancels it. Returns why it was not created or failed, or an empty text."""
    answer = await _create(http, file_id)
    if answer.status_code != 200:
        return str(answer.json()["error"]["code"])
    batch = await _until(http, answer.json()["id"], lambda status: status != "validating")
    if batch["status"] == "failed":
        return str(batch["errors"]["data"][0]["code"])
    await http.post(f"/v1/batches/{batch['id']}/cancel")
    await _until(http, batch["id"], lambda status: status == "cancelled")
    return ""


async def _exhaust(http: httpx.AsyncClient, file_id: str) -> int:
    """Creates and cancels batches until one is refused. Returns how many ran."""
    for count in range(30):
        if reason := await _run_and_cancel(http, file_id):
            assert reason == "storage_full"
            return count
    raise AssertionError("nothing was refused")


async def test_error_files_take_room(fake: FakeMarket, wallet: Signer, config: ClientConfig) -> None:
    """Batches that are cancelled write error files: without room for its own, a batch fails at its begin."""
    fake.providers.clear()
    lines = [request_line(number, custom_id=f"{number:04}" + "\u0001" * 500) for number in range(100)]
    small = replace(config, batches_mib=2, batch_file_mib=1)
    async with gateway(fake, wallet, small) as url, httpx.AsyncClient(base_url=url, timeout=120) as http:
        made = (await _post_file(http, jsonl(*lines))).json()
        assert await _exhaust(http, made["id"]) >= 2
        files = (await http.get("/v1/files")).json()["data"]
        assert sum(file["bytes"] for file in files) <= 2 * MIB
        output = next(file for file in files if file["id"] != made["id"])
        await http.delete(f"/v1/files/{output['id']}")
        assert not await _run_and_cancel(http, made["id"])


async def test_open_batches_keep_places_for_their_files(
    fake: FakeMarket, wallet: Signer, config: ClientConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outputs count as files, and an open batch holds two places: neither batches nor uploads can take them."""
    fake.providers.clear()
    monkeypatch.setattr("tallystick.client.batches.store.MAX_FILES", 6)
    async with gateway(fake, wallet, config) as url, httpx.AsyncClient(base_url=url, timeout=120) as http:
        made = (await _post_file(http, jsonl(request_line(1)))).json()
        first, second = [(await _create(http, made["id"])) for _ in range(2)]
        assert (first.status_code, second.status_code) == (200, 200)
        refused = await _create(http, made["id"])
        assert (refused.status_code, refused.json()["error"]["code"]) == (507, "storage_full")
        assert (await _post_file(http, b"x")).status_code == 200
        assert (await _post_file(http, b"x")).status_code == 507
        for batch in (first, second):
            await http.post(f"/v1/batches/{batch.json()['id']}/cancel")
            await _until(http, batch.json()["id"], lambda status: status == "cancelled")
        assert await _exhaust(http, made["id"]) == 1
        assert len((await http.get("/v1/files")).json()["data"]) <= 6


async def _nothing() -> None:
    """Begins no batch."""


def _batch(file_id: str) -> Batch:
    return Batch(
        id="batch_1",
        caller="",
        endpoint=CHAT,
        input_file=file_id,
        window="7d",
        status=BatchStatus.VALIDATING,
        created_at=1,
        expires_at=1 << 40,
    )


async def test_a_batch_that_was_cancelled_before_its_validation(
    fake: FakeMarket, wallet: Signer, config: ClientConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch whose process ended while its input was read, and that is cancelled then, writes no files: it has no place."""
    async with Market(fake.url, wallet, config) as market:
        service = BatchService(config, wallet, BatchAnswers(market, RequestHandler(market)))
        monkeypatch.setattr(service, "_begin_batches", _nothing)
        async with service:
            upload = await service.begin_upload()
            upload.add(jsonl(request_line(1)))
            await upload.finish(service.store, StoredFile(upload.id, "", "f", "batch", upload.size, 1, 1 << 40))
            await service.end_upload(upload)
            batch = _batch(upload.id)
            await service.store.create(batch, None)
            await service.store.add_lines(batch.id, [InputLine(1, 0, upload.size - 1)])
            await service.store.cancel("", batch.id, 2)
        async with BatchService(config, wallet, BatchAnswers(market, RequestHandler(market))) as later:
            async with asyncio.timeout(120):
                while (batch := await later.store.batch("", batch.id)).status is not BatchStatus.CANCELLED:  # noqa: ASYNC110
                    await asyncio.sleep(0.02)
    assert (batch.total, batch.failed, batch.error_file) == (0, 0, None)


async def test_uploads_at_the_same_time(fake: FakeMarket, wallet: Signer, config: ClientConfig) -> None:
    """However many begin at once, only so many run, and together they take no more than all files may."""
    small = replace(config, batches_mib=2, batch_file_mib=1)
    async with (
        Market(fake.url, wallet, small) as market,
        BatchService(small, wallet, BatchAnswers(market, RequestHandler(market))) as service,
    ):
        begun = await asyncio.gather(*(service.begin_upload() for _ in range(50)), return_exceptions=True)
        uploads = [upload for upload in begun if not isinstance(upload, BaseException)]
        assert len(uploads) == MAX_UPLOADS
        assert all(isinstance(error, Unavailable) for error in begun if isinstance(error, BaseException))
        for upload in uploads[:2]:
            upload.add(b"z" * MIB)
        with pytest.raises(Refusal, match="batches_mib"):
            uploads[2].add(b"z")
        await service.end_upload(uploads[2])
        await service.end_upload(uploads[0])
        uploads[3].add(b"z" * MIB)
        for upload in (uploads[1], uploads[3]):
            await upload.finish(service.store, StoredFile(upload.id, "", "f", "batch", upload.size, 1, 1 << 40))
            await service.end_upload(upload)
        assert await service.store.used_bytes() == 2 * MIB
        with pytest.raises(Refusal, match="batches_mib"):
            uploads[4].add(b"z")
        for upload in uploads[4:]:
            await service.end_upload(upload)
        again = [await service.begin_upload() for _ in range(MAX_UPLOADS)]  # all slots are free again
        assert len(again) == MAX_UPLOADS


async def test_what_another_process_added_counts(fake: FakeMarket, wallet: Signer, config: ClientConfig) -> None:
    """The sum of all files is checked once more with the file that is added; what is refused leaves nothing."""
    small = replace(config, batches_mib=2, batch_file_mib=1)
    async with (
        Market(fake.url, wallet, small) as market,
        BatchService(small, wallet, BatchAnswers(market, RequestHandler(market))) as service,
    ):
        upload = await service.begin_upload()
        upload.add(b"z" * MIB)
        await service.store.add_file(StoredFile("file-other", "", "f", "batch", MIB + 1, 1, 1 << 40))
        with pytest.raises(Refusal, match="batches_mib"):
            await upload.finish(service.store, StoredFile(upload.id, "", "f", "batch", upload.size, 1, 1 << 40))
        await service.end_upload(upload)
        assert await service.store.file_ids() == {"file-other"}
        assert not list(service.folder.path.glob("file-*"))
