"""The reference of the HTTP APIs: the coordinator's from its OpenAPI document, the gateway's from its routes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from coordinator.http.api import build_control_plane
from docs.generate.empty_coordinator import api_context
from docs.generate.markdown import code, table
from tallystick.client.gateway.response_sender import TALLY_HEADERS
from tallystick.client.selection import options
from tallystick.protocol.requirements import Requirements
from tallystick.protocol.routes import ALWAYS
from tallystick.runtime.content_encoding import SUPPORTED

COORDINATOR = """# Coordinator HTTP API

A coordinator listens on `http://127.0.0.1:8420` by default. Its routes take and return JSON, except `POST /v1/jobs` and the
WebSockets `/v1/link` and `/v1/node`, which carry [binary frames](wire.md). Amounts are base units, millionths of a dollar.
Errors have the shape described under [error codes](errors.md). A running coordinator serves the OpenAPI document at
`/openapi.json`, an interactive description at `/docs`, and [metrics](metrics.md) for Prometheus at `/metrics`.
"""

JOBS = """## `POST /v1/jobs`

Submits a job. The SDK and the gateway do this for you. The body is a [submission](wire.md): one signed order for each candidate
provider, and the sealed request. No token is needed, because each order is signed.

The response has the content type `application/vnd.tallystick.frames` and the header `x-tally-job`. Its frames arrive in this
order: a `MATCH`, the sealed `CHUNK`s, and the `RECEIPT`. If an attempt fails before its first output, a `VOID` and the next
`MATCH` may follow. A job that fails for good ends with `FAIL`. `BEAT` keeps the connection alive, and tells a
waiting job its place. An error before the first frame is a JSON object with its HTTP status; see [error codes](errors.md).

A job ends with its connection: if the client disconnects, the coordinator cancels it. With the header `X-Tally-Linger` (whole
seconds) the job continues for that long without a connection. A client that posts the same bytes again then gets the same
response from its first frame. This works while the job runs, and as long as the coordinator keeps the response, even after a
restart. `linger_seconds`, `response_seconds` and `response_mib` in [the coordinator's settings](config-coordinator.md) limit
this.
"""

LINK = """## `WebSocket /v1/link`

Carries many jobs of one client, each as `POST /v1/jobs` would: the same submissions, frames, errors and limits. The SDK and the
gateway use it, and post a job by HTTP if it has more than 192 KiB, or if a proxy in between opens no WebSocket. Each job is a
stream with a window of its own, so a slow reader holds no other one up. A lost link counts as the departure of each job's
client. The messages are described under [the link of a client](wire.md#the-link-of-a-client).
"""

NODE = """## `WebSocket /v1/node`

The connection of a node, which the node opens. The coordinator sends `CHALLENGE`, the node answers with its signed `HELLO`,
and the coordinator sends `WELCOME`. After that the node announces its asks and receives jobs; see
[frame kinds](wire.md#frame-kinds). If the coordinator has several [replicas](wire.md#replicas), `WELCOME` lists them, and the
node opens a connection to each.
"""

GATEWAY = """# Gateway HTTP API

`tally gateway` serves OpenAI's API on `http://127.0.0.1:8421/v1`, and Anthropic's Messages on `http://127.0.0.1:8421`.
Requests and answers are those of OpenAI and Anthropic; this page lists what is added.

| route | meaning |
|---|---|
| `POST {routes}` | sold with every model name |
| `POST /v1/…` | any other route that a model's `features` list, for example `/v1/responses` or `/v1/rerank` |
| `POST /v1/messages` | [Anthropic's Messages](../how-to/use-anthropic-clients.md), for every model: as it is, or translated |
| `POST /v1/messages/count_tokens` | an estimate of the input tokens; no provider is asked |
| `GET /v1/models`, `GET /v1/models/MODEL` | models and aliases with prices and speeds; to Anthropic's clients in their shape |
| `POST`, `GET /v1/files` | [uploads a file](../how-to/run-a-batch.md#files); lists them: `limit`, `after`, `order`, `purpose` |
| `GET`, `DELETE /v1/files/ID`, `GET /v1/files/ID/content` | a file, and its content |
| `POST`, `GET /v1/batches` | [creates a batch](../how-to/run-a-batch.md); lists them: `limit`, `after` |
| `GET /v1/batches/ID`, `POST /v1/batches/ID/cancel` | a batch; ends it |
| `GET /tally/spending`, `/tally/jobs`, `/tally/chat` | [pages for browsers](../how-to/budgets-and-api-keys.md) |
| `GET /tally/jobs/ID` | state, provider, cost and receipt of a job of this wallet |
| `GET /healthz`, `GET /readyz` | whether the gateway serves; the state of each dependency |
| `GET /` | what this is, and the base URLs for clients |

## What clients may send

Paths may have doubled slashes, a slash at the end and a query. The base URL may lack `/v1`. Azure's paths are the same routes:
`/openai/v1/…`, and `/openai/deployments/MODEL/…`, whose model counts if the body names none. Any other path is a 404
`unknown_route` that says what is wrong with it.

An [API key](../how-to/budgets-and-api-keys.md#give-callers-api-keys) is read from `Authorization: Bearer KEY`, `api-key` or
`x-api-key`.

Bodies may have the `Content-Encoding` {codings}, several of them too. `max_body_bytes` and `max_total_body_bytes` hold before and
after decoding. JSON must be UTF-8; a byte order mark before it is removed. Offers of another protocol (`Upgrade: h2c`) are
ignored, and HTTP/1.0 clients get streams unchunked.

"""

HEADER = """A request may carry this header: a JSON object. Amounts are dollars, written as text. The header can make the settings
stricter, never looser.
"""

IDEMPOTENCY = """A request with an `Idempotency-Key` is one job, even if it is sent several times. Errors have the shape described
under [error codes](errors.md).
"""

HEADERS = {
    "x-request-id": "the job's id, where OpenAI's SDKs expect the request's id",
    "x-tally-job": "the job's id; `tally job show ID` shows the job",
    "x-tally-provider": "the account of the provider that answered",
    "x-tally-upstream": "the upstream that answered instead of a provider; its answers are neither sealed nor signed",
    "x-tally-cost": "what the answer cost, in base units; not on streams",
    "x-tally-prices": "input, cached input and output price, in base units per million tokens",
    "x-tally-receipt": "the receipt's digest, or `outstanding` if the answer came before its receipt; `none` from an upstream",
    "x-tally-cache": "`hit` or `miss`, if a cache is configured",
    "x-tally-escalated": "models of an alias whose answers were paid for and not used",
    "x-tally-queue-position": "of a stream that began while its job waited for a free slot: the job's place then, 1 for the next",
    "x-tally-queue-wait": "beside it: the expected wait in seconds, if the coordinator has measured it",
    "x-tally-at-stake": "on an error: what failed attempts may still cost",
    "retry-after": "seconds to wait before the next attempt",
}
OPTIONS = {
    "max_cost": "maximum cost of this request, in dollars",
    "max_input_price": "maximum price of a million input tokens, in dollars",
    "max_output_price": "maximum price of a million output tokens, in dollars",
    "pin": "only these providers",
    "prefer": "providers to use first, in this order",
    "exclude": "providers that must not be used",
    "require": "requirements on what providers declare: " + ", ".join(f"`{name}`" for name in Requirements.__dataclass_fields__),
    "min_reputation": "minimum reputation, as a percentage",
    "min_integrity": "minimum integrity by audits, as a percentage",
    "min_stake": "minimum stake, in dollars",
    "sort": "`price`, `latency` or `speed`",
    "weights": "what time and failure are worth, in dollars: `first_token` and `speed` per second, `loss` per failed job",
    "fallbacks": "models to try if this one is not available",
    "market": "`true`: no upstream may answer",
    "cache": "whether the answer may come from, and go to, the cache",
    "share_prompt": "whether audits may show the request to other providers; one `false` anywhere forbids it",
    "private": "`true`: audits never show the request to other providers",
    "affinity": "a name for the conversation, to keep it with one provider",
    "label": "the workload that the cost counts towards",
    "wait": "seconds that the request may wait for a free slot if all providers that fit are busy; 0 fails at once",
    "priority": "`interactive` or `batch`; batch requests wait behind interactive ones, with one slot in eight at least",
    "hedge_after": "seconds without output after which a second provider may get the request too; 0 for never",
}


def pages() -> dict[str, str]:
    """One page for each API."""
    return {"http-coordinator.md": _coordinator(), "http-gateway.md": _gateway()}


def _gateway() -> str:
    unknown = [*sorted(set(TALLY_HEADERS) - HEADERS.keys()), *sorted(options._READERS.keys() ^ OPTIONS.keys())]  # noqa: SLF001 - the list itself
    if unknown:
        raise SystemExit(f"docs/generate/http.py: missing or unknown names: {', '.join(unknown)}")
    return "\n".join(
        [
            GATEWAY.replace("{routes}", "`, `".join(ALWAYS)).replace("{codings}", ", ".join(map(code, SUPPORTED))),
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
    sections = [
        _operation(document, path, method, operation)
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
    ]
    schemas = [part for name, schema in sorted(document["components"]["schemas"].items()) for part in _schema(name, schema)]
    parts = [COORDINATOR, JOBS, LINK, NODE, *sections, "## Schemas\n", *schemas]
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
    bounds = f", {low:,.0f} to {high:,.0f}" if low is not None and high is not None else ""
    length = f", at most {schema['maxLength']} characters" if "maxLength" in schema else ""
    return f"{schema.get('type', 'any')}{bounds}{length}"
