"""Parts of `scripts/simulate market`: a virtual clock, the parties, the coordinator's own code between them, and the report."""
