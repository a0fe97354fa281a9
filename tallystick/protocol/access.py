"""Who calls a coordinator's HTTP API: a signed `Access` message in the Authorization header, accepted for a few minutes. Pure.

The header is `Authorization: Tally TOKEN`, where TOKEN is the signed message's JSON in base64url without padding. A token names
one coordinator, so that a coordinator which receives it cannot use it at another one.
"""

from __future__ import annotations

import base64
import binascii

from tallystick.protocol.eip712 import Domain, Signed, Verified, read_signed
from tallystick.protocol.errors import BadMessage, Code, Refusal
from tallystick.protocol.messages import Access
from tallystick.protocol.types import Address
from tallystick.protocol.wire import dumps, loads

SCHEME = "Tally"
ACCESS_SECONDS = 300
"""How far `issued_at` may lie from the coordinator's clock, either way."""
MAX_TOKEN = 2_048


def dump_access(signed: Signed[Access] | Verified[Access]) -> str:
    """The value of the Authorization header."""
    return f"{SCHEME} {base64.urlsafe_b64encode(dumps(signed.to_json())).decode().rstrip('=')}"


def load_access(header: str | None, domain: Domain, coordinator: Address, now: float) -> Address:
    """The account whose key signed the header's token. Raises Refusal (unauthenticated) where no token counts here and now, and
    BadMessage or BadSignature for a token that is malformed or forged.
    """
    scheme, _, token = (header or "").partition(" ")
    if scheme != SCHEME or not token:
        raise Refusal(Code.UNAUTHENTICATED, f"this needs a signed access token: Authorization: {SCHEME} TOKEN")
    if len(token) > MAX_TOKEN:
        raise BadMessage(f"access: expected a token of at most {MAX_TOKEN} characters")
    try:
        raw = base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        raise BadMessage("access: expected base64url") from None
    access = read_signed(Access, loads(raw, "access"), "access").verify(domain).message
    if access.coordinator != coordinator:
        raise Refusal(Code.UNAUTHENTICATED, f"access.coordinator: {access.coordinator}, but this is {coordinator}")
    if abs(access.issued_at - now) > ACCESS_SECONDS:
        text = f"access.issuedAt: more than {ACCESS_SECONDS} s from this coordinator's clock; is the caller's clock right?"
        raise Refusal(Code.UNAUTHENTICATED, text)
    return access.account
