"""Which providers a job is offered to: options of a request, shortlists, affinity. May import `ledger` and the rooms under it."""
