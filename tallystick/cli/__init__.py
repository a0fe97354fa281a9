"""The `tally` command: sub-commands by subject, which read options and print results. May import every other package, since only
the CLI starts the daemons; its own rooms may import the shared modules beside this file.
"""
