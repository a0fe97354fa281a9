"""Parts of scripts/bench relay: a mock upstream, the measured processes, and the load."""
