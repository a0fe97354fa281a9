"""What is done with a market in a line: on top of `submit`, nothing that a program could not do itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Unpack

from tallystick.client.config import ClientConfig
from tallystick.client.jobs.job import Job
from tallystick.client.jobs.result import Result, require_success
from tallystick.client.sdk.batch import Body, Done, Manner, Many
from tallystick.client.sdk.stream import TextStream
from tallystick.client.selection.options import Choice, Options
from tallystick.protocol.routes import CHAT, JSON
from tallystick.protocol.types import Amount, JobId


class Verbs(ABC):
    """The verbs of a `Market`."""

    config: ClientConfig
    _random: Callable[[int], bytes]
    _draining: bool

    @abstractmethod
    async def submit(
        self,
        path: str,
        body: Body,
        *,
        model: str | None = None,
        models: Collection[str] = (),
        max_cost: Amount | None = None,
        keep: bool = False,
        key: str | None = None,
        label: str | None = None,
        affinity: str | None = None,
        content_type: str = JSON,
        **choice: Unpack[Choice],
    ) -> Job:
        """Places a job."""

    @abstractmethod
    async def _at_stake(self, job: JobId) -> Amount:
        """What a job that failed may still cost, in base units."""

    async def chat(
        self, /, model: str, messages: Sequence[Mapping[str, Any]], *, tally: Options | None = None, **options: Any
    ) -> Result:
        """One chat completion, not streamed; options are OpenAI's (max_tokens, temperature, …). `result.text` is the answer.

        `tally` is what `submit` takes of providers, cost and workload: `{"max_cost": Amount(2_000), "sort": "latency"}`. Raises
        TallyError, also for an error answer of the engine.
        """
        body = {"model": model, "messages": list(messages)} | options | {"stream": False}
        async with await self.submit(CHAT, body, **(tally or {})) as job:
            return require_success(await job.result())

    def stream(
        self, /, model: str, messages: Sequence[Mapping[str, Any]], *, tally: Options | None = None, **options: Any
    ) -> TextStream:
        """A chat completion as it comes: `async for text in market.stream(…)`; `await stream.result()` afterwards has receipt and
        cost. Takes what `chat` takes; iterating raises what `chat` raises.
        """
        body = {"model": model, "messages": list(messages)} | options | {"stream": True}
        return TextStream(lambda: self.submit(CHAT, body, **(tally or {})))

    def map(
        self,
        requests: Iterable[Body] | AsyncIterable[Body],
        *,
        path: str = CHAT,
        at_once: int = 16,
        ordered: bool = True,
        retries: int = 2,
        **options: Unpack[Options],
    ) -> AsyncGenerator[Done, None]:
        """Many jobs, at most `at_once` under way: `async for done in market.map(bodies): print(done.index, done.unwrap().text)`.

        Requests are the bodies of one route and may be endless: one is taken when there is room for it, and at most twice
        `at_once` are held that were not yielded. Results come in the requests' order, or else as they end. One that fails with
        an error that says `retry` is tried again, later and later, unless it may be billed all the same. What fails for good is a
        Done with its `error`, and the others go on. Leaving the loop cancels what runs (`contextlib.aclosing` makes sure of
        when). Raises BadMessage for numbers that cannot work; iterating raises what `requests` raises. The config's `max_jobs`
        bounds `at_once`.
        """
        manner = Manner(min(at_once, self.config.max_jobs), ordered, retries)

        async def submit(body: Body) -> Job:
            return await self.submit(path, body, **options)

        return Many(submit, self._at_stake, manner, self._random, lambda: self._draining).run(requests)
