"""`tally start` and `tally demo`: a whole market on this machine. May import `chat`, `money` and the shared modules."""
