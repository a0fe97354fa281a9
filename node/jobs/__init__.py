"""A job on a node: which one starts, its run against the engine, its delivery, its receipt. May import `domain` and `ports`."""
