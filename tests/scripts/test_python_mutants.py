"""The mutation check of the Python modules on the money path: its mutants and its recorded survivors."""

from __future__ import annotations

import ast
import json

import pytest

from scripts.mutate_python import CHECKED, RECORD, ROOT
from scripts.python_mutants import mutants, place_digests

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
    listed = list(mutants(source, path))
    original = ast.unparse(ast.parse(source))
    assert len({mutant.name for mutant in listed}) == len({mutant.source for mutant in listed}) == len(listed) > 0
    for mutant in listed:
        assert mutant.source != original
        compile(mutant.source, path, "exec")


def test_digest_changes_with_code_only() -> None:
    """A changed docstring leaves a function checked; a changed comparison unchecks it and no other function."""
    reworded, shifted = SOURCE.replace("Says what", "Tells what"), SOURCE.replace("paid < 0", "paid <= 0")
    assert place_digests(reworded) == place_digests(SOURCE)
    assert {name for name, digest in place_digests(shifted).items() if place_digests(SOURCE)[name] != digest} == {"pay"}


def test_recorded_survivors_exist() -> None:
    """Each mutant that may survive has a reason and still exists."""
    reasons: dict[str, str] = json.loads(RECORD.read_text())["equivalent"]
    assert reasons.keys() <= {m.name for path in CHECKED for m in mutants((ROOT / path).read_text(), path)}
    assert all(len(reason) > 20 for reason in reasons.values())
