"""A site of one page with sign-in by wallet, for tests: its routes in a Starlette app, a clock, and a wallet that signs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tallystick.protocol.eip712 import Signer
from tallystick.protocol.sign_in import text_digest
from tallystick.web.rendering import Pages
from tallystick.web.sign_in_routes import SignInRoutes
from tallystick.web.static_files import STATIC_PATH, serve_static
from tallystick.web.wallet_sign_in import WalletSignIn

ALICE, MALLORY = Signer(b"\x01" * 32), Signer(b"\x02" * 32)
ORIGIN, CHAIN = "http://localhost:8420", 31337
NOW = 1_700_000_000.0


@dataclass
class Clock:
    """Unix time that only the test moves."""

    seconds: float = NOW

    def now(self) -> float:
        return self.seconds


@dataclass
class Site:
    """The site, and programs that talk to it."""

    clock: Clock = field(default_factory=Clock)
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        values: dict[str, Any] = {"origins": (), "chain_id": CHAIN, "key": b"secret", "statement": "Sign in to the test."}
        self.sign_in = WalletSignIn(**(values | self.settings), now=self.clock.now)
        pages = Pages(Path(), product="Test", sections={"/mine": "Mine"})
        routes = SignInRoutes(self.sign_in, pages, targets=("/mine", "/other"), notice="See what is yours.")

        async def mine(request: Request) -> Response:
            session = await self.sign_in.session_of(request)
            return JSONResponse({"account": None if session is None else session.account})

        self.app = Starlette(routes=[*routes.routes(), Route("/mine", mine), Route(f"{STATIC_PATH}/{{name}}", serve_static)])

    def client(self, origin: str = ORIGIN, **headers: str) -> httpx.AsyncClient:
        """A program that keeps cookies."""
        return httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url=origin, headers=headers)


async def challenge(client: httpx.AsyncClient, account: str = ALICE.address) -> str:
    """Asks for a message to sign."""
    answer = await client.post("/sign-in/challenge", json={"account": account})
    assert answer.status_code == 200, answer.text
    return str(answer.json()["message"])


def signed(message: str, key: Signer = ALICE, change: Callable[[bytes], bytes] = bytes) -> dict[str, Any]:
    """The body that signs in with a message."""
    return {"message": message, "signature": "0x" + change(key.sign_digest(text_digest(message))).hex()}


async def enter(client: httpx.AsyncClient, key: Signer = ALICE) -> httpx.Response:
    """Signs in."""
    return await client.post("/sign-in", json=signed(await challenge(client, key.address), key))


async def account_of(client: httpx.AsyncClient, **headers: str) -> str | None:
    """The account that the site takes the client for."""
    account: str | None = (await client.get("/mine", headers=headers)).json()["account"]
    return account
