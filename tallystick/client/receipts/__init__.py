"""Checks of what a provider signed: receipts, proofs, evidence, token counts. May import `orders`, `openai`, `config`."""
