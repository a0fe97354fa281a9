"""Static files: names that change with their contents, and no other files."""

from __future__ import annotations

import httpx
import pytest
from starlette.applications import Starlette
from starlette.routing import Route

from tallystick.web.static_files import STATIC_PATH, serve_static, versioned


def _client() -> httpx.AsyncClient:
    app = Starlette(routes=[Route(f"{STATIC_PATH}/{{name}}", serve_static)])
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")


@pytest.mark.parametrize(("name", "kind"), [("site.css", "text/css"), ("log_proof.js", "text/javascript")])
async def test_a_file(name: str, kind: str) -> None:
    """Browsers may keep it for ever, since its name has a digest of its contents."""
    async with _client() as http:
        answer = await http.get(f"{STATIC_PATH}/{versioned(name)}")
    assert (answer.status_code, answer.headers["content-type"]) == (200, f"{kind}; charset=utf-8")
    assert "immutable" in answer.headers["cache-control"]
    assert len(answer.content) < 50_000


@pytest.mark.parametrize("name", ["site.css", "site.000000000000.css", "__init__.py", "..%2f__init__.py", "%2e%2e", ""])
async def test_other_names(name: str) -> None:
    """Neither former versions nor anything else is found."""
    async with _client() as http:
        assert (await http.get(f"{STATIC_PATH}/{name}")).status_code == 404
