"""Where the market's contracts are: a small JSON file that every daemon can be pointed at."""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Self

from tallystick.protocol.eip712 import Domain
from tallystick.protocol.errors import BadMessage
from tallystick.protocol.types import Address, parse_address


@dataclass(frozen=True)
class Deployment:
    """One escrow on one chain. `block` is the block of its creation, before which it has no event. `rpc` is an endpoint's URL."""

    chain_id: int
    escrow: Address
    token: Address
    token_decimals: int
    block: int
    rpc: str

    @cached_property
    def domain(self) -> Domain:
        """The EIP-712 domain of all messages of this market."""
        return Domain(chain_id=self.chain_id, contract=self.escrow)

    @classmethod
    def from_json(cls, raw: object) -> Self:
        """Reads the object that `to_json` returns. Raises BadMessage that names the member."""
        names = {field.name for field in fields(cls)}
        if not isinstance(raw, dict) or raw.keys() != names:
            raise BadMessage(f"deployment: expected a JSON object with {', '.join(sorted(names))}")
        for name in ("chain_id", "token_decimals", "block"):
            if isinstance(raw[name], bool) or not isinstance(raw[name], int) or raw[name] < 0:
                raise BadMessage(f"deployment: {name}: expected a whole number")
        if not isinstance(raw["rpc"], str):
            raise BadMessage("deployment: rpc: expected a URL")
        parsed = {name: parse_address(raw[name], f"deployment: {name}") for name in ("escrow", "token")}
        return cls(**(raw | parsed))

    def to_json(self) -> dict[str, object]:
        """The content of a deployment file."""
        return asdict(self)

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """Reads a deployment file. Raises BadMessage, OSError."""
        try:
            return cls.from_json(json.loads(Path(path).read_text()))
        except ValueError as error:
            raise BadMessage(f"{path}: not JSON: {error}") from None

    def save(self, path: Path | str) -> None:
        """Writes a deployment file atomically."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        draft = target.with_suffix(target.suffix + ".tmp")
        draft.write_text(self._text())
        draft.replace(target)

    def save_keeping(self, path: Path | str) -> Path | None:
        """Writes a deployment file like `save`, and keeps another content of it as deployment.1.json, deployment.2.json, and so
        on. Returns the path of the kept file; None if nothing was replaced.
        """
        target = Path(path)
        if not target.exists() or target.read_bytes() == self._text().encode():
            self.save(target)
            return None
        for number in itertools.count(1):
            kept = target.with_name(f"{target.stem}.{number}{target.suffix}")
            try:
                kept.hardlink_to(target)  # fails if the name is taken, so that no kept file is lost
            except FileExistsError:
                continue
            break
        self.save(target)
        return kept

    def _text(self) -> str:
        return json.dumps(self.to_json(), indent=2) + "\n"
