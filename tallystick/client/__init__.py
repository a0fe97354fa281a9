"""The payer's side of the market: the SDK, the ledger of orders and receipts, and the OpenAI-compatible gateway."""
