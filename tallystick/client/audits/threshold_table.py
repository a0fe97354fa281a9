"""Thresholds by model and precision class, from the file that `tally audit calibrate` writes. A JSON object:

    {"MODEL": {"PRECISION": {"divergence": 0.004, …}}}

The model "*" and the class "*" stand for all others. What the file leaves out has the defaults of `tallystick.audit.thresholds`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tallystick.audit.thresholds import Thresholds
from tallystick.protocol.errors import BadMessage
from tallystick.protocol.precisions import precision_class
from tallystick.protocol.wire import loads

ANY = "*"


@dataclass(frozen=True, slots=True)
class ThresholdTable:
    """Thresholds by model and class."""

    by_model: Mapping[str, Mapping[str, Thresholds]] = field(default_factory=dict)

    def of(self, model: str, precision: str) -> Thresholds:
        """The thresholds for a model in a class."""
        classes = self.by_model.get(model) or self.by_model.get(ANY) or {}
        return classes.get(precision_class(precision)) or classes.get(ANY) or Thresholds()

    @classmethod
    def load(cls, path: Path | None) -> ThresholdTable:
        """Reads the file; the defaults for None. Raises BadMessage that names the member."""
        if path is None:
            return cls()
        try:
            raw = loads(path.read_bytes(), f"config: audits.thresholds: {path}")
        except OSError as error:
            raise BadMessage(f"config: audits.thresholds: {path}: {error.strerror}") from None
        if not isinstance(raw, dict) or not all(isinstance(classes, dict) for classes in raw.values()):
            raise BadMessage(f"config: audits.thresholds: {path}: expected an object of objects, by model and precision class")
        return cls(
            {
                model: {
                    name if name == ANY else precision_class(name): _read(values, path, model, name)
                    for name, values in classes.items()
                }
                for model, classes in raw.items()
            }
        )


def _read(values: object, path: Path, model: str, precision: str) -> Thresholds:
    try:
        return Thresholds.of(values)
    except BadMessage as error:
        raise BadMessage(f"config: audits.thresholds: {path}: {model}: {precision}: {error}") from None
