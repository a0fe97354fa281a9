"""Cancels a job after a few words; only what was delivered is billed."""

import asyncio
import os

from tallystick import Market, format_amount, open_wallet


async def main() -> None:
    """Reads the beginning of one answer."""
    wallet = open_wallet(os.environ.get("TALLYSTICK_WALLET", "default"))
    async with Market(os.environ.get("TALLYSTICK_COORDINATOR", "http://127.0.0.1:8420"), wallet) as market:
        model = os.environ.get("TALLYSTICK_MODEL") or (await market.models())[0].id
        pieces: list[str] = []
        # Leaving the block cancels a job that still runs, also on Ctrl-C. cancel() does so at once and returns the bill.
        async with market.stream(model, [{"role": "user", "content": "Tell me a long story."}], max_tokens=1_000) as stream:
            async for text in stream:
                pieces.append(text)
                if len(pieces) == 5:
                    result = await stream.cancel()
                    break
            else:
                result = await stream.result()
        print("".join(pieces))
        if result is None:
            print("the receipt has not arrived yet; `tally spending` will list it")
        else:
            print(f"{result.outcome.name.lower()}: {result.usage.output} output tokens, {format_amount(result.cost)} dollars")


asyncio.run(main())
