"""A burst of more requests than there are slots, through the whole market: the requests wait instead of failing."""

from __future__ import annotations

import asyncio
from typing import Any

import openai

BURST = 40


async def test_a_burst_of_the_official_sdk_is_answered(market: dict[str, Any]) -> None:
    """Every stream of a burst is answered at its first attempt; none is refused because all slots are busy."""
    async with openai.AsyncOpenAI(base_url=market["gateway"] + "/v1", api_key="-", max_retries=0, timeout=600) as client:

        async def ask(number: int) -> str:
            messages: Any = [{"role": "user", "content": f"Count to {number}."}]
            stream = await client.chat.completions.create(model=market["model"], messages=messages, max_tokens=8, stream=True)
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices])

        answers = await asyncio.gather(*(ask(number) for number in range(BURST)))
    assert all(answers)
