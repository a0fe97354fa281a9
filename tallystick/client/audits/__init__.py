"""Audits of answers that this wallet paid for: which are checked, by which referees, and what follows. May import jobs and below.

Decisions are pure (`consent`, `planning`, `findings`, `planted`, `synthetic`); `store`, `kept_jobs` and `referees` do the I/O.
Nothing here is on the path of a job.
"""
