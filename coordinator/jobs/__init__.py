"""A job at the coordinator, from its order to its acknowledged receipt. May import `domain` and `ports`."""
