"""Pages of the gateway for browsers: what a wallet spent, its jobs, and a chat to try a model.

Views are pure; routes read the wallet's ledger. It imports the SDK, the ledger and the shared web room; the gateway imports it.
"""
