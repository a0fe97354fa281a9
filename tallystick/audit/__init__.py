"""Statistics of checked answers: tests of one audit, verdicts over many, thresholds, integrity. Pure: no clock, no I/O.

An audit compares what a provider returned with what a referee, who has the same model, says of the same tokens. Every test has a
blind spot, so several are run; docs/explanation/trust.md says which test sees what.
"""
