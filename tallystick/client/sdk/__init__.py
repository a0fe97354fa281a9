"""The Python interface: `Market`, its synchronous form, batches. May import every room but `gateway`."""
