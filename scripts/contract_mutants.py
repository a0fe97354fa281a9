"""Mutants of a Solidity source: changed comparisons, operators and shifts, removed conditions, modifiers and statements."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SOURCES = Path(__file__).parent.parent / "contracts" / "src"
PARTS = (
    "parts/Settlement.sol",
    "PackedStorage.sol",
    "PackedRow.sol",
    "parts/Tabs.sol",
    "parts/Purses.sol",
    "parts/EscrowStorage.sol",
    "parts/Stakes.sol",
    "Escrow.sol",
)

_COMPARISONS = {
    "<": ("<=", ">="),
    "<=": ("<", ">"),
    ">": (">=", "<="),
    ">=": (">", "<"),
    "==": ("!=",),
    "!=": ("==",),
}
_SWAPS = {"&&": "||", "||": "&&", "|": "&", "+=": "-=", "-=": "+=", "+": "-", "-": "+", "*": "/", "Math.min": "Math.max"}
_OPERATOR = re.compile(r"(?<=\s)(<=|>=|==|!=|<|>|&&|\|\||\||\+=|-=|\+|-|\*)(?=\s)|Math\.min(?=\()")
_SHIFT = re.compile(r"(<<|>>) (\d+)")
_MODIFIER = re.compile(r"(?<=\s)(nonReentrant|onlyOwnerOf\(key\)) ")
_KEYWORDS = r"(?!(?:return|revert|if|else|for|while|unchecked|try|using|import|error|event|struct|mapping)\b|_;)"
_PLACE = r"[\w.]+(?:\[[^\]]*\]|\.\w+)*"
_STATEMENTS = (
    re.compile(r"^ +(if \((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\) (?:revert|return)\b[^;]*;)", re.MULTILINE),
    re.compile(rf"^ +(if \((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\) {_PLACE} [-+]?= [^;]*;)", re.MULTILINE),
    re.compile(r"^ +(try [^;]*?\{\} catch \{\})", re.MULTILINE),
    re.compile(r"^ +(emit [^;]*;)", re.MULTILINE),
    re.compile(rf"^ +({_KEYWORDS}(?:{_PLACE}|\(\w+(?:, \w+)*\)) [-+]?= [^;]*;)", re.MULTILINE),
    re.compile(rf"^ +({_KEYWORDS}{_PLACE}\([^;{{}}]*\);)", re.MULTILINE),
)


@dataclass(frozen=True, slots=True)
class Mutant:
    """One mutant. `name` states the place and the change, and stays the same when lines move."""

    name: str
    path: str
    line: int
    start: int
    end: int
    replacement: str

    def text(self) -> str:
        """The mutated source."""
        source = (SOURCES / self.path).read_text()
        return source[: self.start] + self.replacement + source[self.end :]


def mutants(path: str) -> Iterator[Mutant]:
    """All mutants of one source, in the order of the source."""
    source = (SOURCES / path).read_text()
    code = _blank_comments(source)
    counts: Counter[str] = Counter()
    for start, end, replacement in sorted(set(_changes(code))):
        number = source.count("\n", 0, start)
        line = source.split("\n")[number].strip()
        change = (
            f"{source[start:end]!r} -> {replacement!r}" if replacement else f"without {' '.join(source[start:end].split())!r}"
        )
        name = f"{path}: {change} in {line!r}" if replacement or len(line) < end - start else f"{path}: {change}"
        counts[name] += 1
        yield Mutant(f"{name} #{counts[name]}" if counts[name] > 1 else name, path, number + 1, start, end, replacement)


def _changes(code: str) -> Iterator[tuple[int, int, str]]:
    """Yields (start, end, replacement) of every mutant."""
    body = code.index("{", code.index("library ") if "library " in code else code.index("contract "))
    for match in _OPERATOR.finditer(code, body):
        operator = match[0]
        for replacement in _COMPARISONS.get(operator) or (_SWAPS[operator],):
            yield match.start(), match.end(), replacement
    for match in _SHIFT.finditer(code, body):
        yield match.start(2), match.end(2), str(int(match[2]) + 1)
    for match in _MODIFIER.finditer(code, body):
        yield match.start(1), match.end(1), ""
    for pattern in _STATEMENTS:
        for match in pattern.finditer(code, body):
            yield match.start(1), match.end(1), ""


def _blank_comments(source: str) -> str:
    """Blanks comments, strings and constants, and keeps the length."""
    return re.sub(r"//[^\n]*|\"[^\"\n]*\"|constant [^;]*;", lambda match: " " * len(match[0]), source)
