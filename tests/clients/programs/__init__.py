"""Run by the environments of those clients, not by ours."""
