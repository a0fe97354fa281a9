"""Who may have the job: a region, a highest price, a highest cost; and why each provider would do or not."""

import os

from tallystick import RequestOptions, Requirements, SyncMarket, TallyError, format_amount, open_wallet, parse_amount

wallet = open_wallet(os.environ.get("TALLYSTICK_WALLET", "default"))
with SyncMarket(os.environ.get("TALLYSTICK_COORDINATOR", "http://127.0.0.1:8420"), wallet) as market:
    model = os.environ.get("TALLYSTICK_MODEL") or market.models()[0].id
    region, dearest = Requirements(region=("eu-west",)), parse_amount("2.00")  # dollars per million tokens
    for one in market.explain(model, require=region, max_output_price=dearest):
        price = format_amount(one.ask.output_price)
        print(f"{one.ask.provider} at {price} in {one.ask.spec.region}: {one.why or 'will do'}")
    only: RequestOptions = {"require": region, "max_output_price": dearest, "max_cost": parse_amount("0.01"), "sort": "latency"}
    try:
        result = market.chat(model, [{"role": "user", "content": "Where are you?"}], max_tokens=100, tally=only)
    except TallyError as error:
        print(f"no answer, {error.fault.value}'s fault: {error}; {'try again later' if error.retry else 'this will not change'}")
    else:
        print(f"{result.provider} answered for {format_amount(result.cost)}")
