"""The node's view of the escrow, and the collection of what it earned. May import `domain` and `ports`."""
