"""Checks of what a provider signed: receipts, proofs, evidence, recounted tokens. May import `openai`, `config`."""
