"""The coordinator's view of the escrow, and the settlement of claims. May import `domain` and `ports`."""
