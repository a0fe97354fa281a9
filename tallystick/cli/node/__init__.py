"""`tally node`: set up, check and watch a provider's node. May import the shared modules at the root of the CLI."""
