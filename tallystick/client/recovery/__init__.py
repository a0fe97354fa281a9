"""Lost streams, lost state and the chain: what brings the ledger up to date. May import `ledger`, `coordinator`, `receipts`."""
