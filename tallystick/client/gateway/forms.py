"""The forms in which a request may be sent to a provider: as it came, or translated to a chat completion. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field

from tallystick.client.dialects.dialect import Dialect, Translation
from tallystick.protocol.errors import BadMessage, Code, TallyError
from tallystick.protocol.routes import CHAT

_NOT_SOLD_AS_IT_IS = frozenset(
    {
        Code.UNKNOWN_ROUTE,
        Code.NO_PROVIDER,
        Code.NODE_BUSY,
        Code.PRICE_ABOVE_CAP,
        Code.UNSUPPORTED,
        Code.CONTEXT_LENGTH_EXCEEDED,
    }
)
"""Refusals after which the translated request may find a provider: nobody sells the route, or nobody who fits and is free."""


@dataclass(frozen=True, slots=True)
class Form:
    """One form of a request: its route, its body, and what its answer has to be translated with; None if it is not translated."""

    path: str
    body: bytes = field(repr=False)
    translation: Translation | None = None

    @classmethod
    def translated(cls, dialect: Dialect, body: bytes) -> Form:
        """The request as a chat completion. Raises BadMessage, which names the member that cannot be translated."""
        translation = dialect.translate(body)
        return cls(CHAT, translation.body, translation)


def translated_after(dialect: Dialect | None, body: bytes, error: TallyError) -> Form:
    """The form to try if no job could be submitted for the request as it came.

    Raises `error`, or BadMessage if only a translation could be answered and there is none.
    """
    if dialect is None or error.code not in _NOT_SOLD_AS_IT_IS:
        raise error
    try:
        return Form.translated(dialect, body)
    except BadMessage:
        if error.code is Code.UNKNOWN_ROUTE:
            raise
        raise error from None
