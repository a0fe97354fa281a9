"""Whether the committed bytecode was built from the present sources of the contracts."""

from __future__ import annotations

import hashlib
from pathlib import Path

CONTRACTS = Path(__file__).parents[2] / "contracts"


def sources_digest(contracts: Path = CONTRACTS) -> str:
    """The digest that contracts/build.mjs writes to build.sha256: of each source, by path, its path and its content."""
    sources = [path for folder in ("src", "test") for path in (contracts / folder).rglob("*.sol")]
    names = sorted(path.relative_to(contracts).as_posix() for path in sources)
    digest = hashlib.sha256()
    for name in sorted([*names, "package-lock.json", "solc.mjs"]):
        digest.update(name.encode() + b"\0" + (contracts / name).read_bytes() + b"\0")
    return digest.hexdigest()


def check_freshness(contracts: Path = CONTRACTS) -> None:
    """Fails the test if a source was edited after the last build: its bytecode would be of the earlier source."""
    built = contracts / "build.sha256"
    of_sources = built.exists() and built.read_text().strip() == sources_digest(contracts)
    assert of_sources, "contracts/ was edited after its bytecode was built: run scripts/build-contracts"
