"""Parts of `scripts/bench load`: a crowd of nodes and streams on one coordinator, and floods of strangers."""
