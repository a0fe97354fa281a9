"""The routes of batches: create, list, retrieve, cancel. Source: OpenAI's API reference, "Batch"."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tallystick.client.batches.input_lines import ENDPOINTS, normal_endpoint
from tallystick.client.batches.records import BATCH_INPUT, Batch, BatchStatus
from tallystick.client.batches.service import BatchService
from tallystick.client.batches.store import new_id
from tallystick.client.batches.window import read_window
from tallystick.client.config import BATCH
from tallystick.client.gateway.auth import CALLER_KEY, caller_label
from tallystick.client.gateway.file_routes import MAX_EXPIRY_SECONDS, MIN_EXPIRY_SECONDS
from tallystick.client.gateway.paging import read_limit
from tallystick.client.gateway.request_bodies import BODY_TIMEOUT_SECONDS
from tallystick.client.ledger.idempotency import check_key
from tallystick.client.selection.options import HEADER, RequestOptions, read_options, restrict_to_key
from tallystick.protocol.errors import BadMessage, Code, Refusal
from tallystick.protocol.json_members import read_count, read_text
from tallystick.protocol.lenient_json import is_encodable, parse_lenient
from tallystick.protocol.routes import JSON
from tallystick.protocol.wire import dumps
from tallystick.runtime.content_encoding import read_codings
from tallystick.runtime.deadlines import wait_within

BATCHES = "/v1/batches"
MAX_PAGE, DEFAULT_PAGE = 100, 20
MAX_BODY_BYTES = 64 * 1_024
MAX_METADATA, MAX_METADATA_KEY, MAX_METADATA_VALUE = 16, 64, 512


def batch_routes(service: BatchService) -> list[Route]:
    """The routes, each of which sees the batches of its caller alone."""

    async def create(request: Request) -> Response:
        batch = await _read_new(request, service, int(service.now()))
        key = request.headers.get("idempotency-key")
        created = await service.store.create(batch, None if key is None else check_key(key))
        service.created()
        return _show(created)

    async def list_batches(request: Request) -> Response:
        query = request.query_params
        limit = read_limit(query, DEFAULT_PAGE, MAX_PAGE)
        batches, more = await service.store.list_batches(caller_label(request.scope), limit=limit, after=query.get("after"))
        ids = {"first_id": batches[0].id if batches else None, "last_id": batches[-1].id if batches else None}
        data = [_with_reason(batch).to_json() for batch in batches]
        return _json({"object": "list", "data": data, **ids, "has_more": more})

    async def retrieve(request: Request) -> Response:
        return _show(await service.store.batch(caller_label(request.scope), request.path_params["id"]))

    async def cancel(request: Request) -> Response:
        batch = await service.store.cancel(caller_label(request.scope), request.path_params["id"], int(service.now()))
        service.cancelled(batch.id)
        service.created()
        return _show(batch)

    def _with_reason(batch: Batch) -> Batch:
        return replace(batch, waiting=service.waiting(batch.id))

    def _show(batch: Batch) -> Response:
        return _json(_with_reason(batch).to_json())

    return [
        Route(BATCHES, create, methods=["POST"]),
        Route(BATCHES, list_batches, methods=["GET"]),
        Route(f"{BATCHES}/{{id}}", retrieve, methods=["GET"]),
        Route(f"{BATCHES}/{{id}}/cancel", cancel, methods=["POST"]),
    ]


async def _read_new(request: Request, service: BatchService, now: int) -> Batch:
    """The batch that a request asks for. Raises BadMessage, or Refusal if its file is not known."""
    caller, document = caller_label(request.scope), parse_lenient(await _body(request), "request body")
    if not isinstance(document, dict):
        raise BadMessage("request body: expected a JSON object")
    options = request.headers.get(HEADER, "{}")
    restrict_to_key(request.scope.get(CALLER_KEY), _batch_options(options))  # so that an error comes now, not with each line
    endpoint = normal_endpoint(document.get("endpoint"))
    if endpoint is None:
        raise _fault("endpoint", f"expected one of {', '.join(ENDPOINTS)}, got {str(document.get('endpoint'))[:60]!r}")
    seconds = read_window(document.get("completion_window"))
    file_id = document.get("input_file_id")
    if not isinstance(file_id, str) or not is_encodable(file_id):
        raise _fault("input_file_id", "expected the id of an uploaded file")
    file = await service.store.file(caller, file_id)
    if file.purpose != BATCH_INPUT:
        raise _fault("input_file_id", f"expected a file with the purpose {BATCH_INPUT}, got {file.purpose}")
    return Batch(
        id=new_id("batch_"),
        caller=caller,
        endpoint=endpoint,
        input_file=file.id,
        window=document["completion_window"],
        status=BatchStatus.VALIDATING,
        created_at=now,
        expires_at=now + seconds,
        metadata=_metadata(document.get("metadata")),
        options=options,
        output_seconds=_output_seconds(document.get("output_expires_after")),
    )


def _batch_options(header: str) -> RequestOptions:
    options, _ = read_options(header)
    if options.get("priority", BATCH) != BATCH:
        raise BadMessage(f"{HEADER}.priority: expected {BATCH}, the class of all jobs of a batch, got {options['priority']!r}")
    return options


async def _body(request: Request) -> bytes:
    if read_codings(request.headers.getlist("content-encoding")):
        raise Refusal(Code.UNSUPPORTED_ENCODING, "content-encoding: expected none for a new batch")
    body = bytearray()
    pieces = request.stream()
    try:
        while (piece := await wait_within(BODY_TIMEOUT_SECONDS, anext(pieces, None))) is not None:
            body += piece
            if len(body) > MAX_BODY_BYTES:
                raise Refusal(Code.BODY_TOO_LARGE, f"request body: expected at most {MAX_BODY_BYTES} bytes")
    except TimeoutError:
        raise Refusal(Code.TIMED_OUT, f"request body: expected within {BODY_TIMEOUT_SECONDS} seconds") from None
    return bytes(body)


def _fault(member: str, text: str) -> BadMessage:
    error = BadMessage(f"{member}: {text}")
    error.param = member
    return error


def _metadata(raw: object) -> Mapping[str, str] | None:
    if raw is None:
        return None
    if not isinstance(raw, dict) or len(raw) > MAX_METADATA:
        raise _fault("metadata", f"expected an object of at most {MAX_METADATA} members")
    for name, value in raw.items():
        if len(name) > MAX_METADATA_KEY:
            raise _fault("metadata", f"expected names of at most {MAX_METADATA_KEY} characters, got {name[:80]!r}")
        read_text(value, f"metadata.{name}", MAX_METADATA_VALUE)
        if not is_encodable(name + value):
            raise _fault("metadata", f"expected Unicode, got a lone surrogate in {name[:80]!r}")
    return raw


def _output_seconds(raw: Any) -> int | None:
    if raw is None:
        return None
    if not isinstance(raw, dict) or raw.get("anchor") != "created_at":
        raise _fault("output_expires_after", 'expected {"anchor": "created_at", "seconds": …}')
    return read_count(raw.get("seconds"), "output_expires_after.seconds", MIN_EXPIRY_SECONDS, MAX_EXPIRY_SECONDS)


def _json(document: object) -> Response:
    return Response(dumps(document), media_type=JSON)
