"""What makes several processes one coordinator: the list of replicas and their notices. May import `jobs`, `domain`, `ports`."""
