"""Wallets and the payer's money on chain. May import `jobs` and the shared modules at the root of the CLI."""
