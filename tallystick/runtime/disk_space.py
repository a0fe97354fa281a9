"""The free space of the file system that holds a daemon's state, as a health check."""

from __future__ import annotations

import asyncio
import os
import shutil
from pathlib import Path

from tallystick.protocol.health import CheckResult, Health

MIB = 1 << 20
WARN_MIB, FAIL_MIB = 1_024, 64
"""Less free space is a warning, and a failure: then the next writes may be refused."""


async def check_disk(path: Path) -> CheckResult:
    """The free space for `path`, a file or a folder. Raises OSError if it is not there."""
    return await asyncio.to_thread(_check, path)


def _check(path: Path) -> CheckResult:
    folder = path if path.is_dir() else path.parent
    free = shutil.disk_usage(folder).free // MIB
    if not os.access(folder, os.W_OK):
        text = "the folder of its data cannot be written to"
        return CheckResult(Health.FAIL, text, "check the folder's owner and mount", free, "MiB")
    if free >= WARN_MIB:
        return CheckResult(Health.PASS, value=free, unit="MiB")
    status = Health.FAIL if free < FAIL_MIB else Health.WARN
    remedy = "free space on that disk, or move the data to another one"
    return CheckResult(status, f"{free} MiB are free for its data", remedy, free, "MiB")
