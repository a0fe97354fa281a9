"""What the coordinator serves: control plane, job route, node links. May import `jobs`, `domain` and `ports`."""
