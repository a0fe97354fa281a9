"""The `tally` command: sub-commands by subject, which read options and print results; the work is done by the other packages."""
