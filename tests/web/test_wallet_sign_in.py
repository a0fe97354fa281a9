"""Sign-in with a wallet, and attacks on it: replays, other sites, chains, times, keys, and floods of challenges."""

from __future__ import annotations

import asyncio
import re
from dataclasses import replace
from typing import Any

import pytest
from starlette.requests import Request

from tallystick.protocol.eip712 import Signer
from tallystick.protocol.errors import BadMessage, Refusal
from tallystick.protocol.sign_in import CHALLENGE_SECONDS, parse_sign_in
from tallystick.protocol.types import Address, Hash
from tallystick.web.sessions import SESSION_SECONDS
from tallystick.web.wallet_sign_in import CHECKS_BURST, CHECKS_PER_SECOND, message_of
from tests.web.sign_in_site import ALICE, CHAIN, MALLORY, NOW, ORIGIN, Site, account_of, challenge, enter, signed

ORDER = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141


def high_s(signature: bytes) -> bytes:
    """The second signature of the same text that anybody can make of one."""
    s = ORDER - int.from_bytes(signature[32:64], "big")
    return signature[:32] + s.to_bytes(32, "big") + bytes((55 - signature[64],))


async def test_a_session() -> None:
    """Who signs the challenge is signed in, until the session is over or closed."""
    site = Site()
    async with site.client() as client:
        assert await account_of(client) is None
        answer = await enter(client)
        assert answer.json() == {"account": ALICE.address, "expiresAt": int(NOW) + SESSION_SECONDS}
        assert await account_of(client) == ALICE.address
        site.clock.seconds += SESSION_SECONDS - 1
        assert await account_of(client) == ALICE.address
        site.clock.seconds += 1
        assert await account_of(client) is None
        await enter(client)
        assert await account_of(client) == ALICE.address
        value = next(iter(client.cookies.values()))
        assert (await client.post("/sign-out")).json() == {"signedOut": True}
        assert await account_of(client) is None
        client.cookies.set("tally_wallet_8420", value)
        assert await account_of(client) is None


async def test_what_is_signed() -> None:
    """The message names the site, the account, the chain, a nonce and its times; the statement says what it is for."""
    async with Site().client() as client:
        message = parse_sign_in(await challenge(client))
    assert (message.domain, message.uri, message.chain_id) == ("localhost:8420", f"{ORIGIN}/sign-in", CHAIN)
    assert (message.account, message.statement) == (ALICE.address, "Sign in to the test.")
    assert (message.issued_at, message.expires_at) == (NOW, NOW + CHALLENGE_SECONDS)
    assert re.fullmatch("[0-9a-f]{66}", message.nonce)


async def test_a_bearer_session() -> None:
    """A program gets a token instead of a cookie; sign-out ends it."""
    async with Site().client() as client:
        answer = await client.post("/sign-in", json=signed(await challenge(client)) | {"bearer": True})
        assert not client.cookies
        bearer = {"authorization": f"Bearer {answer.json()['token']}"}
        assert await account_of(client, **bearer) == ALICE.address
        assert await account_of(client, authorization="Bearer x") is None
        assert await account_of(client, authorization=f"Basic {answer.json()['token']}") is None
        await client.post("/sign-out", headers=bearer)
        assert await account_of(client, **bearer) is None


async def test_replays() -> None:
    """A message opens one session, at once or later, also after that session was closed."""
    site = Site()
    async with site.client() as client:
        body = signed(await challenge(client))
        assert (await client.post("/sign-in", json=body)).status_code == 200
        for _ in range(2):
            answer = await client.post("/sign-in", json=body)
            assert (answer.status_code, "used before" in answer.text) == (401, True)
            await client.post("/sign-out")
        site.clock.seconds += CHALLENGE_SECONDS - 1
        assert (await client.post("/sign-in", json=body)).status_code == 401
        site.clock.seconds += 2
        assert "Expiration Time" in (await client.post("/sign-in", json=body)).text


async def test_parallel_replays() -> None:
    """Of many requests with one message that come at once, one opens a session."""
    async with Site().client() as client:
        body = signed(await challenge(client))
        answers = await asyncio.gather(*(client.post("/sign-in", json=body) for _ in range(20)))
    assert sorted(answer.status_code for answer in answers) == [200, *[401] * 19]


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("localhost:8420 wants", "evil.example wants", "domain"),
        ("localhost:8420 wants", "localhost:8421 wants", "domain"),
        ("URI: http://localhost:8420", "URI: http://evil.example", "URI"),
        ("Chain ID: 31337", "Chain ID: 1", "Chain ID"),
        ("Nonce: 0", "Nonce: 1", "Nonce"),
        ("Issued At: 2023", "Issued At: 2024", "Issued At"),
        ("Issued At: 2023", "Issued At: 2022", "Issued At"),
        ("Expiration Time: 2023", "Expiration Time: 2022", "Expiration Time"),
        ("Sign in to the test.", "Sign in.\nURI: http://evil.example", "line 5"),
        ("localhost:8420 wants", "lоcalhost:8420 wants", "ASCII"),  # noqa: RUF001 - a Cyrillic letter
    ],
)
async def test_other_messages(old: str, new: str, named: str) -> None:
    """A message that was changed before its account signed it is refused, and the error names the member."""
    async with Site().client() as client:
        message = await challenge(client)
        assert old in message
        answer = await client.post("/sign-in", json=signed(message.replace(old, new, 1)))
        assert answer.status_code in {400, 401}
        assert named in answer.json()["error"]["message"]
        assert await account_of(client) is None


async def test_nonces_of_others() -> None:
    """A nonce of another server, one that was made up, and one that is old are refused."""
    site, other = Site(), Site(settings={"key": b"another secret"})
    async with site.client() as client, other.client() as stranger:
        foreign = await challenge(stranger)
        assert "Nonce" in (await client.post("/sign-in", json=signed(foreign))).text
        made = replace(parse_sign_in(await challenge(client)), nonce="a1b2c3d4e5").to_text()
        assert "Nonce" in (await client.post("/sign-in", json=signed(made))).text
        old = parse_sign_in(await challenge(client))
        site.clock.seconds += CHALLENGE_SECONDS + 1
        fresh = replace(old, issued_at=site.clock.seconds, expires_at=None).to_text()
        assert "Nonce: expected one that is at most" in (await client.post("/sign-in", json=signed(fresh))).text


async def test_other_signatures() -> None:
    """Signatures of another key, of another text, in their second form, cut, or no hex are refused."""
    async with Site().client() as client:
        message = await challenge(client)
        wrong = [
            signed(message, MALLORY),
            signed(message, change=high_s),
            signed(message, change=lambda signature: signature[:64]),
            {"message": message, "signature": signed(message.replace("Sign in", "Sign out"))["signature"]},
            *({"message": message, "signature": text} for text in ("", "0x", "0xzz", "x" * 132, None, 5, "0x" + "0" * 130)),
            {"message": 5, "signature": "0x00"},
            signed(message) | {"more": 1},
            signed(message) | {"bearer": "yes"},
        ]
        for body in wrong:
            assert (await client.post("/sign-in", json=body)).status_code in {400, 401}, body
        assert await account_of(client) is None
        assert (await client.post("/sign-in", json=signed(message))).status_code == 200


async def test_a_signature_that_counts_v_from_zero() -> None:
    """Hardware wallets that say 0 or 1 instead of 27 or 28 are understood."""
    async with Site().client() as client:
        message = await challenge(client)
        body = signed(message, change=lambda signature: signature[:64] + bytes((signature[64] - 27,)))
        assert (await client.post("/sign-in", json=body)).status_code == 200


async def test_only_listed_wallets() -> None:
    """Where the config lists wallets, no other one signs in, and one that was taken off the list is out."""
    listed = {ALICE.address}
    site = Site(settings={"may_enter": lambda account: account in listed})
    async with site.client() as client, site.client() as stranger:
        answer = await enter(stranger, MALLORY)
        assert (answer.status_code, "may not sign in" in answer.text) == (401, True)
        await enter(client)
        assert await account_of(client) == ALICE.address
        listed.clear()
        assert await account_of(client) is None


async def test_ten_thousand_open_challenges() -> None:
    """Open challenges take no memory of the server, and put out nobody's."""
    site = Site()
    first = site.sign_in.challenge(ORIGIN, ALICE.address)["message"]
    for _ in range(10_000):
        site.sign_in.challenge(ORIGIN, MALLORY.address)
    signature = bytes.fromhex(signed(first)["signature"][2:])
    value, session = await site.sign_in.sign_in(ORIGIN, first, signature)
    assert (session.account, bool(value)) == (ALICE.address, True)


async def test_smart_accounts() -> None:
    """A contract is asked about the account, the digest and the bytes, once no key explains them; its word counts."""
    asked = list[tuple[Address, bytes]]()
    safe = Signer(b"\x03" * 32).address

    async def check(account: Address, _digest: Hash, signature: bytes) -> bool:
        asked.append((account, signature))
        return signature in {b"\x07" * 130, MALLORY.sign_digest(_digest)}

    async with Site(settings={"check_contract": check}).client() as client:
        message = await challenge(client, safe)
        assert (await client.post("/sign-in", json={"message": message, "signature": "0x" + "08" * 130})).status_code == 401
        assert (await client.post("/sign-in", json={"message": message, "signature": "0x" + "07" * 130})).status_code == 200
        assert await account_of(client) == safe
        owned = await challenge(client, safe)
        assert (await client.post("/sign-in", json=signed(owned, MALLORY))).status_code == 200
        seen = len(asked)
        await enter(client)
        assert len(asked) == seen, "a key's signature needs no chain"
        assert {account for account, _ in asked} == {safe}


async def test_floods_of_unknown_signatures() -> None:
    """Whatever strangers send, the chain is asked at a bounded rate; keys sign in all the while, and smart accounts after it."""
    asked, safe = list[bytes](), Signer(b"\x03" * 32).address

    async def check(_account: Address, _digest: Hash, signature: bytes) -> bool:
        asked.append(signature)
        return signature == b"\x07" * 130

    site = Site(settings={"check_contract": check})
    async with site.client() as client:
        message = await challenge(client, safe)
        bad, good = ({"message": message, "signature": "0x" + two * 130} for two in ("08", "07"))
        answers = [(await client.post("/sign-in", json=bad)).status_code for _ in range(100)]
        assert len(asked) == CHECKS_BURST
        assert answers == [401] * len(asked) + [429] * (100 - len(asked))
        assert (await client.post("/sign-in", json=good)).status_code == 429
        assert (await enter(client)).status_code == 200
        site.clock.seconds += 1 / CHECKS_PER_SECOND
        assert (await client.post("/sign-in", json=good)).status_code == 200
        assert len(asked) == CHECKS_BURST + 1


async def test_origins() -> None:
    """A server that has public addresses is these; another name is refused before anything is signed."""
    site = Site(settings={"origins": ("https://Market.example:443/", "http://10.0.0.5:8420")})
    for origin in ("https://market.example", "https://MARKET.example", "https://market.example.", "http://10.0.0.5:8420"):
        async with site.client(origin) as client:
            assert (await enter(client)).status_code == 200
            assert await account_of(client) == ALICE.address
    loopback = ("http://127.0.0.1:9", "http://[::1]:8420", "http://localhost:9999", "http://a.localhost:1", "http://localhost.:1")
    for origin in ("https://evil.example", "https://market.example:444", "http://10.0.0.6:8420", *loopback):
        async with site.client(origin) as client:
            answer = await client.post("/sign-in/challenge", json={"account": ALICE.address})
            assert (answer.status_code, "Host" in answer.text) == (401, True)


@pytest.mark.parametrize("origins", [(), ("http://127.0.0.1:8420",), ("http://localhost:1", "http://[::1]:2")])
async def test_origins_of_a_local_server(origins: tuple[str, ...]) -> None:
    """A server that no other machine can name is whatever a browser of its machine calls it."""
    site = Site(settings={"origins": origins})
    for origin in ("http://127.0.0.1:9", "http://[::1]:8420", "http://localhost:8420", "http://a.localhost", "http://localhost."):
        async with site.client(origin) as client:
            assert (await enter(client)).status_code == 200, origin
            assert await account_of(client) == ALICE.address
    async with site.client("http://10.0.0.5:8420") as client:
        assert (await client.post("/sign-in/challenge", json={})).status_code == 401


async def test_a_listed_loopback_name() -> None:
    """A server with public addresses goes by a loopback name that its config lists, and by no other."""
    site = Site(settings={"origins": ("https://market.example", "http://localhost:8420")})
    for origin, status in (("http://localhost:8420", 200), ("http://localhost:9999", 401), ("http://127.0.0.1:8420", 401)):
        async with site.client(origin) as client:
            assert (await client.post("/sign-in/challenge", json={"account": ALICE.address})).status_code == status


@pytest.mark.parametrize("host", ["market.example", "market.example:443", "market.example.", "MARKET.example.:443"])
async def test_one_host_in_several_forms(host: str) -> None:
    """A client may write the scheme's own port, the dot of the root domain and capitals, in headers and in the message."""
    site = Site(settings={"origins": ("https://market.example",)})
    async with site.client("https://market.example", host=host) as client:
        client.headers["origin"] = f"https://{host}"
        message = (await challenge(client)).replace("market.example wants", f"{host} wants", 1)
        message = message.replace("https://market.example/", f"https://{host}/", 1)
        answer = await client.post("/sign-in", json=signed(message))
        assert (answer.status_code, answer.json().get("account")) == (200, ALICE.address)


async def test_statements_of_others() -> None:
    """What a person read in the wallet is what this server says, or the signature counts for nothing."""
    async with Site().client() as client:
        for text in ("Sign in to your own node.", "Sign in to the test. Really.", "sign in to the test."):
            message = (await challenge(client)).replace("Sign in to the test.", text)
            answer = await client.post("/sign-in", json=signed(message))
            assert (answer.status_code, "statement" in answer.text) == (401, True)
        without = (await challenge(client)).replace("Sign in to the test.\n", "", 1)
        assert "statement" in (await client.post("/sign-in", json=signed(without))).text


async def test_domains_that_are_none() -> None:
    """A domain that the ABNF allows and no URL has is refused, not an error of the server."""
    async with Site().client() as client:
        for domain in ("[dead]:1", "[::::]", "localhost:99999", "..", "-"):
            message = (await challenge(client)).replace("localhost:8420 wants", f"{domain} wants", 1)
            assert (await client.post("/sign-in", json=signed(message))).status_code in {400, 401}


def test_strange_challenges() -> None:
    """A program that signs here reads what a server sent, and refuses what is no challenge."""
    challenge = Site().sign_in.challenge(ORIGIN, None)
    assert message_of(challenge, ALICE.address).account == ALICE.address
    for name in challenge:
        changed: dict[str, Any] = challenge | {name: None}
        with pytest.raises(BadMessage, match=name):
            message_of(changed, ALICE.address)
    with pytest.raises(BadMessage):
        message_of(challenge | {"statement": "a\nURI: b"}, ALICE.address).to_text()


async def test_a_cookie_of_another_site() -> None:
    """A session is for the site that its message named: its value is worth nothing at another name or port of this server."""
    site = Site()
    async with site.client() as client:
        await enter(client)
        value = next(iter(client.cookies.values()))
    for origin, name in (("http://localhost:8421", "tally_wallet_8421"), ("http://127.0.0.1:8420", "tally_wallet_8420")):
        async with site.client(origin) as thief:
            assert await account_of(thief, cookie=f"{name}={value}") is None
            assert await account_of(thief, authorization=f"Bearer {value}") is None


async def test_origin_of_strange_hosts() -> None:
    """Two Host headers, an empty one, or one that only begins like a known one are no site of this server."""
    site = Site(settings={"origins": ("https://market.example",)})
    for host in ("", "market.example.evil.example", "market.example:8420", "localhost.evil.example"):
        async with site.client() as client:
            answer = await client.post("/sign-in/challenge", json={}, headers={"host": host})
            assert answer.status_code == 401, host
    with pytest.raises(Refusal):
        site.sign_in.origin_of(_request([(b"host", b"market.example"), (b"host", b"market.example")]))


def _request(headers: list[tuple[bytes, bytes]]) -> Request:
    return Request({"type": "http", "method": "GET", "path": "/", "query_string": b"", "headers": headers})
