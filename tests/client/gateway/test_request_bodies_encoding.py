"""Encoded request bodies at the gateway: every coding reaches the engine decoded, and the limits hold for what they decode to."""

from __future__ import annotations

import asyncio
import gzip
import json
import sys
import zlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import brotli
import httpx
import pytest
from starlette.types import Message

from tallystick.client.config import ClientConfig
from tallystick.client.gateway.app import build_app
from tallystick.client.gateway.request_bodies import RequestBodies
from tallystick.client.sdk.market import Market
from tallystick.protocol.eip712 import Signer
from tallystick.protocol.errors import BadMessage, Refusal, TallyError, Unavailable
from tallystick.runtime.serving import serving
from tests.client.fake_coordinator import BODY, CHAT, FakeMarket

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

ENCODERS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "X-GZIP": gzip.compress,
    "deflate": zlib.compress,
    "br": brotli.compress,
    "zstd": zstd.compress,
    "identity": bytes,
    "gzip, zstd": lambda body: zstd.compress(gzip.compress(body)),
}


@asynccontextmanager
async def gateway(fake: FakeMarket, wallet: Signer, config: ClientConfig) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a gateway with these settings."""
    async with (
        Market(fake.url, wallet, config) as market,
        serving(build_app(market), "127.0.0.1", 0) as port,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as http,
    ):
        yield http


async def _post(http: httpx.AsyncClient, body: bytes, coding: str, **headers: str) -> httpx.Response:
    return await http.post(CHAT, content=body, headers={"content-encoding": coding, **headers})


async def test_each_coding_reaches_the_engine_decoded(fake: FakeMarket, wallet: Signer, config: ClientConfig) -> None:
    """Whatever its coding, the engine gets the bytes that were encoded."""
    plain = json.dumps(BODY | {"user": "ä" * 2_000}).encode()
    async with gateway(fake, wallet, config) as http:
        for coding, encode in ENCODERS.items():
            assert (await _post(http, encode(plain), coding)).status_code == 200
            assert fake.last.body == plain


async def test_a_coding_changes_neither_key_nor_cache(
    fake: FakeMarket, wallet: Signer, config: ClientConfig, tmp_path: Path
) -> None:
    """An idempotency key and the response cache see the decoded body, so that a request is the same in every coding."""
    cold = json.dumps(BODY | {"temperature": 0}).encode()
    async with gateway(fake, wallet, replace(config, cache_folder=tmp_path / "cache")) as http:
        cached = [(await _post(http, encode(cold), coding)).headers["x-tally-cache"] for coding, encode in ENCODERS.items()]
        assert cached == ["miss"] + ["hit"] * (len(ENCODERS) - 1)
        keyed = [await _post(http, encode(cold), coding, **{"idempotency-key": "k"}) for coding, encode in ENCODERS.items()]
    assert [answer.status_code for answer in keyed] == [200] + [409] * (len(ENCODERS) - 1)
    assert all("no longer has its answer" in answer.text for answer in keyed[1:]), "each is known as the same request"


@pytest.mark.parametrize("coding", ["gzip", "deflate", "br", "zstd"])
async def test_bodies_that_do_not_decode(fake: FakeMarket, wallet: Signer, config: ClientConfig, coding: str) -> None:
    """A body that is cut off or not encoded at all is a 400 that names the coding and the header."""
    plain = json.dumps(BODY).encode()
    async with gateway(fake, wallet, config) as http:
        for body in (plain, ENCODERS[coding](plain)[:-3]):
            answer = await _post(http, body, coding)
            assert (answer.status_code, answer.json()["error"]["code"]) == (400, "bad_message")
            assert coding in answer.json()["error"]["message"]
            assert "Content-Encoding" in answer.json()["error"]["message"]
    assert fake.submissions == []


async def test_unknown_codings(fake: FakeMarket, wallet: Signer, config: ClientConfig) -> None:
    """An unknown coding is a 415 that names it, and lists the known ones in the text and in Accept-Encoding."""
    async with gateway(fake, wallet, config) as http:
        for coding in ("lz4", "gzip, compress"):
            answer = await _post(http, b"x", coding)
            assert (answer.status_code, answer.json()["error"]["code"]) == (415, "unsupported_encoding")
            assert answer.headers["accept-encoding"] == "gzip, deflate, br, zstd"
            assert "gzip, deflate, br, zstd" in answer.json()["error"]["message"]
            assert coding.split()[-1] in answer.json()["error"]["message"]
        assert (await _post(http, json.dumps(BODY).encode(), "")).status_code == 200


@pytest.mark.parametrize("coding", ["gzip", "deflate", "br", "zstd", "gzip, zstd"])
async def test_a_bomb_is_too_large(fake: FakeMarket, wallet: Signer, config: ClientConfig, coding: str) -> None:
    """A small body that decodes to more than max_body_bytes is a 413, and the gateway goes on."""
    async with gateway(fake, wallet, replace(config, max_body_bytes=100_000)) as http:
        body = ENCODERS[coding](bytes(10_000_000))
        assert len(body) < 100_000
        answer = await _post(http, body, coding)
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")
        assert "max_body_bytes" in answer.text
        assert (await _post(http, ENCODERS[coding](json.dumps(BODY).encode()), coding)).status_code == 200


def _receive(body: bytes) -> Callable[[], Any]:
    async def receive() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    return receive


async def test_the_decoded_bytes_count() -> None:
    """A decoded body counts with its decoded size until its request is over; failed decoding counts for nothing afterwards."""
    bodies = RequestBodies(100_000, 150_000)
    async with bodies.read(_receive(gzip.compress(bytes(100_000))), ["gzip"]) as body:
        assert body == bytes(100_000)
        assert bodies.held == 100_000
        with pytest.raises(Unavailable, match="max_total_body_bytes"):
            async with bodies.read(_receive(gzip.compress(bytes(60_000))), ["gzip"]):
                raise AssertionError("read")
        assert bodies.held == 100_000
    refused: list[tuple[bytes, type[TallyError]]] = [(gzip.compress(bytes(100_001)), Refusal), (b"junk", BadMessage)]
    for encoded, error in refused:
        with pytest.raises(error):
            async with bodies.read(_receive(encoded), ["gzip"]):
                raise AssertionError("read")
        assert bodies.held == 0


async def test_many_are_decoded_at_once() -> None:
    """Bodies that arrive together are all decoded, a few at a time."""
    bodies = RequestBodies(1_000_000, 100_000_000)

    async def read(size: int) -> int:
        async with bodies.read(_receive(gzip.compress(bytes(size))), ["gzip"]) as body:
            return len(body or b"")

    sizes = [size * 20_000 for size in range(1, 30)]
    assert await asyncio.gather(*map(read, sizes)) == sizes
    assert bodies.held == 0


async def test_byte_order_marks(fake: FakeMarket, wallet: Signer, config: ClientConfig) -> None:
    """A UTF-8 byte order mark is removed, with a coding too; other encodings of Unicode are refused by name."""
    plain = json.dumps(BODY | {"user": "ä"}, ensure_ascii=False)
    async with gateway(fake, wallet, config) as http:
        for body, headers in (
            (plain.encode("utf-8-sig"), {}),
            (gzip.compress(plain.encode("utf-8-sig")), {"content-encoding": "gzip"}),
        ):
            assert (await http.post(CHAT, content=body, headers=headers)).status_code == 200
            assert fake.last.body == plain.encode()
        submitted = len(fake.submissions)
        for encoding in ("utf-16", "utf-16-le", "utf-16-be", "utf-32"):
            answer = await http.post(CHAT, content=plain.encode(encoding))
            assert answer.status_code == 400
            assert "UTF-8" in answer.json()["error"]["message"]
        assert len(fake.submissions) == submitted
