"""Shorthands of `Market`: a chat, a streamed chat and a batch in one line each. All of them are built on `submit`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Unpack

from tallystick.client.config import ClientConfig
from tallystick.client.jobs.job import Job
from tallystick.client.jobs.result import Result, require_success
from tallystick.client.sdk.batch import Batch, BatchOptions, BatchResult, RequestBody
from tallystick.client.sdk.stream import TextStream
from tallystick.client.selection.options import ProviderCriteria, RequestOptions
from tallystick.protocol.routes import CHAT, JSON
from tallystick.protocol.types import Amount, JobId


class ConvenienceMethods(ABC):
    """The shorthands of a `Market`."""

    config: ClientConfig
    _random: Callable[[int], bytes]
    _draining: bool

    @abstractmethod
    async def submit(
        self,
        path: str,
        body: RequestBody,
        *,
        model: str | None = None,
        models: Collection[str] = (),
        max_cost: Amount | None = None,
        keep: bool = False,
        key: str | None = None,
        label: str | None = None,
        affinity: str | None = None,
        wait: int | None = None,
        hedge_after: float | None = None,
        priority: str | None = None,
        content_type: str = JSON,
        share_prompt: bool | None = None,
        private: bool = False,
        **choice: Unpack[ProviderCriteria],
    ) -> Job:
        """Places a job; see `Market.submit`."""

    @abstractmethod
    async def _possible_cost(self, job: JobId) -> Amount:
        """What a failed job may still cost, in base units."""

    async def chat(
        self, /, model: str, messages: Sequence[Mapping[str, Any]], *, tally: RequestOptions | None = None, **options: Any
    ) -> Result:
        """Runs one chat completion that is not streamed; `result.text` is the answer.

        `options` are OpenAI's (max_tokens, temperature, …). `tally` holds the options of `submit` for providers, cost and
        workload: `{"max_cost": Amount(2_000), "sort": "latency"}`. Raises TallyError, also for an error answer of the engine.
        """
        body = {"model": model, "messages": list(messages)} | options | {"stream": False}
        async with await self.submit(CHAT, body, **(tally or {})) as job:
            return require_success(await job.result())

    def stream(
        self, /, model: str, messages: Sequence[Mapping[str, Any]], *, tally: RequestOptions | None = None, **options: Any
    ) -> TextStream:
        """Runs one chat completion and streams its text: `async for text in market.stream(…)`.

        Afterwards `await stream.result()` has the receipt and the cost. Takes the same options as `chat`; iterating raises the
        same errors.
        """
        body = {"model": model, "messages": list(messages)} | options | {"stream": True}
        return TextStream(lambda: self.submit(CHAT, body, **(tally or {})))

    def map(
        self,
        requests: Iterable[RequestBody] | AsyncIterable[RequestBody],
        *,
        path: str = CHAT,
        concurrency: int = 16,
        ordered: bool = True,
        retries: int = 2,
        **options: Unpack[RequestOptions],
    ) -> AsyncGenerator[BatchResult, None]:
        """Runs many jobs, at most `concurrency` at a time.

            async for done in market.map(bodies):
                print(done.index, done.unwrap().text)

        `requests` are bodies for the route `path`. The iterable may be endless: at most twice `concurrency` requests are held
        whose results were not yielded yet. Results come in the order of the requests, or as they finish if `ordered` is False. A
        failed attempt is retried with growing waits if its error says `retry` and it cannot be billed any more. A request that
        fails for good yields a BatchResult with its `error`, and the others go on. Leaving the loop cancels running jobs; use
        `contextlib.aclosing` to do that at once. The config's `max_jobs` bounds `concurrency`. Raises BadMessage for impossible
        options. Iterating raises the errors of `requests` itself.
        """
        batch_options = BatchOptions(min(concurrency, self.config.max_jobs), ordered, retries)

        async def submit(body: RequestBody) -> Job:
            return await self.submit(path, body, **options)

        return Batch(submit, self._possible_cost, batch_options, self._random, lambda: self._draining).run(requests)
