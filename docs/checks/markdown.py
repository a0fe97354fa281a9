"""Reads Markdown files: their code blocks, code spans, links and headings."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent.parent
GENERATED = "<!-- Written by"
_FENCE = re.compile(r"^(?P<indent>\s*)(?P<ticks>```+|~~~+)(?P<info>[^`]*)$")
_SPAN = re.compile(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)", re.DOTALL)
_LINK = re.compile(r"\]\(([^)\s]+)\)")


class Block(NamedTuple):
    """A code block: its file, the line of its first fence, the words after the fence, and its text."""

    path: Path
    line: int
    info: tuple[str, ...]
    text: str

    @property
    def where(self) -> str:
        """File and line, for messages."""
        return f"{self.path.relative_to(ROOT)}:{self.line}"


class Page:
    """One Markdown file, split into code blocks and the prose around them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.text = path.read_text(encoding="utf-8")
        self.generated = self.text.startswith(GENERATED)
        self.blocks: list[Block] = []
        self.prose: list[tuple[int, str]] = []
        self._split()

    def spans(self) -> Iterator[tuple[int, str]]:
        """Inline code, with its line."""
        for line, paragraph in self._paragraphs():
            for match in _SPAN.finditer(paragraph):
                yield line + paragraph[: match.start()].count("\n"), " ".join(match[2].split())

    def links(self) -> Iterator[tuple[int, str]]:
        """Targets of links, with their line."""
        for line, text in self.prose:
            for match in _LINK.finditer(_SPAN.sub("", text)):
                yield line, match[1]

    def anchors(self) -> set[str]:
        """Anchors of the headings, as GitHub makes them."""
        headings = (text.lstrip("#").strip() for _, text in self.prose if re.match(r"#{1,6} ", text))
        return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}

    def _paragraphs(self) -> Iterator[tuple[int, str]]:
        first, lines = 0, list[str]()
        for line, text in [*self.prose, (0, "")]:
            if text.strip():
                first = first if lines else line
                lines.append(text)
            elif lines:
                yield first, "\n".join(lines)
                lines = []

    def _split(self) -> None:
        opened: re.Match[str] | None = None
        first, lines = 0, list[str]()
        for number, text in enumerate(self.text.splitlines(), 1):
            fence = _FENCE.match(text)
            if opened is None and fence:
                opened, first, lines = fence, number, []
                self.prose.append((number, ""))
            elif opened is not None and fence and fence["ticks"].startswith(opened["ticks"]) and not fence["info"].strip():
                self.blocks.append(Block(self.path, first, tuple(opened["info"].split()), "\n".join(lines) + "\n"))
                opened = None
            elif opened is not None:
                lines.append(text.removeprefix(opened["indent"]))
            else:
                self.prose.append((number, text))


def pages() -> list[Page]:
    """Every Markdown file for readers: the documentation and those beside the code."""
    folders = [*(ROOT / "docs").rglob("*.md")]
    beside = [*ROOT.glob("*.md"), ROOT / "contracts" / "README.md", ROOT / "scripts" / "examples" / "README.md"]
    return [Page(path) for path in sorted(folders + beside) if "node_modules" not in path.parts]
