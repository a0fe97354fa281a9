"""`tally receipt verify` on files that are not what it verifies."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from tallystick.cli.jobs.receipts import app
from tallystick.protocol.errors import BadMessage


@pytest.mark.parametrize(
    ("text", "got"),
    [
        ("{}", "one without it"),
        ("[]", "no object"),
        ("7", "no object"),
        ('{"tallystick":"proof/9"}', "one with 'proof/9'"),
        ('{"tallystick":7}', "one with 7"),
        ('{"tallystick":"log-evidence/1"}', "one with 'log-evidence/1'"),
    ],
)
@pytest.mark.parametrize("command", ["verify", "report"])
def test_a_foreign_file_is_told_all_formats(tmp_path: Path, text: str, got: str, command: str) -> None:
    """Whoever has the wrong file learns which ones there are, and what this one is."""
    file = tmp_path / "file.json"
    file.write_text(text)
    result = CliRunner().invoke(app, [command, str(file)])
    assert isinstance(result.exception, BadMessage)
    assert str(result.exception).endswith(got)
    for form in ("proof/1", "evidence/1", "audit-evidence/1"):
        assert f'"{form}"' in str(result.exception)
