"""In-memory implementations of the node's ports, for tests. May import `domain` and `ports`."""
