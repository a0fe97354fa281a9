"""Completes the Responses of engines: ids of the gateway's own, and members that clients need and engines leave out. Pure.

An engine's ids may repeat or be missing, and it does not know what the gateway keeps. Some engines' events have no sequence
number and no indexes. Source: OpenAI's API reference, "The response object" and "Streaming events" of responses.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from tallystick.protocol.lenient_json import dump_lenient, load_lenient
from tallystick.protocol.sse import EventReader, MalformedAnswer, event_data

_MAX_EVENT_BYTES: Final = 32 << 20
"""The last event has the whole response."""
_PREFIXES: Final = {"message": "msg", "reasoning": "rs", "function_call": "fc"}
_FINAL: Final = frozenset({"response.completed", "response.incomplete"})
"""The last events of a response that has an answer."""
_PART_EVENTS: Final = ("content_part", "output_text", "refusal", "reasoning_text")


class ResponseRewriter:
    """Rewrites the Response of one job, whole or event by event.

    `members`: those that the response repeats from its request, for an engine that leaves them out. `fixed`: members whose value
    the gateway knows better. `created`: Unix time in seconds.
    """

    def __init__(self, job: str, members: Mapping[str, Any], fixed: Mapping[str, Any], created: int) -> None:
        self._job, self._members, self._fixed, self._created = job, members, fixed, created
        self._places: dict[str, int] = {}
        """The place in the output of each item, by the engine's id."""
        self._added = self._sequence = 0

    def document(self, response: Mapping[str, Any]) -> dict[str, Any]:
        """Rewrites a Response."""
        names: dict[str, Any] = {"id": f"resp_{self._job}", "object": "response"}
        rewritten: dict[str, Any] = {**names, **self._members, **response, **self._fixed, **names}
        created = response.get("created_at")
        rewritten["created_at"] = created if isinstance(created, int | float) and created > 0 else self._created
        output = response.get("output")
        items = output if isinstance(output, list) else []
        rewritten["output"] = [self._item(item, self._places.get(str(item.get("id")), at)) for at, item in _objects(items)]
        rewritten["usage"] = _complete_usage(response.get("usage"))
        return rewritten

    def event(self, event: dict[str, Any]) -> dict[str, Any]:
        """Rewrites an event of the stream."""
        kind = str(event.get("type"))
        rewritten = event | {"sequence_number": self._sequence}
        self._sequence += 1
        if isinstance(event.get("response"), dict):
            rewritten["response"] = self.document(event["response"])
            return rewritten
        item = event.get("item")
        if "item_id" not in event and not isinstance(item, dict):
            return rewritten
        place = self._place(event, item if isinstance(item, dict) else None, is_new=kind == "response.output_item.added")
        rewritten["output_index"] = place
        if isinstance(item, dict):
            rewritten["item"] = self._item(item, place)
        if "item_id" in event:
            rewritten["item_id"] = self._item_id(_kind_of(kind), place)
            self._complete_part(rewritten, kind)
        return rewritten

    def _place(self, event: Mapping[str, Any], item: Mapping[str, Any] | None, *, is_new: bool) -> int:
        engine_id = str(event.get("item_id") if item is None else item.get("id"))
        given = event.get("output_index")
        if isinstance(given, int):
            place = given
        elif is_new:
            place = self._added
        else:
            place = self._places.get(engine_id, max(self._added - 1, 0))
        if is_new:
            self._added = place + 1
        self._places[engine_id] = place
        return place

    def _item(self, item: dict[str, Any], place: int) -> dict[str, Any]:
        kind = str(item.get("type"))
        rewritten = item | {"id": self._item_id(kind, place)}
        if kind == "message" and isinstance(item.get("content"), list):
            rewritten["content"] = [_complete_text(part) for _, part in _objects(item["content"])]
        return {"status": "completed"} | rewritten if kind in _PREFIXES else rewritten

    def _item_id(self, kind: str, place: int) -> str:
        return f"{_PREFIXES.get(kind, 'item')}_{self._job}_{place}"

    @staticmethod
    def _complete_part(event: dict[str, Any], kind: str) -> None:
        name = kind.removeprefix("response.").partition(".")[0]
        if name in _PART_EVENTS:
            event.setdefault("content_index", 0)
        elif name.startswith("reasoning_summary"):
            event.setdefault("summary_index", 0)
        if name == "output_text":
            event.setdefault("logprobs", [])
        if isinstance(event.get("part"), dict):
            event["part"] = _complete_text(event["part"])


def _kind_of(event: str) -> str:
    """The kind of item that an event is about."""
    name = event.removeprefix("response.")
    if name.startswith("function_call"):
        return "function_call"
    return "reasoning" if name.startswith("reasoning") else "message"


def _objects(listed: list[Any]) -> Iterator[tuple[int, dict[str, Any]]]:
    return ((at, entry) for at, entry in enumerate(listed) if isinstance(entry, dict))


def _complete_text(part: dict[str, Any]) -> dict[str, Any]:
    return {"annotations": [], "logprobs": []} | part if part.get("type") == "output_text" else part


def _complete_usage(usage: object) -> dict[str, Any] | None:
    """OpenAI's counts, with the details that engines leave out."""
    if not isinstance(usage, dict):
        return None
    details: dict[str, dict[str, Any]] = {
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens_details": {"reasoning_tokens": 0},
    }
    completed: dict[str, Any] = {"input_tokens": 0, "output_tokens": 0} | usage
    for name, defaults in details.items():
        given = usage.get(name)
        completed[name] = defaults | (given if isinstance(given, dict) else {})
    try:
        completed.setdefault("total_tokens", completed["input_tokens"] + completed["output_tokens"])
    except TypeError:
        completed.setdefault("total_tokens", 0)
    return completed


class ResponseEvents:
    """Rewrites the bytes of an event stream. What is no event of a response passes on as it came."""

    def __init__(self, rewriter: ResponseRewriter) -> None:
        self._rewriter, self._reader = rewriter, EventReader(_MAX_EVENT_BYTES)
        self._malformed = False

    def feed(self, data: bytes) -> list[tuple[bytes, dict[str, Any] | None]]:
        """The bytes to send, in order, each with the response that they end; None if they end none."""
        if self._malformed:
            return [(data, None)]
        rewritten: list[tuple[bytes, dict[str, Any] | None]] = []
        try:
            for event in self._reader.feed(data):
                rewritten.append(self._rewrite(event))  # noqa: PERF401 - what came before a malformed event counts
        except MalformedAnswer:
            self._malformed = True
        return rewritten

    def finish(self) -> list[tuple[bytes, dict[str, Any] | None]]:
        """What is left at the end of the stream."""
        rest = None if self._malformed else self._reader.finish()
        return [] if rest is None else [self._rewrite(rest)]

    def _rewrite(self, event: bytes) -> tuple[bytes, dict[str, Any] | None]:
        payload = event_data(event)
        try:
            document = load_lenient(payload) if payload else None
        except ValueError:
            document = None
        if not isinstance(document, dict) or not str(document.get("type")).startswith("response."):
            return event.rstrip(b"\r\n") + b"\n\n", None
        rewritten = self._rewriter.event(document)
        response = rewritten["response"] if document["type"] in _FINAL and "response" in rewritten else None
        return b"event: " + str(document["type"]).encode() + b"\ndata: " + dump_lenient(rewritten) + b"\n\n", response
