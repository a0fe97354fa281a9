"""Folders of files that only their owner can read, as much as fits, the newest."""

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
    """Holds `limit` bytes of files at most; the oldest go first. A disk that fails costs the file and is logged, nothing else.

    Only files whose names match `names` are its own: whatever else lies there stays.
    """

    def __init__(self, path: Path, limit: int, names: str) -> None:
        self.path, self._limit, self._names = path, limit, re.compile(names)
        self._sizes: dict[str, int] | None = None
        self._writing = asyncio.Lock()

    async def put(self, name: str, data: bytes) -> None:
        """Writes a file, all of it or nothing."""
        async with self._writing:
            try:
                await asyncio.to_thread(self._put, name, data)
            except OSError as error:
                log.warning("a file was not kept", path=str(self.path / name), error=str(error))

    def _put(self, name: str, data: bytes) -> None:
        if self._sizes is None:
            self._sizes = self._look()
        self._sizes.pop(name, None)
        self._sizes[name] = len(data)
        while sum(self._sizes.values()) > self._limit and self._sizes:
            oldest = next(iter(self._sizes))
            (self.path / oldest).unlink(missing_ok=True)
            del self._sizes[oldest]
        if name in self._sizes:
            write_private(self.path / name, data)

    def _look(self) -> dict[str, int]:
        """Bytes of its files, oldest first."""
        there = self.path.iterdir() if self.path.exists() else ()
        found = [(path, path.stat()) for path in there if self._names.fullmatch(path.name) and path.is_file()]
        return {path.name: stat.st_size for path, stat in sorted(found, key=lambda one: one[1].st_mtime)}


class ProofStore:
    """JOB.json of each job."""

    def __init__(self, path: Path, limit: int) -> None:
        self._folder = FileStore(path, limit, r"[0-9a-f]{32}\.json")

    @classmethod
    def of(cls, config: ClientConfig) -> ProofStore | None:
        """The one that a config names, if it does."""
        return None if config.proof_folder is None else cls(config.proof_folder, config.proof_folder_mib * MIB)

    async def put(self, job: JobId, proof: Proof) -> None:
        """Stores the proof of a job."""
        await self._folder.put(f"{job.hex()}.json", await asyncio.to_thread(proof.dumps))
