"""Pure rules of the coordinator, without clock or I/O: asks, matching, reputation, exposure, limits. Imports no other room."""
