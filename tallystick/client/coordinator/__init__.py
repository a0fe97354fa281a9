"""The coordinator's HTTP API as typed calls, and the pin on its deployment. May import `config`."""
