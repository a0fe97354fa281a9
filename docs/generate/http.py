"""The reference of the HTTP APIs: the coordinator's from its OpenAPI document, the gateway's from its routes."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from coordinator.http import jobs_route
from coordinator.http.api import build_control_plane
from docs.generate.empty_coordinator import api_context
from docs.generate.markdown import code, table
from tallystick.client.gateway.handler import TALLY_HEADERS
from tallystick.client.selection import options
from tallystick.protocol.requirements import Requirements
from tallystick.protocol.routes import ALWAYS

COORDINATOR = """# Coordinator HTTP API

A coordinator serves the control plane below as JSON. `POST /v1/jobs` and the WebSocket `/v1/node` carry [binary frames](wire.md).
The OpenAPI document is at `/openapi.json` and rendered at `/docs`. Errors look as [error codes](errors.md) says.
"""

JOBS = """## `POST /v1/jobs`

Places a job: the body is a [submission](wire.md), the answer is a stream of response frames with the content type
`application/vnd.tallystick.frames`. Orders authenticate themselves; no token is needed.

{docstring}

"""

NODE = """## `WebSocket /v1/node`

The link of a node: the coordinator sends `CHALLENGE`, the node answers `HELLO`, the coordinator `WELCOME`. See
[frame kinds](wire.md#frame-kinds).
"""

GATEWAY = """# Gateway HTTP API

`tally gateway` serves OpenAI's API on `http://127.0.0.1:8421/v1`. Requests and answers are those of OpenAI; this page lists what
is added.

| route | meaning |
|---|---|
| `POST {routes}` | sold with every model name |
| `POST /v1/…` | any other route that a model's `features` list, for example `/v1/responses` or `/v1/rerank` |
| `GET /v1/models`, `GET /v1/models/MODEL` | models on offer and aliases, in OpenAI's shape, with prices and speeds |
| `GET /tally/jobs/ID` | what became of a job of this wallet |
| `GET /health` | whether the gateway serves |

"""

HEADER = """A request may carry this header: a JSON object. Amounts are dollars, written as text. The header can make the settings
stricter, never looser.
"""

IDEMPOTENCY = """A request with an `Idempotency-Key` is one job, however often it is sent. Errors have the shape described under
[error codes](errors.md).
"""

HEADERS = {
    "x-request-id": "the job's id, where OpenAI's SDKs look for it",
    "x-tally-job": "the job's id; `tally job show ID` tells what became of it",
    "x-tally-provider": "the account of the provider that answered",
    "x-tally-cost": "what the answer cost, in base units; not on streams",
    "x-tally-prices": "input, cached input and output price, in base units per million tokens",
    "x-tally-receipt": "the receipt's digest, or `outstanding` if the answer came before its receipt; not on streams",
    "x-tally-cache": "`hit` or `miss`, if a cache is configured",
    "x-tally-escalated": "models of an alias whose answers were paid for and not used",
    "x-tally-at-stake": "on an error: what failed attempts may still cost",
    "retry-after": "seconds to wait before the next attempt",
}
OPTIONS = {
    "max_cost": "most dollars for this request",
    "max_input_price": "most dollars per million input tokens",
    "max_output_price": "most dollars per million output tokens",
    "pin": "only these providers",
    "prefer": "providers to take first, in this order",
    "exclude": "providers never to take",
    "require": "what providers must say of themselves: " + ", ".join(f"`{name}`" for name in Requirements.__dataclass_fields__),
    "min_reputation": "least percentage of good jobs",
    "min_stake": "least stake in dollars",
    "sort": "`price`, `latency` or `throughput`",
    "fallbacks": "models to ask if this one cannot be had",
    "cache": "whether the answer may come from, and go to, the cache",
    "affinity": "a name for the conversation, to keep it with one provider",
    "label": "the workload to which the cost is counted",
}


def pages() -> dict[str, str]:
    """One page for each API."""
    return {"http-coordinator.md": _coordinator(), "http-gateway.md": _gateway()}


def _gateway() -> str:
    unknown = [*sorted(set(TALLY_HEADERS) - HEADERS.keys()), *sorted(options._READERS.keys() ^ OPTIONS.keys())]  # noqa: SLF001 - the list itself
    if unknown:
        raise SystemExit(f"docs/generate/http.py: says nothing of, or too much: {', '.join(unknown)}")
    return "\n".join(
        [
            GATEWAY.replace("{routes}", "`, `".join(ALWAYS)),
            "## Headers of answers\n",
            table(("header", "meaning"), ((code(name), HEADERS[name]) for name in TALLY_HEADERS)),
            "## `X-Tally-Options`\n",
            HEADER,
            table(("member", "meaning"), ((code(name), text) for name, text in OPTIONS.items())),
            IDEMPOTENCY,
        ]
    )


def _coordinator() -> str:
    document = build_control_plane(api_context()).openapi()
    docstring = (inspect.getdoc(jobs_route) or "").partition("\n\n")[2]
    sections = [
        _operation(document, path, method, operation)
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
    ]
    schemas = [part for name, schema in sorted(document["components"]["schemas"].items()) for part in _schema(name, schema)]
    parts = [COORDINATOR, JOBS.format(docstring=docstring), NODE, *sections, "## Schemas\n", *schemas]
    return "\n".join(parts)


def _operation(document: dict[str, Any], path: str, method: str, operation: dict[str, Any]) -> str:
    parts = [f"## `{method.upper()} {path}`\n", operation.get("description", "") + "\n"]
    if operation.get("security"):
        scheme = document["components"]["securitySchemes"]["Tally"]
        parts.append(f"Needs the header `{scheme['name']}`. {scheme['description']}\n")
    parameters = operation.get("parameters", [])
    if parameters:
        rows = ((code(p["name"]), p["in"], _type(p["schema"]), p.get("description", "")) for p in parameters)
        parts.append(table(("parameter", "in", "type", "meaning"), rows))
    body = operation.get("requestBody")
    if body:
        parts.append(f"Request body: {_type(body['content']['application/json']['schema'])}.\n")
    for status, response in operation["responses"].items():
        schema = response.get("content", {}).get("application/json", {}).get("schema", {})
        if status.startswith("2") and "$ref" in schema:
            parts.append(f"Answer: {_type(schema)}.\n")
    return "\n".join(parts)


def _schema(name: str, schema: dict[str, Any]) -> Iterator[str]:
    yield f"### {name}\n"
    if schema.get("description"):
        yield schema["description"] + "\n"
    required = set(schema.get("required", ()))
    rows = (
        (code(member), _type(part), "required" if member in required else _shown_default(part))
        for member, part in schema.get("properties", {}).items()
    )
    yield table(("member", "type", "default"), rows)


def _shown_default(part: dict[str, Any]) -> str:
    default = part.get("default")
    return "" if default in (None, [], {}) else code(str(default))


def _type(schema: dict[str, Any]) -> str:
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "anyOf" in schema:
        return " or ".join(_type(part) for part in schema["anyOf"])
    if "enum" in schema:
        return " or ".join(code(str(value)) for value in schema["enum"])
    if schema.get("type") == "array":
        return f"list of {_type(schema.get('items', {}))}"
    low, high = schema.get("minimum"), schema.get("maximum")
    bounds = f", {low} to {high:,}" if low is not None and high is not None else ""
    length = f", at most {schema['maxLength']} characters" if "maxLength" in schema else ""
    return f"{schema.get('type', 'any')}{bounds}{length}"
