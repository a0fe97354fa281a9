"""Writes the generated pages into docs/reference. A file is touched only if its text changed, so rebuilds stay fast."""

from __future__ import annotations

from pathlib import Path

from docs.generate import cli, contract, errors, http, messages, metrics, python_api, rooms, settings, wire

FOLDER = Path(__file__).parent.parent / "reference"
NOTE = "<!-- Written by `python -m docs.generate`. Do not edit. -->\n\n"
GENERATORS = (cli, contract, errors, http, messages, metrics, python_api, rooms, settings, wire)


def main() -> None:
    """Writes every page."""
    for generator in GENERATORS:
        for name, text in generator.pages().items():
            path = FOLDER / name
            content = NOTE + text.rstrip() + "\n"
            if not path.exists() or path.read_text(encoding="utf-8") != content:
                path.write_text(content, encoding="utf-8")


main()
