"""A payer's view of jobs, receipts, models and overclaims. May import the shared modules at the root of the CLI."""
