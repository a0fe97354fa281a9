"""State of earlier versions opens and keeps its contents."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import sqlalchemy as sa
from alembic import command
from alembic.config import Config

from node.ports import CoordinatorHour
from node.storage.earnings import read_payouts
from node.storage.store import MIGRATIONS, SqlStore
from tallystick.protocol.types import Amount
from tallystick.runtime import storage
from tests.node.harness import DOMAIN, PROVIDER


def _migrate(path: Path, revision: str) -> None:
    config = Config()
    config.set_main_option("script_location", str(Path(storage.__file__).parent / "alembic"))
    config.set_main_option("version_locations", str(MIGRATIONS / "versions"))
    config.set_main_option("path_separator", "newline")
    engine = sa.create_engine(f"sqlite:///{path}")
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, revision)
    engine.dispose()


async def test_state_from_before_the_renaming_of_tables(tmp_path: Path) -> None:
    """The earned and unpaid credit of coordinators is kept."""
    path = tmp_path / "node.db"
    _migrate(path, "0004")
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("INSERT INTO dealings VALUES ('coordinator.example:443', 5, ?, ?)", (f"{7:029}", f"{3:029}"))
    store = SqlStore(f"sqlite:///{path}", PROVIDER.address, DOMAIN)
    await store.start()
    assert await store.coordinator_hours(0) == [CoordinatorHour("coordinator.example:443", 5, Amount(7), Amount(3))]
    await store.close()


async def test_state_from_before_payouts(tmp_path: Path) -> None:
    """Jobs lose the number of the attempt, tabs the time of a look, and both nothing else; payouts and fees are empty."""
    path = tmp_path / "node.db"
    _migrate(path, "0005")
    tab = ("0xp", 2, f"{9:029}", f"{4:029}", f"{1:029}", 10, 11, f"{9:029}")
    job = ("d1", "j1", "0xc", "model", 3, 10, 20, 0)
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("INSERT INTO jobs VALUES (?, ?, ?, ?, ?, ?, ?, ?)", job)
        names = "payer, seq, cumulative, settled, reserved, since, claimed_at, claimed"
        database.execute(
            f"INSERT INTO tabs ({names}, observed_at, written_off) VALUES (?, ?, ?, ?, ?, ?, ?, ?, 5, ?)", (*tab, f"{0:029}")
        )
    store = SqlStore(f"sqlite:///{path}", PROVIDER.address, DOMAIN)
    await store.start()
    assert await store.fee_total() is None
    assert await store.read(lambda c: read_payouts(c, 5)) == []
    await store.close()
    with closing(sqlite3.connect(path)) as database:
        assert database.execute("SELECT * FROM jobs").fetchall() == [job[:4] + job[5:]]
        assert database.execute(f"SELECT {names} FROM tabs").fetchall() == [tab]
