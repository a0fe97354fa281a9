"""The payer's side of the market: SDK, ledger of orders and receipts, OpenAI-compatible gateway.

May import `protocol`, `chain` and `runtime`, never the coordinator or the node.
"""
