"""One job, from its signed orders to its result. May import every room of the client but `sdk` and `gateway`."""
