"""`tally chain`, `tally deploy`, `tally contract`. May import the shared modules at the root of the CLI."""
