"""Size-limited folders of private files: the newest files that fit are kept, readable by their owner only."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import structlog

from tallystick.client.config import MIB, ClientConfig
from tallystick.client.receipts.proof import Proof
from tallystick.protocol.types import JobId
from tallystick.runtime.keystore import write_private

log = structlog.get_logger()


class FileStore:
    """A folder with at most `limit` bytes of files; beyond it the oldest are deleted.

    The store deletes only files whose names match the pattern `names`. A disk error loses the file and is logged.
    """

    def __init__(self, path: Path, limit: int, names: str) -> None:
        self.path, self._limit, self._names = path, limit, re.compile(names)
        self._sizes: dict[str, int] | None = None
        self._writing = asyncio.Lock()

    async def put(self, name: str, data: bytes) -> None:
        """Writes a file atomically. Disk errors are logged, not raised."""
        async with self._writing:
            try:
                await asyncio.to_thread(self._put, name, data)
            except OSError as error:
                log.warning("a file could not be written", path=str(self.path / name), error=str(error))

    def _put(self, name: str, data: bytes) -> None:
        if self._sizes is None:
            self._sizes = self._read_sizes()
        self._sizes.pop(name, None)
        self._sizes[name] = len(data)
        while sum(self._sizes.values()) > self._limit and self._sizes:
            oldest = next(iter(self._sizes))
            (self.path / oldest).unlink(missing_ok=True)
            del self._sizes[oldest]
        if name in self._sizes:
            write_private(self.path / name, data)

    def _read_sizes(self) -> dict[str, int]:
        """Sizes of the store's files in bytes, oldest first."""
        entries = self.path.iterdir() if self.path.exists() else ()
        files = [(path, path.stat()) for path in entries if self._names.fullmatch(path.name) and path.is_file()]
        return {path.name: stat.st_size for path, stat in sorted(files, key=lambda file: file[1].st_mtime)}


class ProofStore:
    """The proofs of jobs, as JOB.json each."""

    def __init__(self, path: Path, limit: int) -> None:
        self._store = FileStore(path, limit, r"[0-9a-f]{32}\.json")

    @classmethod
    def of(cls, config: ClientConfig) -> ProofStore | None:
        """Returns the store that a config names; None if it names none."""
        return None if config.proof_folder is None else cls(config.proof_folder, config.proof_folder_mib * MIB)

    async def put(self, job: JobId, proof: Proof) -> None:
        """Stores the proof of a job."""
        await self._store.put(f"{job.hex()}.json", await asyncio.to_thread(proof.dumps))
