"""Tests of the contracts never run on bytecode of earlier sources."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.contracts.freshness import CONTRACTS, check_freshness


def _append(name: str) -> Callable[[Path], None]:
    def edit(contracts: Path) -> None:
        with (contracts / name).open("a") as file:
            file.write("\n// edited\n")

    return edit


def _rename(contracts: Path) -> None:
    (contracts / "src" / "TestUSD.sol").rename(contracts / "src" / "Other.sol")


def _add(contracts: Path) -> None:
    (contracts / "src" / "parts" / "New.sol").write_text("")


def _forget(contracts: Path) -> None:
    (contracts / "build.sha256").unlink()


@pytest.mark.parametrize(
    "edit",
    [
        *(_append(name) for name in ("src/Escrow.sol", "src/interfaces/IEscrow.sol", "test/HostileToken.sol", "solc.mjs")),
        *(_append("package-lock.json"), _rename, _add, _forget),
    ],
)
def test_an_edit_without_a_build_is_noticed(tmp_path: Path, edit: Callable[[Path], None]) -> None:
    """Any edit of a source, of the compiler's settings or of its version fails until the contracts are built again."""
    for name in ("src", "test"):
        shutil.copytree(CONTRACTS / name, tmp_path / name)
    for name in ("package-lock.json", "solc.mjs", "build.sha256"):
        shutil.copy(CONTRACTS / name, tmp_path / name)
    check_freshness(tmp_path)
    edit(tmp_path)
    with pytest.raises(AssertionError, match="scripts/build-contracts"):
        check_freshness(tmp_path)
