"""One chat without async: prints the answer, the provider and the cost."""

import os

from tallystick import SyncMarket, format_amount, open_wallet

wallet = open_wallet(os.environ.get("TALLYSTICK_WALLET", "default"))
with SyncMarket(os.environ.get("TALLYSTICK_COORDINATOR", "http://127.0.0.1:8420"), wallet) as market:
    model = os.environ.get("TALLYSTICK_MODEL") or market.models()[0].id
    result = market.chat(model, [{"role": "user", "content": "What is a tally stick?"}], max_tokens=200)
    print(result.text)
    print(f"{result.usage.input} + {result.usage.output} tokens from {result.provider} cost {format_amount(result.cost)} dollars")
