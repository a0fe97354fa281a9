"""The `tally` command. Each sub-command imports only the room that it starts."""
