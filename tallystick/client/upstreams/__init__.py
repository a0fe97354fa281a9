"""Hosted upstreams: OpenAI-compatible APIs with the user's own key. May import `ledger` and the rooms below it."""
