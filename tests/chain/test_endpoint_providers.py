"""Endpoints of hosted providers: their limits of rate, batches, ranges and tags are adapted to, and no key is ever shown."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import rlp

from tallystick.chain.endpoint import MAX_PAUSE, BatchSplit
from tallystick.chain.escrow import Escrow
from tallystick.chain.event_reader import read_events
from tallystick.chain.events import Event, FeeSet
from tallystick.chain.rpc import Rpc, RpcError, Sender
from tallystick.chain.rpc_transport import retry_after
from tallystick.protocol.errors import Unavailable
from tests.chain.harness import World, person
from tests.chain.odd_provider import (
    KEY,
    OddProvider,
    Reply,
    Requests,
    each_with,
    error,
    every_other,
    more_than,
    odd,
    page,
    whole,
    wide_logs,
    without_pending,
)


class Sleeps:
    """Replaces the pauses of an Rpc; records them."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    async def __call__(self, seconds: float) -> None:
        self.seconds.append(seconds)
        await asyncio.sleep(0)


LATER = "Fri, 31 Dec 2100 23:59:30 GMT"
RATE_LIMITS: dict[str, dict[str, Any]] = {
    "429 html": {"refuse": every_other(page(429, retry_after="1"))},
    "429 date": {"refuse": every_other(page(429, retry_after=LATER))},
    "429 json": {"refuse": every_other(each_with(-32005, "daily request count exceeded", status=429))},
    "429 empty": {"refuse": every_other(page(429, ""))},
    "503": {"refuse": every_other(page(503, retry_after="2"))},
    "200 -32016": {"refuse": every_other(each_with(-32016, "over rate limit"))},
    "200 -32029": {"refuse": every_other(each_with(-32029, "Too many requests, please slow down"))},
    "200 -32000": {"refuse": every_other(each_with(-32000, "429 Too Many Requests: {}"))},
    "200 -32005": {"refuse": every_other(each_with(-32005, "limit exceeded"))},
    "200 -32007": {"refuse": every_other(whole(-32007, "50/second request limit reached"))},
    "200 10ms": {"refuse": every_other(whole(-32000, "rate limit exceeded, try again in 10ms"))},
    "200 array": {"refuse": every_other(lambda _: Reply([{"id": None, "error": error(-32016, "over rate limit")}]))},
    "403 text": {"refuse": every_other(page(403, "error code: 1015, rate limited"))},
}


@pytest.mark.parametrize("behaviour", RATE_LIMITS.values(), ids=RATE_LIMITS)
async def test_a_rate_limit_is_waited_out(chain_url: str, behaviour: dict[str, Any]) -> None:
    """Whatever form a rate limit has, the request is sent again after a pause, alone and in a batch."""
    sleeps = Sleeps()
    with odd(chain_url, **behaviour) as (provider, url):
        rpc = Rpc(url, timeout=60, sleep=sleeps)
        assert await rpc.chain_id() == 31337
        assert await rpc.batch(("eth_chainId",), ("net_version",)) == ["0x7a69", "31337"]
        await rpc.close()
    assert len(sleeps.seconds) == provider.refused == 2
    assert all(0 < seconds <= MAX_PAUSE for seconds in sleeps.seconds)


@pytest.mark.parametrize(
    ("behaviour", "seconds"),
    [
        (page(429, retry_after="3"), 3.0),
        (page(429, retry_after=LATER), MAX_PAUSE),
        (page(429, retry_after="9999"), MAX_PAUSE),
        (whole(-32000, "rate limit exceeded, try again in 7s"), 7.0),
        (each_with(-32005, "rate exceeded", data={"rate": {"backoff_seconds": 6}}), 6.0),
    ],
    ids=["seconds", "date", "too long", "text", "data"],
)
async def test_the_time_that_an_endpoint_names_is_waited(
    chain_url: str, behaviour: Callable[[Requests], Reply], seconds: float
) -> None:
    """The pause is what the endpoint asks for, up to a limit."""
    sleeps = Sleeps()
    with odd(chain_url, refuse=every_other(behaviour)) as (_, url):
        rpc = Rpc(url, timeout=60, sleep=sleeps)
        await rpc.block_number()
        await rpc.close()
    assert sleeps.seconds == [seconds]


def test_a_retry_after_of_any_form() -> None:
    """Retry-After is seconds or an HTTP date; anything else, and a date in the past, is no time to wait."""
    assert [retry_after(raw) for raw in ("5", " 1.5 ", "soon", "", "-1", None)] == [5.0, 1.5, 0.0, 0.0, 0.0, 0.0]
    assert retry_after(LATER, "Fri, 31 Dec 2100 23:59:27 GMT") == 3.0
    assert retry_after(LATER, "Fri, 31 Dec 2100 23:59:31 GMT") == 0.0
    assert retry_after("Sun, 06 Nov 1994 08:49:37 GMT") == 0.0
    assert retry_after(LATER, "not a date") > 0.0


async def test_only_limited_members_of_a_batch_are_sent_again(chain_url: str) -> None:
    """If some members of a batch are limited, only those are sent again, until none is left."""

    def limit(provider: OddProvider, request: dict[str, Any]) -> dict[str, Any] | None:
        limited = request["method"] == "eth_chainId" and provider.calls["eth_chainId"] <= 3
        return error(-32005, "rate limit exceeded") if limited else None

    with odd(chain_url, refuse_member=limit) as (provider, url):
        rpc = Rpc(url, timeout=60, sleep=Sleeps())
        assert await rpc.batch(("net_version",), ("eth_chainId",), ("eth_syncing",)) == ["31337", "0x7a69", False]
        await rpc.close()
    assert provider.sizes == [3, 1, 1, 1]


async def test_a_batch_above_the_rate_is_sent_in_single_requests(chain_url: str) -> None:
    """If each request of a batch counts and the batch alone is above the rate, its requests are sent one by one, but the next
    batch is tried whole.
    """
    refuse = more_than(2, each_with(-32016, "over rate limit"))
    with odd(chain_url, refuse=refuse) as (provider, url):
        rpc = Rpc(url, timeout=60, sleep=Sleeps())
        for _ in range(2):
            assert await rpc.batch(*[("eth_chainId",)] * 4) == ["0x7a69"] * 4
        await rpc.close()
    assert provider.sizes == [4, 4, 4, 1, 1, 1, 1] * 2


async def test_a_lasting_rate_limit_is_an_error_with_a_remedy(chain_url: str) -> None:
    """After the last attempt, the error names the endpoint without its key, the limit, and what to do."""
    sleeps = Sleeps()
    with odd(chain_url, refuse=lambda _, requests: each_with(-32016, "over rate limit")(requests)) as (provider, url):
        rpc = Rpc(url, timeout=60, sleep=sleeps)
        with pytest.raises(RpcError) as caught:
            await rpc.block_number()
        await rpc.close()
    assert provider.refused == 6
    assert sleeps.seconds == [0.5, 1.0, 2.0, 4.0, 8.0]
    assert "limits how many requests" in str(caught.value)
    assert "over rate limit" in str(caught.value)
    assert KEY not in str(caught.value)


# ------------------------------------------------------------------------------------------------------------------ batches

CAPS: dict[str, Callable[[int], Callable[[Requests], Reply]]] = {
    "object": lambda cap: whole(31, f"Batch of more than {cap} requests are not allowed", 400),
    "object 500": lambda cap: whole(31, f"Batch of more than {cap} requests are not allowed", 500),
    "-32600": lambda _: whole(-32600, "batch too large"),
    "-32000": lambda _: whole(-32000, "invalid request"),
    "413": lambda _: page(413, ""),
    "400": lambda _: page(400, "Bad Request"),
    "403": lambda _: page(403, "Forbidden"),
    "500": lambda _: page(500, "Internal Server Error"),
    "array": lambda cap: each_with(-32600, f"batch size exceeds the maximum of {cap}"),
    "array of one": lambda _: lambda requests: Reply([{"id": requests[0]["id"], "error": error(-32600, "batch too large")}]),
    "array without id": lambda _: lambda _: Reply([{"id": None, "error": error(-32600, "too many requests in batch")}]),
    "empty array": lambda _: lambda _: Reply([]),
}


@pytest.mark.parametrize("cap", [1, 3, 10])
@pytest.mark.parametrize("form", CAPS.values(), ids=CAPS)
async def test_a_batch_cap_is_learned(chain_url: str, form: Callable[[int], Callable[[Requests], Reply]], cap: int) -> None:
    """A batch that is refused for its size is sent in parts; later batches have the learned size from the start."""
    with odd(chain_url, refuse=more_than(cap, form(cap))) as (provider, url):
        rpc = Rpc(url, timeout=60, sleep=Sleeps())
        calls, expected = [("eth_chainId",), ("net_version",)] * 6, ["0x7a69", "31337"] * 6
        assert await rpc.batch(*calls) == expected
        refused, before = provider.refused, len(provider.sizes)
        assert await rpc.batch(*calls) == expected
        await rpc.close()
    assert provider.refused == refused
    assert max(provider.sizes[before:]) <= cap


async def test_an_endpoint_without_authorisation_is_not_split(chain_url: str) -> None:
    """A refusal of every request, such as 401, is raised at once and not taken for a batch limit."""
    with odd(chain_url, refuse=lambda _, requests: page(401, "invalid project id")(requests)) as (provider, url):
        rpc = Rpc(url, timeout=60, sleep=Sleeps())
        results = await rpc.batch(*[("eth_chainId",)] * 4)
        await rpc.close()
    assert all(isinstance(result, RpcError) and "HTTP 401" in str(result) for result in results)
    assert provider.sizes == [4]


async def test_a_batch_that_must_stay_together_is_not_split(chain_url: str) -> None:
    """Requests that one node must answer are not spread over several exchanges: the caller is told."""
    with odd(chain_url, refuse=more_than(3, whole(-32600, "batch too large"))) as (_, url):
        rpc = Rpc(url, timeout=60, sleep=Sleeps())
        for _ in range(2):
            with pytest.raises(BatchSplit):
                await rpc.batch(*[("eth_chainId",)] * 4, together=True)
        assert len(await rpc.batch(*[("eth_chainId",)] * 2, together=True)) == 2
        await rpc.close()


SHAPES: dict[str, Callable[[Any], Any]] = {
    "string ids": lambda answers: [a | {"id": str(a["id"])} for a in answers] if isinstance(answers, list) else answers,
    "out of order": lambda answers: answers[::-1] if isinstance(answers, list) else answers,
    "list of one": lambda answers: answers if isinstance(answers, list) else [answers],
    "no id for one": lambda answers: answers if isinstance(answers, list) else answers | {"id": None},
    "string id for one": lambda answers: answers if isinstance(answers, list) else answers | {"id": str(answers["id"])},
    "no version": lambda answers: answers if isinstance(answers, list) else {k: answers[k] for k in answers if k != "jsonrpc"},
    "error null": lambda answers: answers if isinstance(answers, list) else answers | {"error": None},
}


@pytest.mark.parametrize("alter", SHAPES.values(), ids=SHAPES)
async def test_odd_shapes_of_an_answer_are_read(chain_url: str, alter: Callable[[Any], Any]) -> None:
    """Answers are matched by their ids, however those are written and in whatever order they come."""
    with odd(chain_url, alter=alter) as (provider, url):
        rpc = Rpc(url, timeout=60, sleep=Sleeps())
        assert await rpc.batch(("eth_chainId",), ("net_version",)) == ["0x7a69", "31337"]
        assert await rpc.chain_id() == 31337
        await rpc.close()
    assert provider.sizes == [2, 1], "nothing was asked twice"


async def test_a_compressed_answer_is_read(chain_url: str) -> None:
    """An answer in gzip is decoded."""
    with odd(chain_url, compress=True) as (_, url):
        rpc = Rpc(url, timeout=60)
        assert await rpc.chain_id() == 31337
        await rpc.close()


# --------------------------------------------------------------------------------------------------------------- tags, nodes

NO_PENDING = {
    "-32601": (-32601, "pending block is not available"),
    "-32602": (-32602, "invalid block tag: pending"),
    "-32000": (-32000, "pending state is not available"),
    "other": (-32000, "not here"),
}


@pytest.mark.parametrize("words", NO_PENDING.values(), ids=NO_PENDING)
async def test_an_endpoint_without_the_pending_tag(chain_url: str, rpc: Rpc, words: tuple[int, str]) -> None:
    """Without the tag `pending`, the time is that of the last block and sends use the count of mined transactions. The tag is
    asked for once, and concurrent sends of one key get different nonces.
    """
    signer = person(f"no pending {words}")
    await Sender(rpc, (await World.make(rpc)).deployer.signer, poll=0.001).send(signer.address, b"", value=10**18)
    with odd(chain_url, refuse_member=without_pending(*words)) as (provider, url):
        through = Rpc(url, timeout=60, sleep=Sleeps())
        assert await through.now() == await rpc.timestamp()
        assert await through.now() == await rpc.timestamp()
        sender, payee = Sender(through, signer, poll=0.001), person("payee").address
        before = await rpc.balance(payee)
        results = await asyncio.gather(*(sender.send(payee, b"", value=1) for _ in range(6)))
        await sender.send(payee, b"", value=1)
        await through.close()
    assert len({mined.hash for mined in results}) == 6
    assert await rpc.balance(payee) - before == 7
    assert await rpc.quantity("eth_getTransactionCount", signer.address, "latest") == 7
    assert provider.refused == 2, "once for the block and once for the count"


async def test_a_cancelled_send_keeps_its_nonce_without_the_pending_tag(chain_url: str, world: World) -> None:
    """A send that was cancelled after its submission may still be mined, so the next send gets another nonce."""
    signer, submitted, nonces = (await world.sender(person("cancelled"))).signer, asyncio.Event(), list[int]()

    def keep(_: OddProvider, request: dict[str, Any]) -> dict[str, Any] | None:
        """The node has no `pending` tag, takes the first transaction and does not mine it."""
        if "pending" in request["params"]:
            return error(-32601, "no pending")
        if request["method"] == "eth_sendRawTransaction":
            nonces.append(_nonce(request["params"][0]))
            loop.call_soon_threadsafe(submitted.set)
        return None

    def swallow(_: OddProvider, requests: Requests) -> Reply | None:
        if requests[0]["method"] == "eth_sendRawTransaction" and not nonces:
            keep(_, requests[0])
            return Reply({"jsonrpc": "2.0", "id": requests[0]["id"], "result": "0x" + "11" * 32})
        return None

    loop = asyncio.get_running_loop()
    with odd(chain_url, refuse=swallow, refuse_member=keep) as (_, url):
        rpc = Rpc(url, timeout=60)
        sender = Sender(rpc, signer, poll=0.01, deadline=0.2)
        sending = asyncio.create_task(sender.send(person("payee").address, b"", value=1, gas=21_000))
        await submitted.wait()
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)
        with contextlib.suppress(Unavailable):  # a gap is before it, so it is not mined
            await sender.send(person("payee").address, b"", value=1, gas=21_000)
        await rpc.close()
    assert nonces[0] + 1 in nonces


def _nonce(raw: str) -> int:
    body: Any = rlp.decode(bytes.fromhex(raw[4:]))
    return int.from_bytes(body[1], "big")


@pytest.mark.parametrize("words", ["nonce too high", "NonceGap, Future nonce"])
async def test_a_node_that_has_not_seen_the_last_transaction_is_sent_this_one_again(
    chain_url: str, world: World, words: str
) -> None:
    """A nonce that is too high for one node is not changed: the transaction is sent again until the node has caught up."""
    signer, payee = (await world.sender(person(f"ahead {words}"))).signer, person("payee ahead").address

    def behind(provider: OddProvider, request: dict[str, Any]) -> dict[str, Any] | None:
        first = request["method"] == "eth_sendRawTransaction" and provider.calls["eth_sendRawTransaction"] == 1
        return error(-32000, words) if first else None

    with odd(chain_url, refuse_member=behind) as (provider, url):
        rpc = Rpc(url, timeout=60)
        await Sender(rpc, signer, poll=0.01, bump_after=0.1).send(payee, b"", value=1)
        await rpc.close()
    assert provider.calls["eth_sendRawTransaction"] >= 2
    assert await world.rpc.quantity("eth_getTransactionCount", signer.address, "latest") == 1


async def test_a_pending_block_that_is_null(chain_url: str, rpc: Rpc) -> None:
    """If the pending block is null, the time is that of the last block."""
    alter: Callable[[Any], Any] = lambda a: a | {"result": None} if (a["result"] or {}).get("hash", "") is None else a  # noqa: E731
    with odd(chain_url, alter=alter) as (_, url):
        through = Rpc(url, timeout=60)
        assert await through.now() == await rpc.timestamp()
        await through.close()


@pytest.mark.parametrize(
    "words", ["header not found", "missing trie node 1f", "block not found", "Unknown block", "cannot query unfinalized data"]
)
async def test_a_node_that_lags_is_asked_again(chain_url: str, words: str) -> None:
    """An error of a node that does not have the newest block yet is not final."""

    def lag(provider: OddProvider, request: dict[str, Any]) -> dict[str, Any] | None:
        return error(-32000, words) if provider.calls[request["method"]] <= 2 else None

    with odd(chain_url, refuse_member=lag) as (provider, url):
        rpc = Rpc(url, timeout=60, sleep=Sleeps())
        assert await rpc.balance(person("x").address) == 0
        await rpc.close()
    assert provider.calls["eth_getBalance"] == 3


async def test_a_latest_block_that_is_null_is_asked_for_again(chain_url: str) -> None:
    """A null for the latest block is a node that lags; a null for a block by number is an answer."""
    answered: list[bool] = []

    def alter(answer: Any) -> Any:
        answered.append(True)
        return answer | {"result": None} if len(answered) == 1 else answer

    with odd(chain_url, alter=alter) as (provider, url):
        rpc = Rpc(url, timeout=60, sleep=Sleeps())
        assert await rpc.timestamp() > 0
        assert await rpc.block(1 << 40) is None
        await rpc.close()
    assert len(provider.sizes) == 3


MISSING_FEES = [("eth_maxPriorityFeePerGas",), ("eth_maxPriorityFeePerGas", "eth_gasPrice")]


@pytest.mark.parametrize("missing", MISSING_FEES, ids=["no tip", "no price either"])
async def test_an_endpoint_without_fee_methods(chain_url: str, world: World, missing: tuple[str, ...]) -> None:
    """A transaction is sent with a fee from the methods that exist."""
    sender = await world.sender(person(f"fees {missing}"))

    def refuse(_: OddProvider, request: dict[str, Any]) -> dict[str, Any] | None:
        return error(-32601, "the method does not exist/is not available") if request["method"] in missing else None

    with odd(chain_url, refuse_member=refuse) as (_, url):
        through = Rpc(url, timeout=60)
        await Sender(through, sender.signer, poll=0.001).send(person("payee").address, b"", value=1)
        await through.close()


# --------------------------------------------------------------------------------------------------------------------- logs

WORDS = {
    "Alchemy": (-32600, "up to a 3 block range. Based on your parameters, this block range should work: [{first}, {last}]"),
    "Infura": (-32005, "query returned more than 10000 results. Try with this block range [{first}, {last}]."),
    "number": (-32000, "eth_getLogs is limited to 3 blocks"),
    "no number": (-32602, "block range is too wide"),
    "BSC": (-32005, "limit exceeded"),
    "timeout": (-32000, "query timeout exceeded"),
    "unknown words": (-32000, "no"),
}


async def _events(rpc: Rpc, world: World, start: int) -> list[Event]:
    events, cursor, tip = list[Event](), start, ""
    while (page := await read_events(rpc, world.deployment, cursor, after=tip)).cursor != cursor:
        events += page.events
        cursor, tip = page.cursor, page.tip
    return events


async def _rates(world: World, start: int, count: int = 12) -> list[Event]:
    for bps in range(count):
        await world.escrow.set_fee(world.deployer, bps)
    return await _events(world.rpc, world, start)


BATCHES: dict[str, dict[str, Any]] = {
    "whole": {},
    "batches of 1": {"refuse": more_than(1, whole(31, "Batch of more than 1 requests are not allowed", 400))},
    "batches of 3": {"refuse": more_than(3, whole(31, "Batch of more than 3 requests are not allowed", 500))},
}


@pytest.mark.parametrize("batches", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("words", WORDS.values(), ids=WORDS)
async def test_a_cap_on_ranges_loses_no_event(
    chain_url: str, world: World, words: tuple[int, str], batches: dict[str, Any]
) -> None:
    """With any cap on the range of eth_getLogs, all events are read once and in order, and the range that works is remembered."""
    start = world.deployment.block
    expected = await _rates(world, start)
    behaviour = batches | {"refuse_member": wide_logs(3, words[1], words[0])}
    with odd(chain_url, **behaviour) as (provider, url):
        rpc = Rpc(url, timeout=60, sleep=Sleeps())
        assert await _events(rpc, world, start) == expected
        refused = provider.refused
        assert await _events(rpc, world, start) == expected
        await rpc.close()
    assert [type(event) for event in expected] == [FeeSet] * 12
    assert provider.refused - refused <= 2, "a larger range is tried again now and then"


@pytest.mark.parametrize("lag", [1, 5])
async def test_blocks_near_the_head_are_read_by_hash_without_batches(chain_url: str, world: World, lag: int) -> None:
    """If the endpoint takes no batches and some of its nodes lag, a node without the block answers with an error and not with no
    logs, so no event is lost.
    """
    start = world.deployment.block
    expected = await _rates(world, start)
    head = await world.rpc.block_number()

    def behind(provider: OddProvider, request: dict[str, Any]) -> dict[str, Any] | None:
        """Every other eth_getLogs goes to a node that lags: by number it returns no logs, by hash an error."""
        if request["method"] != "eth_getLogs" or provider.calls["eth_getLogs"] % 2:
            return None
        query = request["params"][0]
        assert "blockHash" in query or int(query["toBlock"], 16) < head - lag, "a lagging node would lose events"
        return error(-32000, "unknown block") if "blockHash" in query else None

    refuse = more_than(1, whole(-32600, "batches are not supported"))
    with odd(chain_url, refuse=refuse, refuse_member=behind) as (_, url):
        rpc = Rpc(url, timeout=60, sleep=Sleeps())
        assert await _events(rpc, world, start) == expected
        await rpc.close()


async def test_old_blocks_are_read_in_ranges_without_batches(chain_url: str, world: World) -> None:
    """Far below the head a range is read in one request, also at an endpoint without batches."""
    start = world.deployment.block
    expected = await _rates(world, start, 3)
    await world.rpc.request("evm_mine", 500)
    with odd(chain_url, refuse=more_than(1, whole(-32600, "batches are not supported"))) as (provider, url):
        rpc = Rpc(url, timeout=60)
        page = await read_events(rpc, world.deployment, start)
        await rpc.close()
    assert list(page.events) == expected
    assert provider.calls["eth_getLogs"] == 1, "the first batch, which has none, was refused"


# ------------------------------------------------------------------------------------------------------------------ secrets


@pytest.mark.parametrize(
    "reply",
    [
        page(200),
        page(401, f"invalid API key {KEY}"),
        page(404, "<html><body>no such project</body></html>"),
        page(502),
        each_with(-32000, f"project {KEY} has no access"),
        lambda _: Reply("sign in"),
    ],
    ids=["login page", "401", "404", "502", "error", "text"],
)
async def test_no_error_shows_the_key(chain_url: str, reply: Callable[[Requests], Reply]) -> None:
    """Errors of every kind name the endpoint or the method, and never the key in its URL, even if the server repeats it."""
    with odd(chain_url, refuse=lambda _, requests: reply(requests)) as (_, url):
        rpc = Rpc(url, timeout=60, attempts=2, sleep=Sleeps())
        with pytest.raises(Unavailable) as caught:
            await rpc.block_number()
        await rpc.close()
    assert KEY not in f"{caught.value!s} {caught.value!r} {caught.value.__cause__!r} {caught.value.__dict__!r}"


async def test_a_login_page_is_named(chain_url: str) -> None:
    """A web page with the status 200 is reported by its title, with the setting to check."""
    with odd(chain_url, refuse=lambda _, requests: page(200)(requests)) as (_, url):
        rpc = Rpc(url, timeout=60, attempts=2, sleep=Sleeps())
        with pytest.raises(Unavailable, match=r"not JSON \(a web page titled 'Sign in'\); check the JSON-RPC URL \(rpc\)"):
            await rpc.block_number()
        await rpc.close()


@pytest.mark.parametrize("url", [f"http://127.0.0.1:9/v3/{KEY}", f"nonsense://{KEY}", f"http://user:{KEY}@127.0.0.1:9"])
async def test_an_endpoint_that_cannot_be_reached_keeps_its_key(url: str) -> None:
    """Connection errors and malformed URLs do not show the key either."""
    rpc = Rpc(url, attempts=1)
    with pytest.raises(Unavailable) as caught:
        await rpc.block_number()
    await rpc.close()
    assert KEY not in f"{caught.value} {caught.value.__cause__!r}"


async def test_a_missing_contract_keeps_the_key(chain_url: str, world: World) -> None:
    """Errors about the deployment name the endpoint without its key."""
    with odd(chain_url, alter=lambda answer: answer | {"result": "0x"} if isinstance(answer, dict) else answer) as (_, url):
        rpc = Rpc(url, timeout=60)
        rpc._chain_id = 31337
        with pytest.raises(Unavailable) as caught:
            await Escrow(rpc, world.deployment).check()
        rpc._chain_id = 1
        with pytest.raises(Unavailable) as wrong:
            await Escrow(rpc, world.deployment).check()
        await rpc.close()
    assert "/…" in str(caught.value)
    assert "is chain 1" in str(wrong.value)
    assert KEY not in f"{caught.value} {wrong.value}"
