"""The payer's durable state: orders, tabs, budgets, idempotency keys, in SQLite. May import `receipts`, `orders`, `config`."""
