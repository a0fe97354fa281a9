"""The routes of stored responses: read one, list its input, delete it. Source: OpenAI's API reference, "Responses"."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tallystick.client.gateway.auth import caller_label
from tallystick.client.gateway.response_state import ResponseState
from tallystick.protocol.errors import BadMessage
from tallystick.protocol.routes import JSON, RESPONSES
from tallystick.protocol.wire import dumps

MAX_PAGE = 100
DEFAULT_PAGE = 20


def stored_response_routes(state: ResponseState) -> list[Route]:
    """The routes, each of which sees the responses of its caller alone."""

    async def read(request: Request) -> Response:
        if request.query_params.get("stream") in ("true", "1"):
            raise BadMessage(
                "stream: expected false: only responses in the background can be streamed again, and none is kept here"
            )
        stored = await state.get(caller_label(request.scope), request.path_params["id"])
        return _json(stored.response)

    async def delete(request: Request) -> Response:
        response_id = request.path_params["id"]
        await state.delete(caller_label(request.scope), response_id)
        return _json({"id": response_id, "object": "response", "deleted": True})

    async def input_items(request: Request) -> Response:
        stored = await state.get(caller_label(request.scope), request.path_params["id"])
        return _json(_page(stored.input_items, dict(request.query_params)))

    async def cancel(request: Request) -> Response:
        await state.get(caller_label(request.scope), request.path_params["id"])
        raise BadMessage("Cannot cancel a synchronous response: only responses in the background can be cancelled")

    path = f"{RESPONSES}/{{id}}"
    return [
        Route(path, read, methods=["GET"]),
        Route(path, delete, methods=["DELETE"]),
        Route(f"{path}/input_items", input_items, methods=["GET"]),
        Route(f"{path}/cancel", cancel, methods=["POST"]),
    ]


def _page(items: list[dict[str, Any]], query: dict[str, str]) -> dict[str, Any]:
    """A page of items, the newest first unless `order` is asc. Raises BadMessage."""
    order, after = query.get("order", "desc"), query.get("after")
    if order not in ("asc", "desc"):
        raise BadMessage(f"order: expected asc or desc, got {order[:20]!r}")
    try:
        limit = int(query.get("limit", DEFAULT_PAGE))
    except ValueError:
        limit = 0
    if not 1 <= limit <= MAX_PAGE:
        raise BadMessage(f"limit: expected 1 to {MAX_PAGE}, got {query.get('limit', '')[:20]!r}")
    listed = items if order == "asc" else items[::-1]
    if after is not None:
        place = next((at for at, item in enumerate(listed) if item["id"] == after), None)
        if place is None:
            raise BadMessage(f"after: expected the id of an item of this response, got {after[:80]!r}")
        listed = listed[place + 1 :]
    page = listed[:limit]
    return {
        "object": "list",
        "data": page,
        "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None,
        "has_more": len(listed) > limit,
    }


def _json(document: object) -> Response:
    return Response(dumps(document), media_type=JSON)
