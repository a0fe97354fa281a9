"""Parts of `scripts/chaos`: seeded schedules of faults, proxies that notice a job's phases, the processes, the checks."""
