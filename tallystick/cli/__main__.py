"""`python -m tallystick.cli` is `tally`."""

from tallystick.cli.entry import main

main()
