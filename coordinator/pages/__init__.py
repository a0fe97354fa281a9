"""Pages of the market for browsers: models, providers, the match log, the state of this coordinator.

Views are pure; routes read the market. It imports jobs, domain and the shared web room; the app alone imports it.
"""
