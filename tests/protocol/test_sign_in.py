"""Tests of Sign-In with Ethereum: the text of EIP-4361, and what a server checks of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from eth_account import Account
from eth_account.messages import encode_defunct
from hypothesis import given
from hypothesis import strategies as st

from tallystick.protocol.eip712 import Signer
from tallystick.protocol.errors import BadMessage, BadSignature, Refusal
from tallystick.protocol.sign_in import CHALLENGE_SECONDS, SKEW_SECONDS, SignIn, parse_sign_in, recover_text, text_digest
from tallystick.protocol.signatures import checksum
from tallystick.protocol.types import Address

NOW = 1_700_000_000
KEY = Signer(b"\x07" * 32)
ORIGIN = "https://coordinator.example:8420"
EXAMPLE = """example.com wants you to sign in with your Ethereum account:
0xC02aaA39b223FE8D0A0e5C4F27eAD9083C756Cc2

I accept the ExampleOrg Terms of Service: https://example.com/tos

URI: https://example.com/login
Version: 1
Chain ID: 1
Nonce: 32891756
Issued At: 2021-09-30T16:25:24Z
Resources:
- ipfs://bafybeiemxf5abjwjbikoz4mc3a3dla6ual3jsgpdr4cjr3oz3evfyavhwq/
- https://example.com/my-web2-claim.json"""
"""The example of EIP-4361."""


def message(**changes: object) -> SignIn:
    """A message for ORIGIN that was issued now."""
    plain = SignIn(
        domain="coordinator.example:8420",
        account=KEY.address,
        uri=f"{ORIGIN}/sign-in",
        chain_id=31337,
        nonce="a1B2c3D4e5",
        issued_at=NOW,
    )
    return replace(plain, **changes)  # type: ignore[arg-type]  # any member


def check(signed: SignIn, now: float = NOW) -> None:
    """Checks a message at ORIGIN."""
    signed.check(origin=ORIGIN, chain_id=31337, now=now)


def test_example_of_the_standard() -> None:
    """The example of EIP-4361 is read, and written as it was."""
    read = parse_sign_in(EXAMPLE)

    assert read.domain == "example.com"
    assert read.account == "0xc02aaa39b223fe8d0a0e5c4f27ead9083c756cc2"
    assert read.statement == "I accept the ExampleOrg Terms of Service: https://example.com/tos"
    assert (read.uri, read.chain_id, read.nonce) == ("https://example.com/login", 1, "32891756")
    assert read.issued_at == 1_633_019_124
    assert read.resources == (
        "ipfs://bafybeiemxf5abjwjbikoz4mc3a3dla6ual3jsgpdr4cjr3oz3evfyavhwq/",
        "https://example.com/my-web2-claim.json",
    )
    assert read.to_text() == EXAMPLE


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"scheme": "https"},
        {"statement": "Signs in; spends nothing."},
        {"expires_at": NOW + 60, "not_before": NOW - 60, "request_id": "a%20b"},
        {"request_id": ""},
        {"domain": "[::1]:8420", "uri": "http://[::1]:8420/sign-in"},
        {"resources": ("urn:x:y",), "expires_at": NOW + 1},
    ],
)
def test_what_is_written_is_read(changes: dict[str, object]) -> None:
    """Each optional member survives the text."""
    written = message(**changes)

    assert parse_sign_in(written.to_text()) == written


@given(statement=st.text(max_size=60), request=st.text(max_size=20), resource=st.text(max_size=20), domain=st.text(max_size=20))
def test_no_member_becomes_another(statement: str, request: str, resource: str, domain: str) -> None:
    """Whatever texts a message is built of, either it is refused or it is read with those very members."""
    written = message(statement=statement, request_id=request, resources=(resource,), domain=domain)
    try:
        text = written.to_text()
    except BadMessage:
        return
    assert parse_sign_in(text) == written


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("I accept", "I accept\nURI: https://evil.example", "line 5"),
        ("I accept", "I accept\r", "statement"),
        ("I accept", 'I "accept"', "statement"),
        ("I accept", "I accept\x00", "statement"),
        ("I accept", "I аccept", "ASCII"),  # noqa: RUF001 - a Cyrillic letter
        ("example.com wants", "exаmple.com wants", "ASCII"),  # noqa: RUF001
        ("example.com wants", "user@example.com wants", "line 1"),
        ("example.com wants", " wants", "line 1"),
        ("example.com wants", "example.com/x wants", "line 1"),
        ("0xC02aaA39", "0xc02aaA39", "EIP-55"),
        ("0xC02aaA39", "0XC02aaA39", "line 2"),
        ("Cc2\n\nI", "Cc2\nI", "line 3"),
        ("tos\n\nURI", "tos\nURI", "line 5"),
        ("Version: 1", "Version: 2", "Version"),
        ("Version: 1", "Version: 1 ", "Version"),
        ("Version: 1\n", "", "Version"),
        ("Chain ID: 1", "Chain ID: 0x1", "Chain ID"),
        ("Chain ID: 1", "Chain ID: -1", "Chain ID"),
        ("Chain ID: 1", "Chain ID:  1", "Chain ID"),
        ("Nonce: 32891756", "Nonce: 3289175", "Nonce"),
        ("Nonce: 32891756", "Nonce: 32891756-", "Nonce"),
        ("Nonce: 32891756", "Nonce: 32891756\nNonce: 32891757", "Issued At"),
        ("2021-09-30T16:25:24Z", "2021-09-31T16:25:24Z", "Issued At"),
        ("2021-09-30T16:25:24Z", "2021-09-30 16:25:24Z", "Issued At"),
        ("2021-09-30T16:25:24Z", "2021-09-30T16:25:24", "Issued At"),
        ("2021-09-30T16:25:24Z", "2021-09-30T16:25:60Z", "Issued At"),
        ("Resources:", "Request ID: a b\nResources:", "Request ID"),
        ("Resources:", "Not Before: 2021-09-30T16:25:24Z\nExpiration Time: 2021-09-30T16:25:24Z\nResources:", "no more lines"),
        ("- https://example.com/my-web2-claim.json", "- not a uri", "Resources"),
        ("- https://example.com/my-web2-claim.json", "https://example.com", "Resources"),
        ("my-web2-claim.json", "my-web2-claim.json\n", "Resources"),
        ("https://example.com/login", "/login", "URI"),
        ("https://example.com/login", "https://example.com/%zz", "URI"),
    ],
)
def test_what_the_grammar_forbids(old: str, new: str, named: str) -> None:
    """A text that departs from the ABNF in one place is refused, and the error names the place."""
    assert old in EXAMPLE
    with pytest.raises(BadMessage, match=named):
        parse_sign_in(EXAMPLE.replace(old, new, 1))


@pytest.mark.parametrize("text", ["", "\n" * 20, "a" * 5_000, EXAMPLE.split("\n", maxsplit=1)[0], EXAMPLE + "\n- urn:a" * 20])
def test_hardly_a_message(text: str) -> None:
    """Texts that are no message, or too long, are refused."""
    with pytest.raises(BadMessage):
        parse_sign_in(text)


def test_without_a_statement() -> None:
    """A message without a statement has two empty lines in its place, as the ABNF says."""
    text = message().to_text()

    assert text.split("\n")[2:5] == ["", "", f"URI: {ORIGIN}/sign-in"]
    with pytest.raises(BadMessage, match=r"line 3|statement|line 5"):
        parse_sign_in(text.replace("\n\n\n", "\n\n"))


def test_accepted() -> None:
    """A message for this site, chain and time is accepted, at both ends of its time."""
    signed = message(expires_at=NOW + 100, not_before=NOW)

    check(signed)
    check(signed, NOW + 99)
    check(message(), NOW + CHALLENGE_SECONDS + SKEW_SECONDS)
    check(message(), NOW - SKEW_SECONDS)
    check(message(scheme="https", domain="Coordinator.Example:8420"))


@pytest.mark.parametrize(
    ("changes", "later", "named"),
    [
        ({"domain": "evil.example"}, 0, "domain"),
        ({"domain": "coordinator.example"}, 0, "domain"),
        ({"domain": "coordinator.example:8421"}, 0, "domain"),
        ({"domain": "coordinator.example.evil.example:8420"}, 0, "domain"),
        ({"domain": "xn--cordinator-ppb.example:8420"}, 0, "domain"),
        ({"scheme": "http"}, 0, "scheme"),
        ({"uri": "https://evil.example/sign-in"}, 0, "URI"),
        ({"uri": "http://coordinator.example:8420/sign-in"}, 0, "URI"),
        ({"uri": "https://coordinator.example:8420@evil.example/"}, 0, "URI"),
        ({"uri": "https://user@coordinator.example:8420/"}, 0, "URI"),
        ({"uri": "https://coordinator.example/sign-in"}, 0, "URI"),
        ({"uri": "urn:a:b"}, 0, "URI"),
        ({"uri": "https://[broken/"}, 0, "URI"),
        ({"chain_id": 1}, 0, "Chain ID"),
        ({}, CHALLENGE_SECONDS + SKEW_SECONDS + 1, "Issued At"),
        ({}, -SKEW_SECONDS - 1, "Issued At"),
        ({"expires_at": NOW}, 0, "Expiration Time"),
        ({"not_before": NOW + 1}, 0, "Not Before"),
    ],
)
def test_refused(changes: dict[str, object], later: float, named: str) -> None:
    """A message for another site, chain or time is refused, and the error names the member."""
    with pytest.raises(Refusal, match=f"sign-in: {named}"):
        check(message(**changes), NOW + later)


def test_signatures_of_other_software() -> None:
    """A text is signed as other people's wallets sign it, also by those that count v from 0."""
    text = message().to_text()
    signed = Account.sign_message(encode_defunct(text=text), KEY.secret)
    own = KEY.sign_digest(text_digest(text))

    assert bytes(signed.signature) == own
    assert recover_text(text, own) == KEY.address
    assert recover_text(text, own[:64] + bytes((own[64] - 27,))) == KEY.address


def test_other_forms_of_a_signature() -> None:
    """The second form of a signature (high s), other values of v and other lengths are refused: each has one form."""
    order = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141
    text = message().to_text()
    own = KEY.sign_digest(text_digest(text))
    high = own[:32] + (order - int.from_bytes(own[32:64], "big")).to_bytes(32, "big") + bytes((55 - own[64],))

    for wrong in (high, own[:64], own + b"\x00", own[:64] + b"\x02", own[:64] + b"\x1d", b"", bytes(65)):
        with pytest.raises(BadSignature):
            recover_text(text, wrong)


def test_another_text_has_another_signer() -> None:
    """A signature of one text gives another account for another text."""
    own = KEY.sign_digest(text_digest(message().to_text()))

    assert recover_text(message(nonce="a1B2c3D4e6").to_text(), own) != KEY.address


def test_account_is_written_in_mixed_case() -> None:
    """The account's line is its EIP-55 form, whatever form programs use."""
    assert message().to_text().split("\n")[1] == checksum(Address(KEY.address)) != KEY.address
