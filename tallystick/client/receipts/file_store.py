"""Size-limited folders of private files: the newest files that fit are kept, readable by their owner only."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from pathlib import Path

import structlog

from tallystick.client.config import MIB, ClientConfig
from tallystick.client.receipts.proof import Proof
from tallystick.protocol.types import JobId
from tallystick.runtime.keystore import write_private

log = structlog.get_logger()


class FileStore:
    """A folder with at most `limit` bytes of files; beyond it the oldest are deleted.

    `count`: the most files. `oldest`: the Unix time before which files are deleted. The store deletes only files whose names
    match the pattern `names`. A disk error loses the file and is logged.
    """

    def __init__(
        self, path: Path, limit: int, names: str, *, count: int | None = None, oldest: Callable[[], float] | None = None
    ) -> None:
        self.path, self._limit, self._names, self._count, self._oldest = path, limit, re.compile(names), count, oldest
        self._files: dict[str, tuple[int, float]] | None = None
        """Bytes and time of each file, oldest first."""
        self._size = 0
        self._writing = asyncio.Lock()

    async def put(self, name: str, data: bytes) -> None:
        """Writes a file atomically. Disk errors are logged, not raised."""
        await self._change(name, self._put, name, data)

    async def delete(self, name: str) -> None:
        """Deletes a file if there is one. Disk errors are logged, not raised."""
        await self._change(name, self._delete, name)

    async def _change(self, name: str, change: Callable[..., None], *arguments: object) -> None:
        async with self._writing:
            try:
                await asyncio.to_thread(change, *arguments)
            except OSError as error:
                log.warning("a file could not be written", path=str(self.path / name), error=str(error))

    def _put(self, name: str, data: bytes) -> None:
        files = self._read_files()
        self._forget(name)
        if len(data) <= self._limit:
            write_private(self.path / name, data)
            files[name] = len(data), (self.path / name).stat().st_mtime
            self._size += len(data)
        else:
            (self.path / name).unlink(missing_ok=True)
        oldest = float("-inf") if self._oldest is None else self._oldest()
        for other in list(files):
            crowded = self._size > self._limit or (self._count is not None and len(files) > self._count)
            if other == name or not (crowded or files[other][1] < oldest):
                break
            self._delete(other)

    def _delete(self, name: str) -> None:
        self._read_files()
        (self.path / name).unlink(missing_ok=True)
        self._forget(name)

    def _forget(self, name: str) -> None:
        if self._files is not None:
            self._size -= self._files.pop(name, (0, 0.0))[0]

    def _read_files(self) -> dict[str, tuple[int, float]]:
        if self._files is None:
            entries = self.path.iterdir() if self.path.exists() else ()
            stats = [(path.name, path.stat()) for path in entries if self._names.fullmatch(path.name) and path.is_file()]
            stats.sort(key=lambda file: file[1].st_mtime)
            self._files = {name: (stat.st_size, stat.st_mtime) for name, stat in stats}
            self._size = sum(size for size, _ in self._files.values())
        return self._files


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
