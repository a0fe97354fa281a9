"""The life of a job, from its order to its acknowledged receipt. May import `domain` and `ports`."""
