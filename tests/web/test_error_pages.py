"""Errors for people: a browser's navigation gets a page, whoever else asks gets the answer as it is."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from tallystick.web.error_pages import MAX_SHOWN, TITLES, ErrorPages
from tallystick.web.rendering import HEADERS, Pages

BROWSER = {"accept": "text/html,application/xhtml+xml,*/*;q=0.8"}
HOSTILE = "<script>alert(1)</script>"
PAGES = Pages(Path(__file__).parent, product="A daemon", sections={"/market": "Models", "/wallet": "Wallet"})


async def _answer(request: Request) -> Response:
    status = int(request.path_params["status"])
    forms: dict[str, Callable[[], Response]] = {
        "openai": lambda: JSONResponse({"error": {"message": HOSTILE, "code": "x"}}, status, {"retry-after": "7"}),
        "plain": lambda: PlainTextResponse(HOSTILE, status),
        "short": lambda: JSONResponse({"error": "too late"}, status),
        "other": lambda: JSONResponse([1], status),
        "long": lambda: StreamingResponse((b"x" * 1_000 for _ in range(100)), status, media_type="text/plain"),
        "html": lambda: HTMLResponse("its own page", status),
        "health": lambda: Response(b"{}", status, media_type="application/health+json"),
    }
    return forms[request.query_params.get("form", "openai")]()


@pytest.fixture
async def http() -> AsyncIterator[httpx.AsyncClient]:
    """A client of an app whose routes answer with any status and form."""
    app = ErrorPages(Starlette(routes=[Route("/{status}", _answer, methods=["GET", "POST"])]), PAGES)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        yield client


@pytest.mark.parametrize("status", [*TITLES, 418, 500])
@pytest.mark.parametrize("form", ["openai", "plain"])
async def test_a_browser_gets_a_page(http: httpx.AsyncClient, status: int, form: str) -> None:
    """It has the status and the text of the error, escaped, and links to what there is; headers such as retry-after stay."""
    for method in ("GET", "POST"):
        answer = await http.request(method, f"/{status}", params={"form": form}, headers=BROWSER)
        assert answer.status_code == status
        assert answer.headers["content-type"] == "text/html; charset=utf-8"
        assert answer.headers["content-security-policy"] == HEADERS["content-security-policy"]
        assert answer.headers.get("retry-after") == ("7" if form == "openai" else None)
        assert "&lt;script&gt;alert(1)" in answer.text
        assert HOSTILE not in answer.text
        assert 'href="/wallet"' in answer.text
        assert TITLES.get(status, "That did not work") in answer.text


async def test_programs_get_what_they_got_before(http: httpx.AsyncClient) -> None:
    """JSON and plain text stay as they are for whoever does not ask for a page."""
    for headers in ({}, {"accept": "*/*"}, {"accept": "application/json"}):
        answer = await http.get("/404", headers=headers)
        assert (answer.status_code, answer.json()["error"]["message"]) == (404, HOSTILE)
        assert (await http.get("/403", params={"form": "plain"}, headers=headers)).text == HOSTILE
    assert (await http.head("/404", headers=BROWSER)).content == b""
    java = {"accept": "text/html, image/gif, image/jpeg, *; q=.2, */*; q=.2"}
    assert (await http.post("/404", json={}, headers=java)).json()["error"]["message"] == HOSTILE


async def test_what_is_no_error_for_people_stays(http: httpx.AsyncClient) -> None:
    """Answers without an error, pages of a daemon's own, and the state of its health are shown as they are."""
    assert (await http.get("/200", headers=BROWSER)).json()["error"]["code"] == "x"
    assert (await http.get("/404", params={"form": "html"}, headers=BROWSER)).text == "its own page"
    assert (await http.get("/503", params={"form": "health"}, headers=BROWSER)).text == "{}"


async def test_other_forms_of_errors(http: httpx.AsyncClient) -> None:
    """An error that is text alone is shown so, any other document as it is, and of a long one the beginning."""
    assert ">too late<" in (await http.get("/400", params={"form": "short"}, headers=BROWSER)).text
    assert ">[1]<" in (await http.get("/400", params={"form": "other"}, headers=BROWSER)).text
    page = (await http.get("/400", params={"form": "long"}, headers=BROWSER)).text
    assert page.count("x" * MAX_SHOWN) == 1
    assert "x" * (MAX_SHOWN + 1) not in page


async def test_an_unknown_path_and_a_wrong_method(http: httpx.AsyncClient) -> None:
    """What the framework itself refuses is a page too, which keeps the methods that are allowed."""
    assert TITLES[404] in (await http.get("/no/such", headers=BROWSER)).text
    only_get = ErrorPages(Starlette(routes=[Route("/", lambda _: Response())]), PAGES)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(only_get), base_url="http://test") as client:
        answer = await client.post("/", headers=BROWSER)
    assert (answer.status_code, set(answer.headers["allow"].split(", "))) == (405, {"GET", "HEAD"})  # in any order
    assert TITLES[405] in answer.text
