"""What every long-running process of ours needs around the market: config, keystores, logs, durable storage, serving."""
