"""Shorthands of `Market`: a chat, a streamed chat and a batch in one line each. All of them are built on `submit`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Unpack

from tallystick.client.config import ClientConfig
from tallystick.client.jobs.job import Job
from tallystick.client.jobs.result import Result, require_success
from tallystick.client.ledger.queries import KnownJob
from tallystick.client.receipts.answer_evidence import EvidenceState, check_rows
from tallystick.client.sdk.batch import Batch, BatchOptions, BatchResult, RequestBody
from tallystick.client.sdk.stream import TextStream
from tallystick.client.selection.options import ProviderCriteria, RequestOptions
from tallystick.protocol.errors import BadReceipt, Code, Refusal
from tallystick.protocol.routes import CHAT, EVIDENCE_ROUTE, JSON
from tallystick.protocol.token_evidence import EvidenceRow
from tallystick.protocol.types import ZERO_HASH, Amount, JobId


class ConvenienceMethods(ABC):
    """The shorthands of a `Market`."""

    config: ClientConfig
    _random: Callable[[int], bytes]

    @property
    @abstractmethod
    def _draining(self) -> bool:
        """Whether it accepts no more jobs."""

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

    @abstractmethod
    async def find(self, job: JobId) -> KnownJob | None:
        """A job of the ledger; see `Market.find`."""

    async def fetch_evidence(self, job: JobId) -> tuple[EvidenceRow, ...]:
        """The rows of evidence of an earlier job, if they did not come with its answer. Its provider keeps them for a day.

        Places a job at no cost with that provider. Raises Refusal for a job without evidence, or one that its provider no longer
        has rows of, BadReceipt for rows that the job's receipt does not commit to, and the errors of `submit`.
        """
        known = await self.find(job)
        receipt = None if known is None or known.receipt is None else known.receipt.message
        if known is None or receipt is None or receipt.evidence_root == ZERO_HASH:
            text = f"job: expected a job of this wallet whose receipt commits to evidence, got {job.hex()}"
            raise Refusal(Code.BAD_MESSAGE, text)
        placed = next(order for order in known.orders if order.digest == receipt.order_hash)
        body = {"model": known.model, "job": job.hex()}
        async with await self.submit(EVIDENCE_ROUTE, body, pin=[receipt.provider]) as fetched:
            result = require_success(await fetched.result())
        evidence = check_rows(receipt, result.body, placed.terms.max_output_tokens)
        if evidence.state is not EvidenceState.CHECKED:
            raise BadReceipt(evidence.reason or "the provider sent no rows of the evidence that its receipt commits to")
        return evidence.rows

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
