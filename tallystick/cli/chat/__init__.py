"""`tally chat`: conversations in the terminal. May import the shared modules at the root of the CLI."""
