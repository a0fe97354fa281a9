"""Rules of the coordinator without clock or I/O: the ask book, matching, exposure, limits. Imports no other room."""
