from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import AsyncExitStack
from dataclasses import replace

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tallystick.client.config import ApiKey, ClientConfig
from tallystick.client.gateway.app import build_app
from tallystick.client.gateway.key_shares import OWN_KEY_LABEL, KeyShares
from tallystick.client.sdk.market import Market
from tallystick.protocol.eip712 import Signer
from tallystick.protocol.errors import BadMessage, Code, Unavailable
from tallystick.runtime.serving import serving
from tests.client.fake_coordinator import BODY, CHAT, FakeMarket, Session, eventually

FLOOD, QUIET = "flood-key-0123456789", "quiet-key-0123456789"


class Jobs:
    """Jobs that run until they are ended. `began`: the labels of those that got a slot, in order."""

    def __init__(self, shares: KeyShares) -> None:
        self.shares = shares
        self.began: list[str] = []
        self._running: dict[int, tuple[str, asyncio.Event]] = {}
        self.waiting: set[asyncio.Task[int]] = set()

    async def ask(self, *labels: str, wait: int = 600) -> None:
        """Requests that come in this order."""
        for label in labels:
            task = asyncio.create_task(self._run(label, wait))
            self.waiting.add(task)
            await asyncio.sleep(0)

    async def _run(self, label: str, wait: int) -> int:
        async with self.shares.slot(label, wait) as left:
            over = asyncio.Event()
            self._running[len(self.began)] = label, over
            self.began.append(label)
            await over.wait()
        return left

    @property
    def labels(self) -> list[str]:
        """Those of the running jobs."""
        return [label for label, _ in self._running.values()]

    def begin_end(self, number: int | None = None) -> None:
        """Lets a job end with its next turn."""
        self._running.pop(min(self._running) if number is None else number)[1].set()

    async def end(self, *, number: int | None = None) -> None:
        """Ends the first running job, or that one."""
        self.begin_end(number)
        for _ in range(4):
            await asyncio.sleep(0)

    async def stop(self) -> None:
        """Gives all up."""
        for task in self.waiting:
            task.cancel()
        await asyncio.gather(*self.waiting, return_exceptions=True)


async def test_a_flood_does_not_keep_another_key_waiting() -> None:
    """While slots are free, one key has all of them. The other key's request gets the first that becomes free."""
    jobs = Jobs(KeyShares(3, {"a": 1, "b": 1}))
    await jobs.ask(*"aaaaaa")
    assert jobs.began == ["a"] * 3
    await jobs.ask("b")
    await jobs.end()
    assert jobs.began == [*"aaab"]
    await jobs.stop()


@pytest.mark.parametrize("slots", [1, 8])
@pytest.mark.parametrize(("weights", "lengths"), [((1, 3), (1, 1)), ((1, 1), (20, 1)), ((5, 1), (1, 4))])
async def test_slots_are_shared_by_weight(slots: int, weights: tuple[int, int], lengths: tuple[int, int]) -> None:
    """Two keys that both want more have slots for times in the ratio of their weights, however long their jobs are."""
    now = 0
    length, used = dict(zip("ab", lengths, strict=True)), Counter[str]()
    jobs = Jobs(KeyShares(slots, dict(zip("ab", weights, strict=True)), lambda: now))
    await jobs.ask(*"a" * slots)
    ends = dict.fromkeys(range(slots), length["a"])
    while now < 1_500:
        for label in "ab":
            while len(jobs.shares.shares[label].waiting) < slots:
                await jobs.ask(label)
        now += 1
        used.update(jobs.labels)
        for number in [number for number, end in ends.items() if end <= now]:
            del ends[number]
            began = len(jobs.began)
            await jobs.end(number=number)
            ends |= {at: now + length[jobs.began[at]] for at in range(began, len(jobs.began))}
    assert used["a"] * weights[1] == pytest.approx(used["b"] * weights[0], rel=0.05)
    await jobs.stop()


async def test_a_request_that_gives_up_as_a_slot_becomes_free() -> None:
    """It takes no slot, and the request whose slot it would have had ends as usual."""
    jobs = Jobs(KeyShares(1, {"a": 1, "b": 1, "c": 1}))
    await jobs.ask("a")
    (first,) = jobs.waiting
    await jobs.ask("b")
    (leaving,) = jobs.waiting - {first}
    await jobs.ask("c")
    jobs.begin_end()
    leaving.cancel()  # its turn comes after that of the job that ends
    await asyncio.wait((first, leaving))
    assert first.exception() is None
    assert jobs.began == ["a", "c"]
    await jobs.ask("b")
    assert jobs.began == ["a", "c"], "there is one slot, as before"
    await jobs.end()
    assert jobs.began == ["a", "c", "b"]
    await jobs.stop()


async def test_a_key_saves_up_no_time() -> None:
    """A key that was away for long has its share from now on, and no more."""
    now = 0
    jobs = Jobs(KeyShares(2, {"a": 1, "b": 1}, lambda: now))
    await jobs.ask("a", "a")
    now = 1_000
    await jobs.ask("a", "a", "b", "b")
    await jobs.end()
    now += 1
    await jobs.end()
    assert jobs.began == [*"aaba"]
    await jobs.stop()


async def test_the_queue_of_a_key_is_bounded() -> None:
    """As many requests of a key wait as there are slots; further ones are refused, and another key's still wait."""
    jobs = Jobs(KeyShares(2, {"a": 1, "b": 1}))
    await jobs.ask(*"aaaa")
    with pytest.raises(Unavailable, match="'a': all 2 jobs of this gateway") as refused:
        async with jobs.shares.slot("a", 600):
            pass
    assert (refused.value.code, refused.value.retry, jobs.shares.shares["a"].refused) == (Code.CLIENT_BUSY, True, 1)
    await jobs.ask("b")
    assert len(jobs.shares.shares["b"].waiting) == 1
    await jobs.stop()
    assert all(not share.running and not share.waiting for share in jobs.shares.shares.values())


async def test_a_wait_ends() -> None:
    """A request that gets no slot within its time is refused, and nobody waits for it any more."""
    jobs = Jobs(KeyShares(1, {OWN_KEY_LABEL: 1}))
    await jobs.ask(OWN_KEY_LABEL)
    with pytest.raises(Unavailable, match=r"the gateway's own key: .* within 0 s"):
        async with jobs.shares.slot(OWN_KEY_LABEL, 0):
            pass
    assert not jobs.shares.shares[OWN_KEY_LABEL].waiting
    await jobs.stop()


async def test_what_is_left_of_a_wait() -> None:
    """The job may wait for a provider only as long as its request did not wait here."""
    now = iter([0.0, 100.0, 107.9, 107.9, 108.0])
    shares = KeyShares(1, {"a": 1}, lambda: next(now))
    async with shares.slot("a", 60) as left:
        assert left == 53
    async with KeyShares(1, {}).slot("anybody", 60) as left:
        assert left == 60, "without keys there is nobody to share with"


@given(st.lists(st.tuples(st.sampled_from("abc"), st.booleans()), max_size=60), st.integers(1, 4))
def test_no_slot_is_lost_or_given_twice(steps: list[tuple[str, bool]], slots: int) -> None:
    """Whatever comes, ends or leaves: no more run than there are slots, and nobody waits while one is free."""

    async def play() -> None:
        jobs = Jobs(KeyShares(slots, {"a": 1, "b": 2, "c": 5}))
        shares = jobs.shares.shares.values()
        for label, asks in steps:
            if asks:
                await jobs.ask(label)
            elif any(share.running for share in shares):
                await jobs.end()
            elif jobs.waiting:
                jobs.waiting.pop().cancel()
                await asyncio.sleep(0)
            running, waiting = sum(share.running for share in shares), sum(len(share.waiting) for share in shares)
            assert running <= slots
            assert running == slots or not waiting
            assert all(len(share.waiting) <= slots for share in shares)
        await jobs.stop()
        assert not any(share.running or share.waiting for share in shares)

    asyncio.run(play())


@pytest.mark.parametrize("weight", [0, 1_001])
def test_weights_are_bounded(weight: int) -> None:
    """A key without a share could wait for ever."""
    with pytest.raises(BadMessage, match="weight"):
        ApiKey(label="a", secret=FLOOD, weight=weight)


async def test_keys_of_one_gateway(fake: FakeMarket, wallet: Signer, config: ClientConfig) -> None:
    """A second key is served next, although more requests of the first one came before it; the metrics say who waits."""
    keys = (ApiKey(label="flood", secret=FLOOD), ApiKey(label="quiet", secret=QUIET))
    config = replace(config, api_keys=keys, key_slots=1)
    go_on, bodies = asyncio.Event(), list[str]()

    async def script(session: Session) -> None:
        await session.match()
        bodies.append(session.request["messages"][0]["content"])
        await go_on.wait()
        await session.answer()
        await session.chunk(b"{}", last=True)
        await session.finish()

    fake.script = script
    async with AsyncExitStack() as stack:
        market = await stack.enter_async_context(Market(fake.url, wallet, config))
        port = await stack.enter_async_context(serving(build_app(market), "127.0.0.1", 0))
        http = await stack.enter_async_context(
            httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=120)
        )

        async def ask(key: str, text: str) -> int:
            body = BODY | {"messages": [{"role": "user", "content": text}]}
            return (await http.post(CHAT, json=body, headers={"authorization": f"Bearer {key}"})).status_code

        async def metrics() -> str:
            return (await http.get("/metrics", headers={"authorization": f"Bearer {QUIET}"})).text

        flood = [asyncio.create_task(ask(FLOOD, "first"))]
        await eventually(lambda: bodies == ["first"])
        flood.append(asyncio.create_task(ask(FLOOD, "second")))
        await eventually(lambda: _has(metrics(), 'tallystick_gateway_key_waiting{label="flood"} 1.0'))
        quiet = asyncio.create_task(ask(QUIET, "quiet"))
        await eventually(lambda: _has(metrics(), 'tallystick_gateway_key_waiting{label="quiet"} 1.0'))
        assert await ask(FLOOD, "third") == 503
        assert 'tallystick_gateway_key_refused_total{label="flood"} 1.0' in await metrics()
        go_on.set()
        assert await asyncio.gather(*flood, quiet) == [200] * 3
    assert bodies == ["first", "quiet", "second"]


async def _has(text: object, line: str) -> bool:
    return line in str(await text)  # type: ignore[misc]
