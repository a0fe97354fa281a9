"""The client's side of the market: the SDK, the payer and its ledger, and the local OpenAI-compatible gateway."""
