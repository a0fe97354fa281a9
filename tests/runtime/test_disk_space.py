"""The check of free space, on real folders, with thresholds around what is free."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tallystick.protocol.health import Health
from tallystick.runtime import disk_space
from tallystick.runtime.disk_space import check_disk

HUGE = 1 << 40


@pytest.mark.parametrize(("warn", "fail", "status"), [(0, 0, Health.PASS), (HUGE, 0, Health.WARN), (HUGE, HUGE, Health.FAIL)])
async def test_little_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warn: int, fail: int, status: Health) -> None:
    """The state follows the free space; whatever is not well says what to do. A file stands for its folder."""
    monkeypatch.setattr(disk_space, "WARN_MIB", warn)
    monkeypatch.setattr(disk_space, "FAIL_MIB", fail)
    for path in (tmp_path, tmp_path / "state.db"):
        result = await check_disk(path)
        assert (result.status, result.unit, type(result.value)) == (status, "MiB", int)
        assert bool(result.output) == bool(result.remedy) == (status is not Health.PASS)


async def test_a_folder_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A read-only folder fails; a missing one is the caller's error."""
    monkeypatch.setattr(os, "access", lambda _path, _mode: False)
    result = await check_disk(tmp_path)
    assert (result.status, "written" in result.output) == (Health.FAIL, True)
    with pytest.raises(OSError, match="missing"):
        await check_disk(tmp_path / "missing" / "state.db")
