"""Which jobs can be audited themselves, and which by a made-up request of their shape. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tallystick.client.audits.kept_job import KeptJob
from tallystick.client.audits.records import KnownAudit
from tallystick.client.audits.schema import AuditKind
from tallystick.client.audits.subject import MIN_TOKENS, Subject, is_unverifiable
from tallystick.client.audits.synthetic import request_shape
from tallystick.protocol.errors import BadMessage
from tallystick.protocol.lenient_json import dump_lenient
from tallystick.protocol.plaintext_heads import RequestHead, join_request


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


def shape_of(kept: KeptJob) -> KeptJob:
    """A job without its texts, for the audit by a request of its shape. Raises BadMessage."""
    path, request = kept.request()
    body = dump_lenient(request_shape(path, request))
    return replace(kept, evidence=b"", proof=replace(kept.proof, request=join_request(RequestHead(path), body), response=()))
