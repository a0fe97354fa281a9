"""The table of error codes, from `Code` and `PUBLIC`, with the advice that the code does not hold."""

from __future__ import annotations

import re
from pathlib import Path

from docs.generate.markdown import code, table
from tallystick.protocol.errors import PUBLIC, Code

ROOT = Path(__file__).parent.parent.parent
_RAISED = re.compile(r"\b(Refusal|Unavailable|StreamInterrupted)\(\s*Code\.([A-Z_]+)")

INTRODUCTION = """# Error codes

An error has a message, a `code`, a `fault` (`client`, `provider`, `coordinator`, `engine` or `nobody`) and `retry`: whether the
same request may succeed later. The gateway and the coordinator send it as JSON in OpenAI's shape:

```json
{
  "error": {
    "message": "order.maxCost: expected at most 1000 base units, got 2000",
    "type": "insufficient_quota",
    "param": null,
    "code": "cost_above_cap",
    "fault": "client",
    "retry": false
  }
}
```

In Python an error is a `TallyError`. Its subclasses are `PeerError` (the other side broke a rule: keep the evidence, never
retry), `Refusal` (a lawful no, final for this request) and `Unavailable` (try again).

Below each code are its HTTP status, the usual fault (the member `fault` decides), and whether a retry can help: *retry* (raised
as `Unavailable`), *final*, or *see `retry`* if both occur.

"""

ADVICE: dict[Code, tuple[str, str, str]] = {
    Code.BAD_MESSAGE: (
        "A message does not parse, or a member is missing or out of range.",
        "sender",
        "Correct the member that the message names.",
    ),
    Code.BAD_SIGNATURE: (
        "A message is not signed by the account that it names.",
        "sender",
        "Check the wallet, the chain id and the contract: a signature binds all three.",
    ),
    Code.BAD_RECEIPT: (
        "A receipt contradicts its order, its prices, the transcript or the tab.",
        "provider",
        "Nothing to pay. Keep the evidence (`tally receipt evidence`) and choose another provider.",
    ),
    Code.UNDELIVERED: (
        "A receipt charges for an answer whose last chunk never reached the coordinator.",
        "provider",
        "Nothing to pay. Send the request again.",
    ),
    Code.BAD_SEAL: (
        "Ciphertext does not open, or a stream's chunks are reordered, missing or altered.",
        "sender or relay",
        "Send the request again as a new job; if it recurs, change the coordinator.",
    ),
    Code.BODY_TOO_LARGE: (
        "A request or an answer is larger than a limit allows.",
        "client",
        "Send less, or raise the limit that the message names.",
    ),
    Code.UNSUPPORTED_ENCODING: (
        "The `Content-Encoding` of a request body is not one that the gateway decodes. A coordinator decodes none.",
        "client",
        "Send the body as it is, or in one of the codings that the answer's `Accept-Encoding` lists.",
    ),
    Code.ORDER_EXPIRED: (
        "The order's deadline or `claimBy` is too near or has passed.",
        "client",
        "Set the clock right and send a new job.",
    ),
    Code.ORDER_REPLAYED: (
        "This order or job was seen before.",
        "client",
        "Send a new job; to fetch the answer of an old one use its `Idempotency-Key`.",
    ),
    Code.REPORT_REPLAYED: (
        "The audit of this job was reported before, in another report.",
        "client",
        "Nothing: the first report counts. The same report may be sent again, and gets the same acknowledgement.",
    ),
    Code.ORDER_MISDIRECTED: (
        "The order names another provider, coordinator, chain or contract.",
        "client",
        "Compare `deployment` and `coordinator` in the settings with `tally contract inspect rules`.",
    ),
    Code.ORDER_TERMS: (
        "The terms do not fit the ask, or the provider's rules refuse them.",
        "client",
        "Read the message: it names the term and the limit.",
    ),
    Code.CONTEXT_LENGTH_EXCEEDED: (
        "The request is longer than every context on offer for its model. Nothing was ordered.",
        "client",
        "Shorten the conversation to the length that the message names, or choose a model with a longer context.",
    ),
    Code.UNSUPPORTED: (
        "Every provider of the model declares that it lacks what the request needs, such as images or tools.",
        "client",
        "Choose a model that the message names, or leave that part out of the request.",
    ),
    Code.PRICE_ABOVE_CAP: (
        "Every ask costs more per token than allowed.",
        "client",
        "Raise `max_input_price` or `max_output_price`, or wait for cheaper asks (`tally models`).",
    ),
    Code.COST_ABOVE_CAP: (
        "The worst case of the request costs more than `max_cost`.",
        "client",
        "Lower `max_tokens`, shorten the input or raise `max_cost`.",
    ),
    Code.OVER_BUDGET: (
        "A budget has no room for the worst case of the request.",
        "client",
        "Wait for the next UTC day, lower `max_tokens`, or raise the budget (`tally spending` shows it).",
    ),
    Code.UNKNOWN_MODEL: ("No ask sells this model.", "client", "See what is on offer with `tally models`."),
    Code.UNKNOWN_JOB: (
        "This coordinator or gateway does not know the job.",
        "client",
        "Check the id, and that this wallet ordered it.",
    ),
    Code.UNKNOWN_LEAF: (
        "The newest signed head of the match log does not cover this leaf or size.",
        "client",
        "Ask for a smaller number; `GET /v1/log/head` has the log's size.",
    ),
    Code.PREVIOUS_RESPONSE_NOT_FOUND: (
        "The gateway does not keep the response or the item that the request continues.",
        "client",
        "Send the whole input. It was not stored, or deleted, or too old, or is another API key's; see `responses_days`.",
    ),
    Code.RESPONSE_NOT_FOUND: (
        "The gateway does not keep this response.",
        "client",
        "Check the id. It was not stored, or deleted, or too old, or is another API key's; see `responses_days`.",
    ),
    Code.FILE_NOT_FOUND: (
        "The gateway has no such file.",
        "client",
        "Check the id with `GET /v1/files`. It was deleted, or is too old, or is another API key's; see `batches_days`.",
    ),
    Code.BATCH_NOT_FOUND: (
        "The gateway has no such batch.",
        "client",
        "Check the id with `tally batch list`. It is too old, or another API key's; see `batches_days`.",
    ),
    Code.STORAGE_FULL: (
        "The files of the gateway use all the room that its settings allow.",
        "client",
        "Delete files that are not needed, or raise `batches_mib`.",
    ),
    Code.UNKNOWN_ROUTE: (
        "The path is not a route, or no ask of the model sells it.",
        "client",
        "Use a route that the model's `features` list.",
    ),
    Code.UNAUTHORISED_TAB: (
        "The order's ceiling is below what the tab already owes plus the jobs in flight.",
        "client",
        "The client lost state: see [troubleshooting](../troubleshooting.md). It recovers from its own signed orders.",
    ),
    Code.INSUFFICIENT_FUNDS: (
        "The purse, a stake or a wallet has too little money for this.",
        "client",
        "`tally balance` shows every place where money is; `tally deposit` fills the purse.",
    ),
    Code.UNSECURED: (
        "The provider wants more money reserved before it works for this payer.",
        "client",
        "`tally reserve PROVIDER AMOUNT`, or set `top_up_total` and let the gateway do it.",
    ),
    Code.NO_PROVIDER: (
        "No provider meets the requirements, or none that does is free.",
        "nobody",
        "`tally explain MODEL` says why each provider would not do. Retry later or ask for less.",
    ),
    Code.NODE_BUSY: (
        "The node has no free slot, or is stopping.",
        "nobody",
        "Retry; the next provider of the shortlist is asked without your doing.",
    ),
    Code.NODE_GONE: (
        "The node's connection ended while it had the job.",
        "provider",
        "Retry if `retry` is true. If not, `tally job show` tells what may be charged.",
    ),
    Code.PROVIDER_FAILED: (
        "The provider could not finish the job.",
        "provider",
        "Retry. Nothing is charged for an answer that broke.",
    ),
    Code.ENGINE_UNAVAILABLE: (
        "The engine behind a node does not answer.",
        "engine",
        "Provider: `tally node doctor`. Client: retry.",
    ),
    Code.UPSTREAM_UNAVAILABLE: (
        "A hosted upstream of the config does not answer, or refuses its API key.",
        "engine",
        "Check `url` and the key in `[[upstreams]]`, then retry; name another model in the alias.",
    ),
    Code.TIMED_OUT: (
        "A phase of the job took longer than its deadline.",
        "provider",
        "Retry if `retry` is true, with a smaller `max_tokens` if answers are long.",
    ),
    Code.CHAIN_UNAVAILABLE: (
        "The chain's JSON-RPC gives no answer, or a malformed one.",
        "nobody",
        "Check `rpc`; retry.",
    ),
    Code.CHAIN_REFUSED: (
        "The contract or the chain refused a transaction.",
        "client",
        "Read the reason: it names the contract's error; [contract](contract.md) explains it.",
    ),
    Code.COORDINATOR_UNAVAILABLE: (
        "The coordinator does not answer, or its answer is unreadable.",
        "coordinator",
        "Check `coordinator` in the settings; retry.",
    ),
    Code.DATABASE_UNAVAILABLE: (
        "The state file or database cannot be read or written.",
        "nobody",
        "Read the message: it names the setting. Check the path, its owner, the disk's free space, or the database server.",
    ),
    Code.PORT_UNAVAILABLE: (
        "The port to listen on is taken or not allowed.",
        "nobody",
        "Stop the other process, or set another port.",
    ),
    Code.ALREADY_RUNNING: (
        "Another process already uses this state.",
        "nobody",
        "Stop the other process, or give this one a state of its own.",
    ),
    Code.NOT_RUNNING: (
        "The process that the command asks does not run here.",
        "nobody",
        "Start it, or give the command the settings file that the process uses.",
    ),
    Code.PROCESS_FAILED: (
        "A process that the command started ended by itself.",
        "nobody",
        "Read the log that the message names.",
    ),
    Code.SHUTTING_DOWN: ("This process is stopping and takes no new work.", "nobody", "Retry after its restart."),
    Code.CLIENT_BUSY: (
        "This client has as many jobs or bytes under way as it allows.",
        "client",
        "Retry later, or raise `max_jobs` or `max_total_body_bytes`.",
    ),
    Code.UNAUTHENTICATED: (
        "The caller did not prove an account or an API key, or not the right one.",
        "client",
        "Send the right key; set the clock right: tokens live for minutes.",
    ),
    Code.RATE_LIMITED: (
        "Too many requests of one caller at once or per second.",
        "client",
        "Wait a moment and send fewer at a time.",
    ),
    Code.TIER_LIMIT: (
        "The wallet's access tier does not include the model, or any job at all; or the ask's price is for other wallets.",
        "client",
        "The message names the tier, and what would lift the limit; see {doc}`/how-to/access-tiers`.",
    ),
    Code.CANCELLED: (
        "The job was cancelled by its caller, or because its caller left.",
        "client",
        "Delivered output is charged; see `tally job show`.",
    ),
}
"""Meaning, usual fault and advice. `pages` fails if a code is missing here."""


def pages() -> dict[str, str]:
    """The page of error codes."""
    missing = [member.value for member in Code if member not in ADVICE]
    if missing:
        raise SystemExit(f"docs/generate/errors.py: no advice for {', '.join(missing)}")
    retries = _retries()
    rows = (_row(member, retries.get(member.name, set())) for member in Code)
    types: dict[str, set[int]] = {}
    for public in PUBLIC.values():
        types.setdefault(public.type, set()).add(public.status)
    statuses = ((code(name), ", ".join(map(str, sorted(numbers)))) for name, numbers in types.items())
    parts = [
        INTRODUCTION,
        table(("code", "meaning, and what to do"), rows),
        "\nOpenAI's member `type` follows from the status:\n",
        table(("type", "HTTP status"), statuses),
    ]
    return {"errors.md": "\n".join(parts)}


def _row(member: Code, raised: set[str]) -> tuple[str, str]:
    meaning, fault, action = ADVICE[member]
    final, again = "Refusal" in raised or not raised, bool(raised - {"Refusal"})
    retry = "see `retry`" if final and again else "retry" if again else "final"
    return f"{code(member.value)}<br>{PUBLIC[member].status}<br>{fault}<br>{retry}", f"{meaning}<br>{action}"


def _retries() -> dict[str, set[str]]:
    """For each code the classes with which it is raised anywhere."""
    raised: dict[str, set[str]] = {}
    for package in ("coordinator", "node", "tallystick"):
        for path in (ROOT / package).rglob("*.py"):
            for cls, name in _RAISED.findall(path.read_text(encoding="utf-8")):
                raised.setdefault(name, set()).add(cls)
    return raised
