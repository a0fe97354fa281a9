"""The daemon: configuration, composition, engine health, metrics, status. May import every package of the node."""
