"""Programs that run in the clients' environments."""
