"""Which providers a job is offered to: criteria, shortlists, affinity. May import `ledger` and the rooms below it."""
