"""Hosted upstreams: OpenAI-compatible APIs with the user's own key, as members of aliases. May import `ledger` and rooms below it."""
