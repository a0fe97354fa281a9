"""Jobs on the node: start, run against the engine, delivery, receipt. May import `domain` and `ports`."""
