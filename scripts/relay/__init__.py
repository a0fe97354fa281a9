"""Parts of scripts/bench relay: a mock upstream, the processes under test, and the load."""
