"""Restricts the providers of a job by region, price and cost, and lists why each provider qualifies or not."""

import os

from tallystick import RequestOptions, Requirements, SyncMarket, TallyError, format_amount, open_wallet, parse_amount

wallet = open_wallet(os.environ.get("TALLYSTICK_WALLET", "default"))
with SyncMarket(os.environ.get("TALLYSTICK_COORDINATOR", "http://127.0.0.1:8420"), wallet) as market:
    model = os.environ.get("TALLYSTICK_MODEL") or market.models()[0].id
    region, max_price = Requirements(region=("eu-west",)), parse_amount("2.00")  # dollars per million tokens
    for explained in market.explain(model, require=region, max_output_price=max_price):
        price = format_amount(explained.ask.output_price)
        print(f"{explained.ask.provider} at {price} in {explained.ask.spec.region}: {explained.reason or 'qualifies'}")
    options: RequestOptions = {
        "require": region,
        "max_output_price": max_price,
        "max_cost": parse_amount("0.01"),
        "sort": "latency",
    }
    try:
        result = market.chat(model, [{"role": "user", "content": "Where are you?"}], max_tokens=100, tally=options)
    except TallyError as error:
        print(f"no answer, {error.fault.value}'s fault: {error}; {'retry later' if error.retry else 'a retry will not help'}")
    else:
        print(f"{result.provider} answered for {format_amount(result.cost)} dollars")
