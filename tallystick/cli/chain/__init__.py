"""Local chains, deployments and the contract's state. May import the shared modules at the root of the CLI."""
