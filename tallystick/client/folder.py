"""The folder of proofs: JOB.json of each job, as much as fits, the newest."""

from __future__ import annotations

import asyncio
from pathlib import Path

import structlog

from tallystick.client.config import MIB, ClientConfig
from tallystick.client.proof import Proof
from tallystick.protocol.types import JobId
from tallystick.runtime.keys import write_private

log = structlog.get_logger()


class ProofFolder:
    """Files that only their owner can read, `limit` bytes of them at most. A disk that fails costs the proof, not the job."""

    def __init__(self, path: Path, limit: int) -> None:
        self.path, self._limit = path, limit
        self._sizes: dict[Path, int] | None = None
        self._writing = asyncio.Lock()

    @classmethod
    def of(cls, config: ClientConfig) -> ProofFolder | None:
        """The one that a config names, if it does."""
        return None if config.proofs is None else cls(config.proofs, config.proofs_mib * MIB)

    async def put(self, job: JobId, proof: Proof) -> None:
        """Stores the proof of a job, and drops the oldest ones that then are too much."""
        async with self._writing:
            try:
                await asyncio.to_thread(self._put, self.path / f"{job.hex()}.json", proof)
            except OSError as error:
                log.warning("a proof was not stored", job=job.hex(), error=str(error))

    def _put(self, path: Path, proof: Proof) -> None:
        data = proof.dumps()
        if self._sizes is None:
            self._sizes = _sizes(self.path)
        self._sizes[path] = len(data)
        while sum(self._sizes.values()) > self._limit and self._sizes:
            oldest = next(iter(self._sizes))
            oldest.unlink(missing_ok=True)
            del self._sizes[oldest]
        if path in self._sizes:
            write_private(path, data)


def _sizes(folder: Path) -> dict[Path, int]:
    """Bytes of the proofs in a folder, oldest first."""
    found = [(path, path.stat()) for path in folder.glob("*.json")] if folder.exists() else []
    return {path: stat.st_size for path, stat in sorted(found, key=lambda one: one[1].st_mtime)}
