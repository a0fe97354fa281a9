"""GET /v1/log/proof without the framework: every client and node asks it every few seconds.

It answers the questions that their software asks (log_monitor.LogQuestion). Any other request goes to the documented route of
log_routes.py, which refuses it or reads it, so both give the same answers.
"""

from __future__ import annotations

import re

from starlette.types import ASGIApp, Receive, Scope, Send

from coordinator.http.request_limiter import send_error
from coordinator.jobs.match_log import MatchLog
from tallystick.protocol.errors import TallyError
from tallystick.protocol.log_monitor import MAX_ASKED, MAX_SPAN
from tallystick.protocol.merkle import Range
from tallystick.protocol.wire import dumps

PATH = "/v1/log/proof"
_MEMBER = rb"(?:since|index|start|end)=[0-9]{1,18}"
_QUERY = re.compile(_MEMBER + rb"(?:&" + _MEMBER + rb")*")


class LogProofRoute:
    """Wraps the ASGI app of the control plane, to which it passes all that it does not answer itself."""

    def __init__(self, app: ASGIApp, match_log: MatchLog) -> None:
        self._app, self._match_log = app, match_log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request."""
        question = read_question(scope["query_string"]) if _is_asked(scope) else None
        if question is None:
            await self._app(scope, receive, send)
            return
        since, indexes, span = question
        try:
            body = dumps(await self._match_log.proof(since, indexes, span=span))
        except TallyError as error:
            await send_error(send, error)
            return
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})


def _is_asked(scope: Scope) -> bool:
    return (scope["type"], scope.get("path"), scope.get("method")) == ("http", PATH, "GET")


def read_question(query: bytes) -> tuple[list[int], list[int], Range | None] | None:
    """Returns the sizes, the leaves and the leaves in a row that a query string names. None if it is not of the plain form."""
    if not _QUERY.fullmatch(query):
        return None
    numbers: dict[bytes, list[int]] = {b"since": [], b"index": [], b"start": [], b"end": []}
    for member in query.split(b"&"):
        name, _, number = member.partition(b"=")
        numbers[name].append(int(number))
    since, indexes, start, end = numbers.values()
    if max(len(since), len(indexes)) > MAX_ASKED or max(len(start), len(end)) > 1:
        return None
    span = (start[0], end[0]) if start and end and end[0] - start[0] <= MAX_SPAN else None
    return since, indexes, span
