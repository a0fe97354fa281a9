"""The coordinator's stores: SQL and in memory. May import `domain` and `ports`."""
