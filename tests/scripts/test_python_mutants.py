"""The mutation check of the Python modules on the money path: its mutants and its recorded survivors."""

from __future__ import annotations

import ast
import json

import pytest

from scripts.mutate_python import CHECKED, RECORD, ROOT
from scripts.python_mutants import mutants, places

SOURCE = '''
LIMITS = {"a": 1, "b": 2}

def pay(owed: int | None, paid: int) -> int:
    """Says what is left."""
    if paid < 0 or owed is None:
        raise ValueError("no" + "thing")
    return max(owed - paid, 0)
'''


def test_kinds_of_mutants() -> None:
    """Comparisons are shifted and inverted, operators swapped, raises and table entries removed; text and types stay."""
    assert [mutant.name.removeprefix("m.py ") for mutant in mutants(SOURCE, "m.py")] == [
        "LIMITS: without \"'a': 1\"",
        "LIMITS: without \"'b': 2\"",
        "pay: 'paid < 0 or owed is None' -> 'paid < 0 and owed is None'",
        "pay: 'paid < 0' -> 'paid <= 0'",
        "pay: 'paid < 0' -> 'paid >= 0'",
        "pay: 'owed is None' -> 'owed is not None'",
        "pay: \"raise ValueError('no' + 'thing')\" -> 'pass'",
        "pay: 'max(owed - paid, 0)' -> 'min(owed - paid, 0)'",
        "pay: 'owed - paid' -> 'owed + paid'",
    ]


@pytest.mark.parametrize("path", CHECKED)
def test_every_mutant_is_a_distinct_program(path: str) -> None:
    """Each mutant has a name of its own, differs from the module and from every other mutant, and compiles."""
    source = (ROOT / path).read_text()
    found = list(mutants(source, path))
    whole = ast.unparse(ast.parse(source))
    assert len({mutant.name for mutant in found}) == len({mutant.source for mutant in found}) == len(found) > 0
    for mutant in found:
        assert mutant.source != whole
        compile(mutant.source, path, "exec")


def test_digest_changes_with_code_only() -> None:
    """A changed docstring leaves a function checked; a changed comparison unchecks it and no other function."""
    said, shifted = SOURCE.replace("Says what", "Tells what"), SOURCE.replace("paid < 0", "paid <= 0")
    assert places(said) == places(SOURCE)
    assert {name for name, digest in places(shifted).items() if places(SOURCE)[name] != digest} == {"pay"}


def test_recorded_survivors_exist() -> None:
    """Each mutant that may survive has a reason and still exists."""
    reasons: dict[str, str] = json.loads(RECORD.read_text())["equivalent"]
    assert reasons.keys() <= {m.name for path in CHECKED for m in mutants((ROOT / path).read_text(), path)}
    assert all(len(reason) > 20 for reason in reasons.values())
