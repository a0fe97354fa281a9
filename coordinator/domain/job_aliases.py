"""Aliases of jobs in the leaves of reports, which only the coordinator can take back to the job. Pure.

A provider knows the payer of each of its jobs. If a leaf named the job, the provider would learn which payers audit, first of all
the payer of the coordinator's probes, and behave for these alone. An alias is the job's id in one block of AES under a key of the
coordinator: equal for the same job, so that an audit which counts twice shows, and different for different jobs.
"""

from __future__ import annotations

import hmac

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from tallystick.protocol.types import JobId

_LABEL = b"tallystick job aliases in the match log"


class JobAliases:
    """The aliases of one coordinator. `secret`: its key."""

    def __init__(self, secret: bytes) -> None:
        key = hmac.digest(secret, _LABEL, "sha256")
        self._cipher = Cipher(algorithms.AES(key), modes.ECB())  # noqa: S305 - one block, and no id occurs twice

    def alias_of(self, job: JobId) -> bytes:
        """The alias of a job, 16 bytes."""
        return self._cipher.encryptor().update(job)

    def job_of(self, alias: bytes) -> JobId:
        """The job that has this alias of 16 bytes."""
        return JobId(self._cipher.decryptor().update(alias))
