"""Lost streams, lost ledger files and the chain: bring the ledger up to date. May import `ledger`, `coordinator`, `receipts`."""
