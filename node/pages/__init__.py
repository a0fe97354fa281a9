"""Pages of a node for its provider: what it does now, its income, where its money is.

Views are pure; routes read the status report and the store. It imports storage, domain and the shared web room; the service
imports it.
"""
