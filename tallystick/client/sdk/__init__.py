"""The Python interface: `Market`, its synchronous form and batches. May import every room of the client but `gateway`."""
