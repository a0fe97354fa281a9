"""A market with cheaters on real engines (`scripts/bench trust`): models, cheating engines, audits, figures. May import all."""
