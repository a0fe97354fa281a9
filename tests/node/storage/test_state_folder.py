from __future__ import annotations

import os
from pathlib import Path

import pytest

from node.storage.state_folder import StateFolder, claim_state, find_states, inspect_state, lock_state
from node.storage.store import SqlStore
from tallystick.protocol.errors import BadMessage
from tests.node.harness import DOMAIN, PAYER, PROVIDER


async def test_whose_a_state_is(tmp_path: Path) -> None:
    """Wallet, contract and config are known from the setup, the database, and a running node; looking changes nothing."""
    state, config = tmp_path / "state", tmp_path / "node.toml"
    assert inspect_state(state) == StateFolder(state)
    assert not inspect_state(state).used
    assert not state.exists()
    claim_state(state, PROVIDER.address, config)
    claimed = StateFolder(state, PROVIDER.address, None, config, None)
    assert inspect_state(state) == claimed
    store = SqlStore(f"sqlite:///{state / 'node.db'}", PROVIDER.address, DOMAIN)
    await store.start()
    await store.close()
    assert inspect_state(state) == StateFolder(state, PROVIDER.address, DOMAIN.contract, config, None)
    with lock_state(state, PROVIDER.address, tmp_path / "other.toml"):
        running = inspect_state(state)
        assert (running.config, running.running) == (tmp_path / "other.toml", os.getpid())
    assert inspect_state(state).running is None
    assert inspect_state(state).config == config


def test_a_second_node_is_told_who_runs(tmp_path: Path) -> None:
    """The refusal names process, wallet and config of the node that runs, and leaves its lock as it is."""
    with lock_state(tmp_path, PROVIDER.address, tmp_path / "a.toml"):
        for _ in range(2):
            with pytest.raises(BadMessage) as caught:
                lock_state(tmp_path, PAYER.address, tmp_path / "b.toml")
            for part in (f"process {os.getpid()}", PROVIDER.address, "a.toml", "tally node init"):
                assert part in str(caught.value)
    lock_state(tmp_path, PAYER.address, None).close()


def test_damaged_files_are_no_obstacle(tmp_path: Path) -> None:
    """A folder with files that cannot be read is described as far as it can be."""
    for name, content in (("owner.json", "[1]"), ("lock", "12"), ("node.db", "no database")):
        (tmp_path / name).write_text(content)
    assert inspect_state(tmp_path) == StateFolder(tmp_path)
    (tmp_path / "owner.json").write_text('{"provider": 5, "config": ["x"]}')
    assert not inspect_state(tmp_path).used
    (tmp_path / "lock").unlink()
    with lock_state(tmp_path, PROVIDER.address, None) as file:
        file.truncate(0)
        assert inspect_state(tmp_path).running == 0, "somebody runs, it does not say who"


def test_the_nodes_of_a_machine(tmp_path: Path) -> None:
    """Folders of nodes are found among others."""
    claim_state(tmp_path / "a", PROVIDER.address, tmp_path / "a.toml")
    (tmp_path / "keys").mkdir()
    assert [state.path.name for state in find_states([tmp_path / "a", tmp_path / "keys", tmp_path / "none"])] == ["a"]
