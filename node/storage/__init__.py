"""The node's durable state in SQLite, its backup and its earnings reports. May import `domain` and `ports`."""
