"""The connection to a coordinator and everything sent over it outside of jobs. May import `jobs`, `domain` and `ports`."""
