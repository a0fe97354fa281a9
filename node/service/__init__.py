"""The daemon: config, composition, metrics, status. May import every room of the node."""
