"""Setting up and operating a provider's node. May import the shared modules at the root of the CLI."""
