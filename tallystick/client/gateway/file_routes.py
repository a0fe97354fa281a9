"""The routes of files: upload, list, retrieve, content, delete. Source: OpenAI's API reference, "Files".

An upload goes to the disk as it comes. Each caller sees its own files alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from tallystick.client.batches.file_folder import Upload
from tallystick.client.batches.records import PURPOSES, StoredFile
from tallystick.client.batches.service import BatchService
from tallystick.client.batches.upload_form import UploadForm
from tallystick.client.config import ClientConfig
from tallystick.client.gateway.auth import caller_label
from tallystick.client.gateway.paging import read_limit, read_order
from tallystick.client.gateway.request_bodies import BODY_TIMEOUT_SECONDS
from tallystick.client.ledger.spending import DAY_SECONDS
from tallystick.protocol.errors import BadMessage, Code, Refusal
from tallystick.protocol.json_members import read_count
from tallystick.protocol.routes import JSON
from tallystick.protocol.wire import dumps
from tallystick.runtime.content_encoding import read_codings
from tallystick.runtime.deadlines import wait_within

FILES = "/v1/files"
MAX_PAGE = 10_000
MAX_UPLOAD_SECONDS = 3_600
"""Seconds within which an upload must end."""
MIN_EXPIRY_SECONDS, MAX_EXPIRY_SECONDS = 3_600, 30 * DAY_SECONDS
_EXPIRY = ("expires_after[anchor]", "expires_after[seconds]")


def file_routes(service: BatchService, config: ClientConfig) -> list[Route]:
    """The routes, each of which sees the files of its caller alone."""

    async def create(request: Request) -> Response:
        if read_codings(request.headers.getlist("content-encoding")):
            raise Refusal(Code.UNSUPPORTED_ENCODING, "content-encoding: expected none, since a file is stored as it comes")
        upload = await service.begin_upload()
        try:
            form = UploadForm(request.headers.get("content-type", ""), upload.add)
            async with asyncio.timeout(MAX_UPLOAD_SECONDS):
                await _receive(request, form, upload)
            form.finish()
            created = int(service.now())
            expires_at = created + _lifetime(form.fields, config.batches_days * DAY_SECONDS)
            purpose, filename = _purpose(form.fields), form.filename or "upload"
            file = StoredFile(upload.id, caller_label(request.scope), filename, purpose, upload.size, created, expires_at)
            await upload.finish(service.store, file)
        except TimeoutError:
            text = f"request body: expected within {MAX_UPLOAD_SECONDS} seconds, and more every {BODY_TIMEOUT_SECONDS} seconds"
            raise Refusal(Code.TIMED_OUT, text) from None
        except ClientDisconnect:
            return Response(status_code=400)  # which nobody reads
        finally:
            await service.end_upload(upload)
        return _json(file.to_json())

    async def list_files(request: Request) -> Response:
        query = request.query_params
        files, more = await service.store.list_files(
            caller_label(request.scope),
            limit=read_limit(query, MAX_PAGE, MAX_PAGE),
            after=query.get("after"),
            purpose=query.get("purpose"),
            newest_first=read_order(query) == "desc",
        )
        ids = {"first_id": files[0].id if files else None, "last_id": files[-1].id if files else None}
        return _json({"object": "list", "data": [file.to_json() for file in files], **ids, "has_more": more})

    async def retrieve(request: Request) -> Response:
        return _json((await _file(request)).to_json())

    async def content(request: Request) -> Response:
        file = await _file(request)
        pieces = service.folder.pieces(file.id)
        first = await anext(pieces, b"")  # an unreadable file is an error, not half an answer
        headers = {"content-length": str(file.bytes), "content-disposition": "attachment"}
        return StreamingResponse(_all(first, pieces), headers=headers, media_type="application/octet-stream")

    async def delete(request: Request) -> Response:
        file_id = request.path_params["id"]
        await service.store.delete_file(caller_label(request.scope), file_id)
        await service.folder.delete(file_id)
        return _json({"id": file_id, "object": "file", "deleted": True})

    async def _file(request: Request) -> StoredFile:
        return await service.store.file(caller_label(request.scope), request.path_params["id"])

    path = f"{FILES}/{{id}}"
    return [
        Route(FILES, create, methods=["POST"]),
        Route(FILES, list_files, methods=["GET"]),
        Route(path, retrieve, methods=["GET"]),
        Route(path, delete, methods=["DELETE"]),
        Route(f"{path}/content", content, methods=["GET"]),
    ]


async def _receive(request: Request, form: UploadForm, upload: Upload) -> None:
    pieces = request.stream()
    while (piece := await wait_within(BODY_TIMEOUT_SECONDS, anext(pieces, None))) is not None:
        form.feed(piece)
        await upload.flush()


async def _all(first: bytes, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    async for piece in rest:
        yield piece


def _purpose(fields: dict[str, str]) -> str:
    purpose = fields.get("purpose")
    if purpose not in PURPOSES:
        got = "none" if purpose is None else repr(purpose[:60])
        error = BadMessage(f"purpose: expected {' or '.join(PURPOSES)}, got {got}; this gateway has no use for other files")
        error.param = "purpose"
        raise error
    return purpose


def _lifetime(fields: dict[str, str], longest: int) -> int:
    """The seconds for which a file is kept. `longest`: if it does not say, and at most."""
    odd = next((name for name in fields if name.startswith("expires_after") and name not in _EXPIRY), None)
    if odd is not None:  # a file would else be kept for longer than its owner wants
        raise BadMessage(f"{odd[:60]}: expected the fields {' and '.join(_EXPIRY)}")
    anchor, seconds = (fields.get(name) for name in _EXPIRY)
    if anchor is None and seconds is None:
        return longest
    if anchor != "created_at":
        raise BadMessage(f"expires_after.anchor: expected created_at, got {'none' if anchor is None else repr(anchor[:60])}")
    count = int(seconds) if seconds is not None and seconds.isascii() and seconds.isdecimal() and len(seconds) < 10 else None
    return min(longest, read_count(count, "expires_after.seconds", MIN_EXPIRY_SECONDS, MAX_EXPIRY_SECONDS))


def _json(document: object) -> Response:
    return Response(dumps(document), media_type=JSON)
