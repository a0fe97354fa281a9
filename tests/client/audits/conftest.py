from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tallystick.client.audits.store import AuditStore
from tests.client.audits.parties import restart_seeds


@pytest.fixture(autouse=True)
def same_answers() -> None:
    """Answers of toy models are the same in every run."""
    restart_seeds()


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[AuditStore]:
    """An empty file of audits."""
    store = await AuditStore.open(tmp_path / "audits.db")
    try:
        yield store
    finally:
        await store.close()
