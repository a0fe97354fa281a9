"""What `tally node doctor` and `init` say of engines: ready only if a request for one token is answered, and what is wrong."""

from __future__ import annotations

import json
import tomllib
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import Route

from tests.chain.harness import serving
from tests.cli.conftest import Tally
from tests.node.engines.hosted import HOSTED, KEY

ANSWER = {"choices": [{"message": {"content": "hi"}, "finish_reason": "length"}]}
SETTINGS = {
    "max_tokens": 'output_limit_field = "max_completion_tokens"',
    "stream_options": "supports_stream_usage = false",
}
"""By a member that an engine refuses: the setting for it."""


def _engine(refused: str) -> Starlette:
    """An engine that refuses chats with a member."""

    async def models(_request: Request) -> Response:
        return JSONResponse({"data": [{"id": "m"}]})

    async def chat(request: Request) -> Response:
        if refused in await request.json():
            return JSONResponse({"error": {"message": f"Unsupported parameter: {refused}"}}, 400)
        return JSONResponse(ANSWER)

    return Starlette(routes=[Route("/v1/models", models), Route("/v1/chat/completions", chat, methods=["POST"])])


def _diagnosis(tally: Tally, url: str, settings: str = "") -> dict[str, Any]:
    """The finding on the engine."""
    config = tally.home / "doctor.toml"
    config.write_text(f'coordinator = "http://127.0.0.1:1"\nstate = "{tally.home}/state"\n[[engines]]\nurl = "{url}"\n{settings}')
    if not (tally.home / "keys" / "node.json").exists():
        tally.wallet("node")
    _, out, _ = tally.run_main(("node", "doctor", "--wallet", "node", "--config", str(config), "--json"))
    checks: list[dict[str, Any]] = json.loads(out)["checks"]
    return next(check for check in checks if check["check"].startswith("engine"))


@pytest.mark.parametrize("refused", SETTINGS)
def test_doctor_is_not_ready_on_a_400(tally: Tally, refused: str) -> None:
    """An engine that refuses what the node sends is shown with its own words and the setting that mends it."""
    with serving(_engine(refused)) as url:
        finding = _diagnosis(tally, url)
        assert not finding["ok"]
        assert f'status 400: {{"error":{{"message":"Unsupported parameter: {refused}' in finding["found"]
        assert SETTINGS[refused].partition(" ")[0] in finding["found"]
        assert _diagnosis(tally, url, SETTINGS[refused])["ok"]


@pytest.mark.parametrize("refused", SETTINGS)
def test_init_finds_out_what_an_engine_refuses(tally: Tally, url: str, refused: str) -> None:
    """The config that it writes has the setting."""
    with serving(_engine(refused)) as engine:
        out = tally.home / "node.toml"
        tally("node", "init", "--coordinator", url, "--engine", engine, "--out", str(out))
    (written,) = tomllib.loads(out.read_text())["engines"]
    assert tomllib.loads(SETTINGS[refused]).items() <= written.items()


FAULTS = {
    "401": (JSONResponse({}, 401), "refuses the API key"),
    "404": (JSONResponse({}, 404), "correct the base URL"),
    "301": (RedirectResponse("https://elsewhere.example/v1", 301), "redirects to 'https://elsewhere.example/v1'"),
    "503": (JSONResponse({}, 503), "busy or still loads its model"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_an_engine_are_told_apart(tally: Tally, fault: str) -> None:
    """The key, the address, a redirect and a model that loads each need something else to be done."""
    answer, words = FAULTS[fault]
    with serving(answer) as url:
        finding = _diagnosis(tally, url)
    assert not finding["ok"]
    assert words in finding["found"]


def test_nothing_there(tally: Tally) -> None:
    """An engine that is not started is called so."""
    finding = _diagnosis(tally, "http://127.0.0.1:1")
    assert (finding["ok"], "nothing answers at http://127.0.0.1:1" in finding["found"]) == (False, True)


@pytest.mark.parametrize("name", ["Vertex AI", "Azure OpenAI, deployments", "Perplexity"])
def test_an_api_without_a_list_is_ready_if_the_config_names_its_models(tally: Tally, name: str) -> None:
    """Its model is tried out at once; without a name, doctor says what is missing."""
    api = HOSTED[name]
    (tally.home / "token").write_text(KEY)
    settings = f'api_key_file = "{tally.home}/token"\napi_key_header = "{api.header}"\n'
    with serving(api.app()) as url:
        nameless = _diagnosis(tally, url + api.base, settings)
        named = _diagnosis(tally, url + api.base, f'{settings}[[engines.models]]\nname = "{api.model}"\n')
    assert (nameless["ok"], "name the models in the config" in nameless["found"]) == (False, True)
    assert named["ok"], named
