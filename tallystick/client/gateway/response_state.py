"""Responses with state: keeps conversations on this machine, so that the next turn may go to any provider.

A request that continues a response (`previous_response_id`) or names items of earlier ones is expanded to the whole input before
it is sent. What is kept is encrypted with the wallet's key, and a caller's API key sees its own responses alone.
"""

from __future__ import annotations

import asyncio
import re
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tallystick.client.config import MIB, ClientConfig
from tallystick.client.dialects.responses_items import list_items
from tallystick.client.dialects.responses_request import read_request, refuse_background, repeated_members
from tallystick.client.gateway.sealed_files import SealedFiles
from tallystick.protocol.eip712 import Signer
from tallystick.protocol.errors import BadMessage, Code, Refusal
from tallystick.protocol.lenient_json import dump_lenient, load_lenient

DAY_SECONDS = 86_400
_RESPONSE_ID = re.compile(r"resp_[0-9a-f]{32}")
_ITEM_ID = re.compile(r"[a-z]{2,8}_(?P<job>[0-9a-f]{32})_(?P<input>in)?(?P<place>[0-9]{1,6})")
"""Ids of items in the output and, with "in", in the input of a response."""


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """A response and the whole input that led to it."""

    response: dict[str, Any] = field(repr=False)
    input: list[dict[str, Any]] = field(repr=False)

    @property
    def items(self) -> list[dict[str, Any]]:
        """The conversation so far: input and output. Reasoning that no provider could read again is left out."""
        output = self.response["output"]
        return self.input + [item for item in output if item.get("type") != "reasoning" or _is_readable(item)]

    def find_item(self, item_id: str) -> dict[str, Any] | None:
        """The item of this id in the output, or in the input as `input_items` lists it."""
        return next((item for item in (*self.response["output"], *self.input_items) if item.get("id") == item_id), None)

    @property
    def input_items(self) -> list[dict[str, Any]]:
        """The items of the input as OpenAI lists them: each with an id."""
        job = str(self.response["id"]).removeprefix("resp_")
        return [
            {"type": "message", **item, "id": item.get("id") or f"{'msg' if 'role' in item else 'item'}_{job}_in{place}"}
            for place, item in enumerate(self.input)
        ]


def _is_readable(reasoning: dict[str, Any]) -> bool:
    return any(reasoning.get(name) for name in ("content", "summary", "encrypted_content"))


def _pack(stored: StoredResponse) -> bytes:
    return zlib.compress(dump_lenient({"response": stored.response, "input": stored.input}))


def _unpack(content: bytes) -> StoredResponse:
    kept = load_lenient(zlib.decompress(content))
    return StoredResponse(kept["response"], kept["input"])


class ResponseStore:
    """The stored responses of a wallet, by caller and id."""

    def __init__(self, files: SealedFiles) -> None:
        self._files = files

    @classmethod
    def of(cls, config: ClientConfig, wallet: Signer) -> ResponseStore | None:
        """The store of a config; None if it keeps nothing."""
        if not config.responses_mib:
            return None
        files = SealedFiles(
            config.responses_path(wallet.address),
            wallet,
            b"tallystick responses 1",
            limit=config.responses_mib * MIB,
            seconds=config.responses_days * DAY_SECONDS,
            count=config.responses_count,
        )
        return cls(files)

    def _name(self, caller: str, response_id: str) -> str:
        return self._files.name(dump_lenient([caller, response_id]))

    async def get(self, caller: str, response_id: str) -> StoredResponse | None:
        """A response of this caller; None if there is none."""
        content = await self._files.get(self._name(caller, response_id)) if _RESPONSE_ID.fullmatch(response_id) else None
        if content is None:
            return None
        return await asyncio.to_thread(_unpack, content)

    async def put(self, caller: str, stored: StoredResponse) -> None:
        """Keeps a response."""
        content = await asyncio.to_thread(_pack, stored)  # a long conversation has megabytes
        await self._files.put(self._name(caller, stored.response["id"]), content)

    async def delete(self, caller: str, response_id: str) -> None:
        """Forgets a response."""
        await self._files.delete(self._name(caller, response_id))


@dataclass(frozen=True, slots=True)
class Turn:
    """One request of a conversation, expanded.

    `body`: what is sent. `input`: all items that led to the answer. `keep`: whether the answer is to be stored. `members`: those
    of the request that the response repeats. `fixed`: the members that the gateway knows and the provider does not.
    """

    caller: str
    body: bytes = field(repr=False)
    input: list[dict[str, Any]] = field(repr=False)
    keep: bool
    members: dict[str, Any] = field(repr=False)
    fixed: dict[str, Any] = field(repr=False)
    created: int


class ResponseState:
    """Expands requests and keeps responses. `store`: None if nothing is kept. `max_bytes`: the longest body."""

    def __init__(self, store: ResponseStore | None, max_bytes: int, now: Callable[[], float] = time.time) -> None:
        self._store, self._max_bytes, self._now = store, max_bytes, now

    async def open_turn(self, body: bytes, caller: str) -> Turn:
        """Expands a request. Raises BadMessage, and Refusal if it continues a response that is not kept here."""
        request = read_request(body)
        refuse_background(request)
        members = {"model": request.get("model"), **repeated_members(request)}
        previous_id, store = request.get("previous_response_id"), request.get("store")
        if store is not None and not isinstance(store, bool):
            raise BadMessage("store: expected true or false")
        items = list_items(request.get("input") if request.get("input") is not None else [])
        expanded = await self._resolve(items, caller)
        if previous_id is not None:
            expanded = (await self._previous(previous_id, caller)).items + expanded
        keep = store is not False and self._store is not None
        fixed = {"previous_response_id": previous_id, "store": keep, "metadata": members["metadata"], "background": False}
        sent = {name: value for name, value in request.items() if name not in ("previous_response_id", "metadata")}
        if previous_id is not None or expanded is not items:
            sent["input"] = expanded
        sent["store"] = False  # the gateway keeps it
        body = dump_lenient(sent)
        if len(body) > self._max_bytes:
            text = (
                f"request body: expected at most {self._max_bytes} bytes (max_body_bytes) with the conversation that it continues"
            )
            raise Refusal(Code.BODY_TOO_LARGE, text)
        return Turn(caller, body, expanded, keep, members, fixed, int(self._now()))

    async def _previous(self, response_id: object, caller: str) -> StoredResponse:
        if not isinstance(response_id, str):
            raise BadMessage("previous_response_id: expected the id of a response")
        stored = None if self._store is None else await self._store.get(caller, response_id)
        if stored is None:
            reason = "" if self._store is not None else " This gateway keeps no responses (responses_mib is 0)."
            refusal = Refusal(
                Code.PREVIOUS_RESPONSE_NOT_FOUND, f"Previous response with id {response_id[:100]!r} not found.{reason}"
            )
            refusal.param = "previous_response_id"
            raise refusal
        return stored

    async def _resolve(self, items: list[dict[str, Any]], caller: str) -> list[dict[str, Any]]:
        """The items, with those in place of references that are kept here; the same list if there is no reference."""
        if not any(item.get("type") == "item_reference" for item in items):
            return items
        known: dict[str, StoredResponse | None] = {}
        resolved: list[dict[str, Any]] = []
        for number, item in enumerate(items):
            if item.get("type") != "item_reference":
                resolved.append(item)
                continue
            match = _ITEM_ID.fullmatch(str(item.get("id")))
            response_id = f"resp_{match['job']}" if match is not None else ""
            if response_id not in known:
                known[response_id] = await self._store.get(caller, response_id) if self._store is not None else None
            stored = known[response_id]
            referred = None if stored is None else stored.find_item(str(item.get("id")))
            if referred is None:
                refusal = Refusal(Code.PREVIOUS_RESPONSE_NOT_FOUND, f"Item with id {str(item.get('id'))[:100]!r} not found.")
                refusal.param = f"input[{number}].id"
                raise refusal
            if referred.get("type") != "reasoning" or _is_readable(referred):
                resolved.append(referred)
        return resolved

    async def keep(self, turn: Turn, response: dict[str, Any]) -> None:
        """Stores the answer of a turn if it is to be kept."""
        if turn.keep and self._store is not None:
            await self._store.put(turn.caller, StoredResponse(response, turn.input))

    async def get(self, caller: str, response_id: str) -> StoredResponse:
        """A stored response. Raises Refusal if there is none."""
        stored = None if self._store is None else await self._store.get(caller, response_id)
        if stored is None:
            raise Refusal(Code.RESPONSE_NOT_FOUND, f"Response with id {response_id[:100]!r} not found.")
        return stored

    async def delete(self, caller: str, response_id: str) -> None:
        """Deletes a stored response. Raises Refusal if there is none."""
        await self.get(caller, response_id)
        if self._store is not None:
            await self._store.delete(caller, response_id)
