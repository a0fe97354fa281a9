"""Enough after a few words: the job is cancelled, and what had been delivered is what is billed."""

import asyncio
import os

from tallystick import Market, format_amount, open_wallet


async def main() -> None:
    """Reads the beginning of one chat."""
    wallet = open_wallet(os.environ.get("TALLYSTICK_WALLET", "default"))
    async with Market(os.environ.get("TALLYSTICK_COORDINATOR", "http://127.0.0.1:8420"), wallet) as market:
        model = os.environ.get("TALLYSTICK_MODEL") or (await market.models())[0].id
        pieces: list[str] = []
        # Leaving the block cancels what still runs, also on Ctrl-C; cancel() does it here and now, and brings the bill.
        async with market.stream(model, [{"role": "user", "content": "Tell me a long story."}], max_tokens=1_000) as stream:
            async for text in stream:
                pieces.append(text)
                if len(pieces) == 5:
                    bill = await stream.cancel()
                    break
            else:
                bill = await stream.result()
        print("".join(pieces))
        if bill is None:
            print("the bill is not known yet; `tally spending` will have it")
        else:
            print(f"{bill.outcome.name.lower()}: {bill.usage.output} output tokens, {format_amount(bill.cost)}")


asyncio.run(main())
