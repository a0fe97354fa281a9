"""Authentication at a coordinator's HTTP API: a signed `Access` message in the Authorization header. Pure.

The header is `Authorization: Tally TOKEN`, where TOKEN is the signed message's JSON in base64url without padding. A token names
one coordinator, which cannot use it at another. It is accepted for a few minutes.
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
"""The most seconds between `issued_at` and the coordinator's clock, in either direction."""
MAX_TOKEN = 2_048


def dump_access(signed: Signed[Access] | Verified[Access]) -> str:
    """The value of the Authorization header."""
    return f"{SCHEME} {base64.urlsafe_b64encode(dumps(signed.to_json())).decode().rstrip('=')}"


def load_access(header: str | None, domain: Domain, coordinator: Address, now: float) -> Address:
    """The account that signed the header's token. `now` is in Unix seconds.

    Raises Refusal (unauthenticated) without a token, or for one of another coordinator or another time. Raises BadMessage for a
    malformed token and BadSignature for a forged one.
    """
    scheme, _, token = (header or "").partition(" ")
    if scheme != SCHEME or not token:
        raise Refusal(Code.UNAUTHENTICATED, f"expected a signed access token: Authorization: {SCHEME} TOKEN")
    if len(token) > MAX_TOKEN:
        raise BadMessage(f"access: expected a token of at most {MAX_TOKEN} characters")
    try:
        raw = base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        raise BadMessage("access: expected base64url") from None
    access = read_signed(Access, loads(raw, "access"), "access").verify(domain).message
    if access.coordinator != coordinator:
        raise Refusal(Code.UNAUTHENTICATED, f"access.coordinator: expected {coordinator}, got {access.coordinator}")
    if abs(access.issued_at - now) > ACCESS_SECONDS:
        text = f"access.issuedAt: expected at most {ACCESS_SECONDS} s from this coordinator's clock; check the caller's clock"
        raise Refusal(Code.UNAUTHENTICATED, text)
    return access.account
