"""Sign-In with Ethereum: the text that an account signs to prove to a server that it is there. Pure.

The text, its members and what a server must check are those of EIP-4361 (https://eips.ethereum.org/EIPS/eip-4361); it is signed
as EIP-191 says (personal_sign). A reader takes nothing but what the ABNF allows: a statement with a line break, for example,
could show a person other members than those that count.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from urllib.parse import urlsplit

from tallystick.protocol.codecs import keccak
from tallystick.protocol.errors import BadMessage, BadSignature, Code, Refusal
from tallystick.protocol.origins import read_origin, same_host
from tallystick.protocol.signatures import SIGNATURE, checksum, recover
from tallystick.protocol.types import Address, Hash

MAX_MESSAGE = 4_096
"""Characters of a message. All are ASCII."""
MAX_RESOURCES = 16
CHALLENGE_SECONDS = 300
"""How long a message may be used after it was issued."""
SKEW_SECONDS = 60
"""How far the signer's clock may be ahead."""
_WANTS = " wants you to sign in with your Ethereum account:"
_SCHEME = r"[A-Za-z][A-Za-z0-9+.-]*"
_HOST = r"(?:[A-Za-z0-9._-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\])(?::[0-9]{1,5})?"
_URI = rf"{_SCHEME}:(?:[A-Za-z0-9._~:/?#\[\]@!$&'()*+,;=-]|%[0-9A-Fa-f]{{2}})*"
_TIME = r"[0-9]{4}-[0-9]{2}-[0-9]{2}[Tt][0-9]{2}:[0-9]{2}:[0-9]{2}(?:\.[0-9]{1,9})?(?:[Zz]|[+-][0-9]{2}:[0-9]{2})"
_STATEMENT = re.compile(r"[A-Za-z0-9._~:/?#\[\]@!$&'()*+,;= -]+")
_FIRST = re.compile(rf"(?:({_SCHEME})://)?({_HOST}){re.escape(_WANTS)}")
_MEMBERS = {
    "URI": re.compile(_URI),
    "Version": re.compile("1"),
    "Chain ID": re.compile("[0-9]{1,18}"),
    "Nonce": re.compile("[A-Za-z0-9]{8,128}"),
    "Issued At": re.compile(_TIME),
}
_OPTIONAL = {
    "Expiration Time": re.compile(_TIME),
    "Not Before": re.compile(_TIME),
    "Request ID": re.compile(r"(?:[A-Za-z0-9._~:@!$&'()*+,;=-]|%[0-9A-Fa-f]{2})*"),
}
_EXPECTED = {
    "URI": "a URI (RFC 3986)",
    "Version": "1",
    "Chain ID": "a decimal number",
    "Nonce": "at least 8 letters and digits",
    "Request ID": "characters of a path (RFC 3986)",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SignIn:
    """The members of a message. Times are Unix seconds; `domain` is a host, with a port unless it is the scheme's own."""

    domain: str
    account: Address
    uri: str
    chain_id: int
    nonce: str
    issued_at: float
    scheme: str = ""
    statement: str = ""
    expires_at: float | None = None
    not_before: float | None = None
    request_id: str | None = None
    resources: tuple[str, ...] = ()

    def to_text(self) -> str:
        """The text to sign. Raises BadMessage if a member has what the ABNF does not allow."""
        scheme = f"{self.scheme}://" if self.scheme else ""
        lines = [f"{scheme}{self.domain}{_WANTS}", checksum(self.account), ""]
        lines += [self.statement, ""] if self.statement else [""]
        lines += [f"URI: {self.uri}", "Version: 1", f"Chain ID: {self.chain_id}", f"Nonce: {self.nonce}"]
        lines.append(f"Issued At: {_write_time(self.issued_at)}")
        if self.expires_at is not None:
            lines.append(f"Expiration Time: {_write_time(self.expires_at)}")
        if self.not_before is not None:
            lines.append(f"Not Before: {_write_time(self.not_before)}")
        if self.request_id is not None:
            lines.append(f"Request ID: {self.request_id}")
        if self.resources:
            lines += ["Resources:", *(f"- {resource}" for resource in self.resources)]
        text = "\n".join(lines)
        if parse_sign_in(text) != self:
            raise BadMessage("sign-in: expected times in whole seconds, and members without line breaks")
        return text

    def check(self, *, origin: str, chain_id: int, now: float) -> None:
        """Checks that the message is for the server at `origin`, such as https://coordinator.example, and of this time.

        Raises Refusal (unauthenticated) that names the member. The nonce is for the server to check.
        """
        scheme, _, host = origin.partition("://")
        if same_host(scheme, self.domain) != host:
            raise _refusal(f"domain: expected {host}, got {self.domain}: this message is for another site")
        if self.scheme and self.scheme.lower() != scheme:
            raise _refusal(f"scheme: expected {scheme}, got {self.scheme}")
        if _origin_of(self.uri) != origin:
            raise _refusal(f"URI: expected an address below {origin}, got {self.uri[:200]}")
        if self.chain_id != chain_id:
            raise _refusal(f"Chain ID: expected {chain_id}, got {self.chain_id}; sign a new message for this chain")
        if self.issued_at > now + SKEW_SECONDS:
            raise _refusal(f"Issued At: {self.issued_at - now:.0f} s ahead of this server's clock; check the signer's clock")
        if self.issued_at < now - CHALLENGE_SECONDS - SKEW_SECONDS:
            raise _refusal(f"Issued At: expected at most {CHALLENGE_SECONDS} s ago, got {now - self.issued_at:.0f} s ago")
        if self.expires_at is not None and now >= self.expires_at:
            raise _refusal(f"Expiration Time: passed {now - self.expires_at:.0f} s ago; sign a new message")
        if self.not_before is not None and now < self.not_before:
            raise _refusal(f"Not Before: the message is valid in {self.not_before - now:.0f} s")


def parse_sign_in(text: str) -> SignIn:
    """Reads a message. Raises BadMessage that names the member for whatever the ABNF of EIP-4361 does not allow."""
    if len(text) > MAX_MESSAGE or not text.isascii():
        raise BadMessage(f"sign-in: expected at most {MAX_MESSAGE} ASCII characters; a name in other letters is in its xn-- form")
    lines = text.split("\n")
    first = _FIRST.fullmatch(lines[0])
    if first is None:
        raise BadMessage(f"sign-in: line 1: expected DOMAIN{_WANTS}")
    account = _read_account(lines[1] if len(lines) > 1 else "")
    statement, at = _read_statement(lines)
    values: dict[str, str] = {}
    for name, pattern in _MEMBERS.items():
        values[name] = _read_member(lines[at] if at < len(lines) else "", name, pattern)
        at += 1
    for name, pattern in _OPTIONAL.items():
        if at < len(lines) and lines[at].startswith(f"{name}:"):
            values[name] = _read_member(lines[at], name, pattern)
            at += 1
    expires, before = values.get("Expiration Time"), values.get("Not Before")
    return SignIn(
        domain=first[2],
        scheme=first[1] or "",
        account=account,
        statement=statement,
        uri=values["URI"],
        chain_id=int(values["Chain ID"]),
        nonce=values["Nonce"],
        issued_at=_read_time(values["Issued At"], "Issued At"),
        expires_at=None if expires is None else _read_time(expires, "Expiration Time"),
        not_before=None if before is None else _read_time(before, "Not Before"),
        request_id=values.get("Request ID"),
        resources=_read_resources(lines[at:]),
    )


def text_digest(text: str) -> Hash:
    """The digest of a text that an account signs (EIP-191, version 0x45)."""
    data = text.encode()
    return keccak(b"\x19Ethereum Signed Message:\n%d%b" % (len(data), data))


def recover_text(text: str, signature: bytes) -> Address:
    """The account whose key signed a text. Wallets that count v from 0 are understood. Raises BadSignature."""
    if len(signature) != SIGNATURE:
        raise BadSignature(f"signature: expected {SIGNATURE} bytes r, s and v, got {len(signature)}")
    v = signature[64]
    return recover(text_digest(text), signature[:64] + bytes((v + 27 if v < 2 else v,)))


def _refusal(text: str) -> Refusal:
    return Refusal(Code.UNAUTHENTICATED, f"sign-in: {text}")


def _read_account(line: str) -> Address:
    if not re.fullmatch("0x[0-9a-fA-F]{40}", line):
        raise BadMessage("sign-in: line 2: expected an account, 0x and 40 hex digits")
    if checksum(line) != line:
        raise BadMessage(f"sign-in: line 2: expected the account in EIP-55 mixed case, {checksum(line)}")
    return Address(line.lower())


def _read_statement(lines: list[str]) -> tuple[str, int]:
    """Returns the statement, and the number of the line after it and its empty lines."""
    if len(lines) < 5 or lines[2]:
        raise BadMessage("sign-in: line 3: expected an empty line")
    if not lines[3]:
        return "", 4
    if not _STATEMENT.fullmatch(lines[3]):
        raise BadMessage("sign-in: statement: expected letters, digits, spaces and punctuation of RFC 3986")
    if lines[4]:
        raise BadMessage("sign-in: line 5: expected an empty line after the statement")
    return lines[3], 5


def _read_member(line: str, name: str, pattern: re.Pattern[str]) -> str:
    start = f"{name}: "
    if not line.startswith(start):
        raise BadMessage(f"sign-in: {name}: expected a line that begins with '{start}'")
    if not pattern.fullmatch(value := line[len(start) :]):
        raise BadMessage(f"sign-in: {name}: expected {_EXPECTED.get(name, 'a time (RFC 3339)')}, got {value[:100]!r}")
    return value


def _read_resources(lines: list[str]) -> tuple[str, ...]:
    if not lines:
        return ()
    if lines[0] != "Resources:":
        raise BadMessage(f"sign-in: expected no more lines, or Resources:, got {lines[0][:100]!r}")
    resources = [_read_resource(line) for line in lines[1:]]
    if not 0 < len(resources) <= MAX_RESOURCES:
        raise BadMessage(f"sign-in: Resources: expected 1 to {MAX_RESOURCES}, got {len(resources)}")
    return tuple(resources)


def _read_resource(line: str) -> str:
    if not line.startswith("- ") or not _MEMBERS["URI"].fullmatch(line[2:]):
        raise BadMessage(f"sign-in: Resources: expected '- ' and a URI (RFC 3986), got {line[:100]!r}")
    return line[2:]


def _read_time(text: str, name: str) -> float:
    try:
        return datetime.fromisoformat(text.upper()).timestamp()
    except (ValueError, OverflowError):
        raise BadMessage(f"sign-in: {name}: expected a time that exists, got {text!r}") from None


def _write_time(seconds: float) -> str:
    try:
        return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    except (ValueError, OverflowError, OSError):
        raise BadMessage(f"sign-in: expected a Unix time, got {seconds}") from None


def _origin_of(uri: str) -> str:
    """Scheme, host and port of a URI; empty if it has a user name, or none of these."""
    try:
        parts = urlsplit(uri)
    except ValueError:
        return ""
    return read_origin(uri) if parts.netloc and "@" not in parts.netloc else ""
