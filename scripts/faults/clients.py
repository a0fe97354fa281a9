"""The clients of the market under test: they ask without a break, repeat what fails with its idempotency key, and keep count."""

from __future__ import annotations

import asyncio
import random
import re
import time
from dataclasses import dataclass, field

import aiohttp

from scripts.faults.site import Site
from scripts.relay.mock import MODEL

CLIENTS = 3
RETRY_SECONDS = 0.1
THINK_SECONDS = 0.15
"""Between a client's answer and its next request. Without it they would use up the refusals that a node grants one payer."""
REQUEST_SECONDS = 120.0
CHUNKS = (4, 40)
GAP_SECONDS = 0.01
_WORD = re.compile(rb'"content":"word')


@dataclass(slots=True)
class Request:
    """One request by its idempotency key, which is repeated until its answer is final.

    `answer`: how many words came, if the answer came whole. `refusal`: the final error otherwise.
    """

    key: str
    chunks: int
    answer: int | None = None
    refusal: str = ""
    tries: int = 0


@dataclass(slots=True)
class Clients:
    """Clients of one gateway. `last_answers` has the monotonic time of each client's newest whole answer."""

    site: Site
    prefix: str
    chance: random.Random
    requests: list[Request] = field(default_factory=list)
    last_answers: list[float] = field(default_factory=lambda: [0.0] * CLIENTS)
    _answered: asyncio.Event = field(default_factory=asyncio.Event)
    _stopping: bool = False
    _loops: list[asyncio.Task[None]] = field(default_factory=list)

    def start(self) -> None:
        """Begins to ask."""
        self._loops = [asyncio.create_task(self._ask_on(number)) for number in range(CLIENTS)]

    async def stop(self) -> None:
        """Asks nothing new, and waits until all requests have their final answer. Raises what a client did not expect."""
        self._stopping = True
        await asyncio.gather(*self._loops)

    async def cancel(self) -> None:
        """Ends at once."""
        for loop in self._loops:
            loop.cancel()
        await asyncio.gather(*self._loops, return_exceptions=True)

    async def outage(self, since: float, seconds: float) -> float:
        """Waits until each client has a whole answer that is newer than a monotonic time. Returns how long the last one waited.

        Raises TimeoutError.
        """
        first: dict[int, float] = {}
        async with asyncio.timeout(seconds):
            while True:
                first |= {n: at for n, at in enumerate(self.last_answers) if at > since and n not in first}
                if len(first) == CLIENTS:
                    return max(first.values()) - since
                self._answered.clear()
                await self._answered.wait()

    async def _ask_on(self, client: int) -> None:
        number = 0
        while not self._stopping:
            number += 1
            request = Request(f"{self.prefix}-{client}-{number}", self.chance.randint(*CHUNKS))
            self.requests.append(request)
            await self.ask(request)
            if request.answer is not None:
                self.last_answers[client] = time.monotonic()
                self._answered.set()
            await asyncio.sleep(THINK_SECONDS)

    async def ask(self, request: Request) -> None:
        """Sends a request until its answer is final."""
        while not await self._try(request):  # noqa: ASYNC110 - what is waited for is in other processes
            await asyncio.sleep(RETRY_SECONDS)

    async def _try(self, request: Request) -> bool:
        """Sends a request once. Returns whether the answer is final."""
        body = {
            "model": MODEL,
            "messages": [{"role": "user", "content": f"question {request.key}"}],
            "stream": True,
            "max_tokens": 200,
            "user": f"{request.chunks} {GAP_SECONDS}",
        }
        request.tries += 1
        url, headers = f"{self.site.gateway}/v1/chat/completions", {"idempotency-key": request.key}
        timeout = aiohttp.ClientTimeout(total=REQUEST_SECONDS)
        try:
            async with self.site.session.post(url, json=body, headers=headers, timeout=timeout) as response:
                status, content = response.status, await response.read()
        except (aiohttp.ClientError, OSError, TimeoutError):
            return False
        if status in (502, 503, 504) and b'"retry":true' in content:
            return False
        if status == 200 and b"[DONE]" in content:
            request.answer, request.refusal = len(_WORD.findall(content)), ""
        else:
            request.refusal = f"{status} {content[-400:]!r}"
        return True
