"""Which jobs can be audited themselves, and which by a made-up request of their shape. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tallystick.client.audits.kept_job import AUDITABLE_ROUTES, KeptJob
from tallystick.client.audits.records import KnownAudit
from tallystick.client.audits.schema import AuditKind
from tallystick.client.audits.subject import MIN_TOKENS, Subject, is_unverifiable
from tallystick.client.audits.synthetic import request_shape
from tallystick.client.dialects.registry import DIALECTS
from tallystick.protocol.errors import BadMessage
from tallystick.protocol.lenient_json import dump_lenient, parse_lenient
from tallystick.protocol.plaintext_heads import RequestHead, join_request, split_request
from tallystick.protocol.routes import CHAT

KEPT_ROUTES = (*AUDITABLE_ROUTES, *DIALECTS)
"""Routes whose jobs are audited: by themselves, or by a made-up chat of their shape."""


def needs_no_referee(audit: KnownAudit) -> bool:
    """Whether nobody can score the answer, whoever is asked."""
    if audit.kind is not AuditKind.JOB or audit.kept is None:
        return False
    try:
        Subject.of(KeptJob.unpack(audit.kept))
    except BadMessage as error:
        return is_unverifiable(error)
    return False


def can_be_audited(request: Mapping[str, Any]) -> bool:
    """Whether a request of this shape can have an answer that is audited: one choice, and enough tokens."""
    limits = [request.get("max_tokens"), request.get("max_completion_tokens")]
    return request.get("n") in (None, 1) and all(limit >= MIN_TOKENS for limit in limits if isinstance(limit, int | float))


def as_chat(kept: KeptJob) -> tuple[str, dict[str, Any]]:
    """The route and the JSON body of a job; of a chat completion that asks the same, if the route is that of a dialect.

    Raises BadMessage, also if no chat completion can ask the same.
    """
    path, request = kept.request()
    dialect = DIALECTS.get(path)
    if dialect is None:
        return path, request
    _, body = split_request(kept.proof.request)
    translated = parse_lenient(dialect.translate(body).body, "request")
    if not isinstance(translated, dict):
        raise BadMessage("request: expected a JSON object")
    return CHAT, translated


def shape_of(kept: KeptJob) -> KeptJob:
    """A job without its texts, for the audit by a request of its shape. Raises BadMessage."""
    path, request = as_chat(kept)
    body = dump_lenient(request_shape(path, request))
    return replace(kept, evidence=b"", proof=replace(kept.proof, request=join_request(RequestHead(path), body), response=()))
