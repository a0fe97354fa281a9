"""The coordinator's stores, in SQL and in memory. May import `domain` and `ports`."""
