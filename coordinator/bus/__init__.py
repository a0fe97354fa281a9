"""The coordinator's buses: frames within a process, and notices between replicas over NATS. May import `domain` and `ports`."""
