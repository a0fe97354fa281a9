"""The coordinator's server side: control plane, jobs route, node links. May import `jobs`, `domain` and `ports`."""
