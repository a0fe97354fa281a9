"""The client's side of the market: SDK, ledger, local gateway. May import `protocol`, `chain` and `runtime`, never a side."""
