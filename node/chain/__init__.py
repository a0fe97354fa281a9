"""The escrow contract as the node sees it, and the collection of earnings. May import `domain` and `ports`."""
