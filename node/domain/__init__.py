"""Rules of a node without clock or I/O: admission, tabs, prices, metering. Imports no other room."""
