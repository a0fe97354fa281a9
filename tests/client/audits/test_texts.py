from __future__ import annotations

from pathlib import Path

import pytest

from tallystick.client.audits.texts import MAX_BYTES, MIN_PARAGRAPHS, load_texts
from tallystick.protocol.errors import BadMessage


async def test_paragraphs(tmp_path: Path) -> None:
    """Empty lines part them, whatever ends a line; spaces within are one."""
    file = tmp_path / "texts.txt"
    file.write_text("\r\n\r\n".join(f"text {number}\r\n  goes on" for number in range(MIN_PARAGRAPHS)) + "\n\n\n\n", newline="")
    assert await load_texts(file) == tuple(f"text {number} goes on" for number in range(MIN_PARAGRAPHS))
    assert await load_texts(None) == ()


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"one\n\ntwo", "at least 20 paragraphs"),
        (b"", "at least 20 paragraphs"),
        (b"\xff\n\n" * 30, "expected UTF-8 text"),
        (b"a\n\n" * (MAX_BYTES // 3 + 1), "expected at most"),
    ],
)
async def test_other_files(tmp_path: Path, data: bytes, expected: str) -> None:
    """The error names the setting and the file."""
    file = tmp_path / "texts.txt"
    file.write_bytes(data)
    with pytest.raises(BadMessage, match=expected) as caught:
        await load_texts(file)
    assert f"config: audits.texts: {file}" in str(caught.value)


async def test_no_file(tmp_path: Path) -> None:
    """As the system says it."""
    with pytest.raises(BadMessage, match="No such file"):
        await load_texts(tmp_path / "none")
