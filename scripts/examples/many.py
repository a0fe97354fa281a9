"""Runs many jobs with bounded concurrency and a progress bar; a failed job is reported and stops no other."""

import asyncio
import os

from rich.progress import Progress

from tallystick import Market, format_amount, open_wallet

QUESTIONS = [f"What is {number} times {number}?" for number in range(1, 25)]


async def main() -> None:
    """Asks all questions."""
    wallet = open_wallet(os.environ.get("TALLYSTICK_WALLET", "default"))
    async with Market(os.environ.get("TALLYSTICK_COORDINATOR", "http://127.0.0.1:8420"), wallet) as market:
        model = os.environ.get("TALLYSTICK_MODEL") or (await market.models())[0].id
        # A generator: requests are made when they are needed, so there may be millions.
        bodies = ({"model": model, "messages": [{"role": "user", "content": text}], "max_tokens": 100} for text in QUESTIONS)
        answers, cost = [""] * len(QUESTIONS), 0
        with Progress() as progress:
            bar = progress.add_task("asking", total=len(QUESTIONS))
            async for done in market.map(bodies, concurrency=8, ordered=False, label="examples"):
                progress.advance(bar)
                if done.error is not None:
                    progress.print(f"{QUESTIONS[done.index]} {done.error.fault.value}'s fault: {done.error}")
                    continue
                result = done.unwrap()
                answers[done.index] = result.text
                cost += result.cost
    print(f"{sum(map(bool, answers))} of {len(QUESTIONS)} answered for {format_amount(cost)} dollars")


asyncio.run(main())
