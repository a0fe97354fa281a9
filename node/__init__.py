"""The node: a provider's daemon, which wraps an engine and sells what it writes."""
