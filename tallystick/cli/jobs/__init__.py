"""Jobs, receipts, models and overclaims as a payer looks at them. May import the shared modules at the root of the CLI."""
