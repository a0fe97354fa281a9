"""Streams an answer; its receipt and cost are available at the end."""

import asyncio
import os

from tallystick import Market, format_amount, open_wallet


async def main() -> None:
    """Streams one chat."""
    wallet = open_wallet(os.environ.get("TALLYSTICK_WALLET", "default"))
    async with Market(os.environ.get("TALLYSTICK_COORDINATOR", "http://127.0.0.1:8420"), wallet) as market:
        model = os.environ.get("TALLYSTICK_MODEL") or (await market.models())[0].id
        stream = market.stream(model, [{"role": "user", "content": "What is a tally stick?"}], max_tokens=200)
        async for text in stream:
            print(text, end="", flush=True)
        result = await stream.result()
        print(f"\n{format_amount(result.cost)} dollars")
        if result.receipt:  # an upstream of your own signs none
            receipt = result.receipt.message
            print(f"receipt {receipt.seq} of this tab: {receipt.output_tokens} output tokens")


asyncio.run(main())
