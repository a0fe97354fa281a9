"""One job, from signed orders to a result. May import every room but `sdk` and `gateway`."""
