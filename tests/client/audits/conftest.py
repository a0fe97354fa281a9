from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tallystick.client.audits.store import AuditStore


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[AuditStore]:
    """An empty file of audits."""
    store = await AuditStore.open(tmp_path / "audits.db")
    try:
        yield store
    finally:
        await store.close()
