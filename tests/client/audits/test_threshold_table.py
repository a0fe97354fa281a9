from __future__ import annotations

from pathlib import Path

import pytest

from tallystick.audit.thresholds import Thresholds
from tallystick.client.audits.threshold_table import ThresholdTable
from tallystick.protocol.errors import BadMessage


def table(tmp_path: Path, text: str) -> ThresholdTable:
    """The table in a file."""
    (tmp_path / "thresholds.json").write_text(text)
    return ThresholdTable.load(tmp_path / "thresholds.json")


def test_the_closest_entry_counts(tmp_path: Path) -> None:
    """The model's before that of all models; the class before that of all classes."""
    text = '{"m": {"bf16": {"divergence": 0.02}, "*": {"divergence": 0.03}}, "*": {"*": {"margin": 1}}}'
    read = table(tmp_path, text)
    assert read.of("m", "bf16") == Thresholds(divergence=0.02)
    assert read.of("m", "fp8") == Thresholds(divergence=0.03)
    assert read.of("other", "fp8") == Thresholds(margin=1)
    assert ThresholdTable.load(None).of("m", "bf16") == Thresholds()


@pytest.mark.parametrize(
    "text", ["", "[]", '{"m": 1}', '{"m": {"bf16": 1}}', '{"m": {"bf16": {"divergence": 0}}}', '{"m": {"bf16": {"other": 1}}}']
)
def test_mistakes_are_named(tmp_path: Path, text: str) -> None:
    """With the file, and the entry."""
    with pytest.raises(BadMessage, match=r"thresholds\.json"):
        table(tmp_path, text)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    """It is not silently the defaults."""
    with pytest.raises(BadMessage, match="No such file"):
        ThresholdTable.load(tmp_path / "none.json")
