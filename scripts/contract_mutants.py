"""Every way in which a Solidity source is broken in one place: comparisons, conditions and statements."""

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
    "parts/Ledger.sol",
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
    """One break. `name` says where and what, and stays the same when lines move."""

    name: str
    path: str
    line: int
    start: int
    end: int
    put: str

    def text(self) -> str:
        """The broken source."""
        source = (SOURCES / self.path).read_text()
        return source[: self.start] + self.put + source[self.end :]


def mutants(path: str) -> Iterator[Mutant]:
    """All breaks of one source, in its order."""
    source = (SOURCES / path).read_text()
    code = _without_comments(source)
    seen: Counter[str] = Counter()
    for start, end, put in sorted(set(_changes(code))):
        number = source.count("\n", 0, start)
        line = source.split("\n")[number].strip()
        said = f"{source[start:end]!r} -> {put!r}" if put else f"without {' '.join(source[start:end].split())!r}"
        name = f"{path}: {said} in {line!r}" if put or len(line) < end - start else f"{path}: {said}"
        seen[name] += 1
        yield Mutant(f"{name} #{seen[name]}" if seen[name] > 1 else name, path, number + 1, start, end, put)


def _changes(code: str) -> Iterator[tuple[int, int, str]]:
    """(start, end, what is put there) of every break."""
    body = code.index("{", code.index("library ") if "library " in code else code.index("contract "))
    for found in _OPERATOR.finditer(code, body):
        operator = found[0]
        for other in _COMPARISONS.get(operator) or (_SWAPS[operator],):
            yield found.start(), found.end(), other
    for found in _SHIFT.finditer(code, body):
        yield found.start(2), found.end(2), str(int(found[2]) + 1)
    for found in _MODIFIER.finditer(code, body):
        yield found.start(1), found.end(1), ""
    for pattern in _STATEMENTS:
        for found in pattern.finditer(code, body):
            yield found.start(1), found.end(1), ""


def _without_comments(source: str) -> str:
    """The same length, with comments, strings and type strings blanked."""
    return re.sub(r"//[^\n]*|\"[^\"\n]*\"|constant [^;]*;", lambda found: " " * len(found[0]), source)
