"""Responses with state through the gateway, over providers that have the route and over those that have not."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from tallystick.client.config import ApiKey, ClientConfig
from tallystick.client.gateway.app import build_app
from tallystick.client.sdk.market import Market
from tallystick.protocol.eip712 import Signer
from tallystick.protocol.messages import Spec
from tallystick.protocol.routes import CHAT, RESPONSES
from tallystick.runtime.serving import serving
from tests.client.fake_coordinator import EVENTS, WORDS, FakeMarket, Session
from tests.client.parties import MODEL, Provider

EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
HI = {"model": MODEL, "input": "hi"}
TEXT = "".join(WORDS)
ENGINE_ITEM = {"id": "msg_1", "type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "native"}]}
ENGINE_RESPONSE = {"id": "resp_1", "object": "response", "status": "completed", "model": "m", "output": [ENGINE_ITEM]}
KEYS = tuple(ApiKey(label=label, secret=f"{label}-0123456789abcdef") for label in ("ann", "bob"))


async def native(session: Session) -> None:
    """An engine with the route, which leaves out what llama.cpp leaves out, and gives each response the same id."""
    await session.match()
    if not session.request.get("stream"):
        await session.answer()
        usage = {"input_tokens": 3, "output_tokens": 1}
        await session.chunk(orjson.dumps(ENGINE_RESPONSE | {"usage": usage}), last=True)
    else:
        await session.answer(200, EVENTS)
        part = {"item_id": "msg_1", "part": {"type": "output_text", "text": ""}}
        done = part | {"part": {"type": "output_text", "text": "native"}}
        events: list[tuple[str, dict[str, Any]]] = [
            ("created", {"response": {"id": "resp_1", "object": "response", "status": "in_progress"}}),
            ("output_item.added", {"item": ENGINE_ITEM | {"content": [], "status": "in_progress"}}),
            ("content_part.added", part),
            ("output_text.delta", {"item_id": "msg_1", "delta": "native"}),
            ("output_text.done", {"item_id": "msg_1", "text": "native"}),
            ("content_part.done", done),
            ("output_item.done", {"item": ENGINE_ITEM}),
            ("completed", {"response": ENGINE_RESPONSE}),
        ]
        for number, (name, members) in enumerate(events):
            data = orjson.dumps({"type": f"response.{name}"} | members)
            await session.chunk(b"data: " + data + b"\n\n", last=number == len(events) - 1)
    await session.finish()


@pytest.fixture(params=["translated", "native"])
def engine(request: pytest.FixtureRequest, fake: FakeMarket) -> str:
    """Whether the providers have the route."""
    if request.param == "native":
        fake.providers = [Provider.make("alice", spec=Spec(features=(RESPONSES,)))]
        fake.script = native
    return str(request.param)


@asynccontextmanager
async def gateway(fake: FakeMarket, wallet: Signer, config: ClientConfig) -> AsyncIterator[httpx.AsyncClient]:
    """A gateway with these settings."""
    async with (
        Market(fake.url, wallet, config) as market,
        serving(build_app(market), "127.0.0.1", 0) as port,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=60) as http,
    ):
        yield http


async def _create(http: httpx.AsyncClient, key: ApiKey | None = None, **members: Any) -> dict[str, Any]:
    headers = {} if key is None else {"authorization": f"Bearer {key.value}"}
    answer = await http.post(RESPONSES, json=HI | members, headers=headers)
    assert answer.status_code == 200, answer.text
    if not members.get("stream"):
        Response.model_validate(answer.json())
        response: dict[str, Any] = answer.json()
        return response
    documents = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: ")]
    for document in documents:
        EVENT.validate_python(document)
    assert [document["sequence_number"] for document in documents] == list(range(len(documents)))
    last: dict[str, Any] = documents[-1]["response"]
    assert documents[0]["response"]["id"] == last["id"]
    return last


def _said(session: Session) -> list[Any]:
    """What the provider was told, as texts."""
    request = session.request
    listed = request["messages"] if session.head.path == CHAT else request["input"]
    contents = [entry["content"] for entry in listed] if isinstance(listed, list) else [listed]
    return [content if isinstance(content, str) else "".join(part["text"] for part in content) for content in contents]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_conversation(engine: str, fake: FakeMarket, wallet: Signer, config: ClientConfig, stream: bool) -> None:
    """Each turn reaches the provider with all turns before it, whoever answered them; ids are the gateway's own."""
    text = TEXT if engine == "translated" else "native"
    async with gateway(fake, wallet, config) as http:
        first = await _create(http, stream=stream, metadata={"a": "b"}, instructions="Be kind.")
        second = await _create(http, stream=stream, input=[{"role": "user", "content": "more"}], previous_response_id=first["id"])
        third = await _create(http, input="last", previous_response_id=second["id"])
        assert len({response["id"] for response in (first, second, third)}) == 3
        assert all(response["output"][0]["content"][0]["text"] == text for response in (first, second, third))
        assert (first["store"], first["metadata"], second["previous_response_id"]) == (True, {"a": "b"}, first["id"])
        assert _said(fake.last) == ["hi", text, "more", text, "last"]
        assert "previous_response_id" not in fake.last.request
        assert "b" not in json.dumps([session.request.get("metadata") for session in fake.sessions.values()])
        assert (await http.get(f"{RESPONSES}/{second['id']}")).json() == second
    async with gateway(fake, wallet, config) as http:  # another process
        await _create(http, input="again", previous_response_id=third["id"])
        assert _said(fake.last)[-3:] == ["last", text, "again"]


async def test_a_conversation_moves_between_providers(fake: FakeMarket, wallet: Signer, config: ClientConfig) -> None:
    """A response of an engine that has the route is continued by one that has not."""
    fake.providers = [Provider.make("alice", spec=Spec(features=(RESPONSES,)))]
    fake.script = native
    async with gateway(fake, wallet, config) as http:
        first = await _create(http)
    plain = FakeMarket()
    async with plain.serve(), gateway(plain, wallet, config) as http:
        await _create(http, input="more", previous_response_id=first["id"])
        assert plain.last.head.path == CHAT
        assert _said(plain.last) == ["hi", "native", "more"]


async def test_items_by_reference(engine: str, fake: FakeMarket, wallet: Signer, config: ClientConfig) -> None:
    """References to items of earlier responses are replaced by the items, of the output as of the input."""
    async with gateway(fake, wallet, config) as http:
        first = await _create(http)
        listed = (await http.get(f"{RESPONSES}/{first['id']}/input_items")).json()["data"]
        references = [{"type": "item_reference", "id": item["id"]} for item in (*listed, *first["output"])]
        await _create(http, input=[*references, {"role": "user", "content": "more"}])
        assert _said(fake.last) == ["hi", TEXT if engine == "translated" else "native", "more"]
        for unknown in ("msg_1", first["output"][0]["id"] + "9", None):
            answer = await http.post(RESPONSES, json=HI | {"input": [{"type": "item_reference", "id": unknown}]})
            error = answer.json()["error"]
            assert (answer.status_code, error["code"], error["param"]) == (404, "previous_response_not_found", "input[0].id")


async def test_the_input_items(fake: FakeMarket, wallet: Signer, config: ClientConfig) -> None:
    """The newest first, in pages."""
    async with gateway(fake, wallet, config) as http:
        first = await _create(http)
        second = await _create(http, input="more", previous_response_id=first["id"])
        address = f"{RESPONSES}/{second['id']}/input_items"
        page = (await http.get(address)).json()
        assert [item["role"] for item in page["data"]] == ["user", "assistant", "user"]
        assert (page["object"], page["has_more"], page["first_id"]) == ("list", False, page["data"][0]["id"])
        ids = [item["id"] for item in page["data"]]
        assert len(set(ids)) == 3
        oldest = (await http.get(address, params={"order": "asc", "limit": 2})).json()
        assert ([item["id"] for item in oldest["data"]], oldest["has_more"]) == ([ids[2], ids[1]], True)
        rest = (await http.get(address, params={"after": ids[1]})).json()
        assert ([item["id"] for item in rest["data"]], rest["last_id"]) == ([ids[2]], ids[2])
        for query in ({"limit": "0"}, {"limit": "101"}, {"limit": "x"}, {"order": "up"}, {"after": "msg_0"}):
            assert (await http.get(address, params=query)).status_code == 400


async def test_delete_and_what_is_not_there(fake: FakeMarket, wallet: Signer, config: ClientConfig) -> None:
    """A deleted response, one that was not stored and one that never was are not found, in OpenAI's words."""
    async with gateway(fake, wallet, config) as http:
        stored, unstored = await _create(http), await _create(http, store=False)
        assert unstored["store"] is False
        deleted = await http.delete(f"{RESPONSES}/{stored['id']}")
        assert deleted.json() == {"id": stored["id"], "object": "response", "deleted": True}
        for gone in (stored["id"], unstored["id"], "resp_" + "0" * 32, "resp_x", "..%2f..%2fetc"):
            for method, address in (("GET", ""), ("DELETE", ""), ("GET", "/input_items"), ("POST", "/cancel")):
                answer = await http.request(method, f"{RESPONSES}/{gone}{address}")
                assert answer.status_code == 404
                assert answer.json()["error"]["type"] == "invalid_request_error" or "%2f" in gone
            answer = await http.post(RESPONSES, json=HI | {"previous_response_id": gone})
            error = answer.json()["error"]
            assert (answer.status_code, error["code"], error["param"]) == (
                404,
                "previous_response_not_found",
                "previous_response_id",
            )
        assert len(fake.sessions) == 2


async def test_what_is_kept_is_bounded_and_secret(fake: FakeMarket, wallet: Signer, config: ClientConfig, tmp_path: Path) -> None:
    """Nobody without the wallet can read a stored response; the oldest goes when there are too many; 0 keeps nothing."""
    folder = tmp_path / "kept"
    async with gateway(fake, wallet, replace(config, responses_folder=folder, responses_count=2)) as http:
        ids = [(await _create(http, input="a secret question"))["id"] for _ in range(3)]
        files = list(folder.iterdir())
        assert len(files) == 2
        assert all(file.stat().st_mode & 0o077 == 0 for file in files)
        contents = b"".join(file.read_bytes() + file.name.encode() for file in files)
        assert b"secret" not in contents
        assert ids[2].encode() not in contents
        statuses = [(await http.get(f"{RESPONSES}/{response_id}")).status_code for response_id in ids]
        assert statuses == [404, 200, 200]
        for file in files:
            sealed = file.read_bytes()
            file.write_bytes(bytes((sealed[0] ^ 1,)) + sealed[1:])
        assert (await http.get(f"{RESPONSES}/{ids[2]}")).status_code == 404
    async with gateway(fake, wallet, replace(config, responses_folder=folder, responses_mib=0)) as http:
        response = await _create(http)
        assert response["store"] is False
        answer = await http.post(RESPONSES, json=HI | {"previous_response_id": response["id"]})
        assert answer.status_code == 404
        assert "responses_mib" in answer.json()["error"]["message"]


async def test_a_key_sees_its_own_responses(fake: FakeMarket, wallet: Signer, config: ClientConfig) -> None:
    """Another key neither reads, continues, refers to nor deletes a response."""
    ann, bob = KEYS
    async with gateway(fake, wallet, replace(config, api_keys=KEYS)) as http:
        response = await _create(http, ann)
        address, stranger = f"{RESPONSES}/{response['id']}", {"authorization": f"Bearer {bob.value}"}
        assert (await http.get(address, headers=stranger)).status_code == 404
        assert (await http.delete(address, headers=stranger)).status_code == 404
        for members in (
            {"previous_response_id": response["id"]},
            {"input": [{"type": "item_reference", "id": response["output"][0]["id"]}]},
        ):
            assert (await http.post(RESPONSES, json=HI | members, headers=stranger)).status_code == 404
        assert (await http.get(address)).status_code == 401
        await _create(http, ann, previous_response_id=response["id"])


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ({"background": True}, "background"),
        ({"conversation": {"id": "conv"}}, "conversation"),
        ({"store": "yes"}, "store"),
        ({"previous_response_id": 7}, "previous_response_id"),
        ({"input": {"role": "user"}}, "input"),
        ({"tools": [{"type": "web_search"}]}, "web_search"),
    ],
)
async def test_what_is_refused(
    fake: FakeMarket, wallet: Signer, config: ClientConfig, members: dict[str, Any], words: str
) -> None:
    """What nobody could answer is refused with the member's name, and nothing is ordered."""
    async with gateway(fake, wallet, config) as http:
        answer = await http.post(RESPONSES, json=HI | members)
        assert answer.status_code == 400
        assert words in answer.json()["error"]["message"]
        assert not fake.sessions


async def test_routes_of_background_work(fake: FakeMarket, wallet: Signer, config: ClientConfig) -> None:
    """Cancelling or streaming a stored response again is refused, because it has ended."""
    async with gateway(fake, wallet, config) as http:
        response = await _create(http)
        address = f"{RESPONSES}/{response['id']}"
        assert (await http.post(f"{address}/cancel")).status_code == 400
        assert (await http.get(address, params={"stream": "true"})).status_code == 400


async def test_a_conversation_that_grew_too_long(fake: FakeMarket, wallet: Signer, config: ClientConfig) -> None:
    """The limit on bodies counts the conversation too."""
    async with gateway(fake, wallet, replace(config, max_body_bytes=1_000)) as http:
        first = await _create(http, input="x" * 800)
        answer = await http.post(RESPONSES, json=HI | {"input": "y" * 300, "previous_response_id": first["id"]})
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")


async def test_a_failed_answer_is_not_stored(fake: FakeMarket, wallet: Signer, config: ClientConfig) -> None:
    """An engine's own error reaches the caller as it is."""
    fake.providers = [Provider.make("alice", spec=Spec(features=(RESPONSES,)))]

    async def refuse(session: Session) -> None:
        await session.match()
        await session.answer(400)
        await session.chunk(b'{"error":{"message":"no such tool"}}', last=True)
        await session.finish()

    fake.script = refuse
    async with gateway(fake, wallet, config) as http:
        answer = await http.post(RESPONSES, json=HI)
        assert (answer.status_code, answer.json()) == (400, {"error": {"message": "no such tool"}})
        assert not config.responses_path(wallet.address).exists()


async def test_a_cached_response_is_continued(fake: FakeMarket, wallet: Signer, config: ClientConfig, tmp_path: Path) -> None:
    """A response from the cache is stored like any other."""
    async with gateway(fake, wallet, replace(config, cache_folder=tmp_path / "cache")) as http:
        for stream in (False, True):
            first = await _create(http, temperature=0, stream=stream)
            await http.delete(f"{RESPONSES}/{first['id']}")
            jobs = len(fake.sessions)
            again = await _create(http, temperature=0, stream=stream)
            assert len(fake.sessions) == jobs
            await _create(http, input="more", previous_response_id=again["id"])
            assert _said(fake.last) == ["hi", TEXT, "more"]
