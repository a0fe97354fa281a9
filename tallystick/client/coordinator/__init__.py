"""Typed access to the coordinator's HTTP API, and the check of its deployment. May import `config`."""
