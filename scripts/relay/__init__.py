"""Parts of `scripts/bench relay`: a mock engine, the processes under test, and the load."""
