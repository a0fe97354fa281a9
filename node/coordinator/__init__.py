"""The link to a coordinator and what is sent over it outside of jobs. May import `jobs`, `domain` and `ports`."""
