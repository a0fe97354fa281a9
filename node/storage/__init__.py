"""The node's durable state in SQLite, its backup and its earnings. May import `domain` and `ports`."""
