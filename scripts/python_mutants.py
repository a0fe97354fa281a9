"""Mutants of a Python module: changed comparisons, operators and functions, removed raises and table entries."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256

_COMPARISONS: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}
_OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.FloorDiv,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
}
_FUNCTIONS = {"min": "max", "max": "min", "any": "all", "all": "any"}
_NOT_CODE = frozenset({"annotation", "returns", "decorator_list"})
"""Members of a node that are not mutated, since they decide nothing."""
_SHOWN = 100


@dataclass(frozen=True, slots=True)
class Mutant:
    """One mutant with its whole source. `name` states the place and the change, and stays the same when lines move; `place` is
    the outermost function, class or assignment that contains the change.
    """

    name: str
    place: str
    line: int
    source: str


def mutants(source: str, module: str) -> Iterator[Mutant]:
    """All mutants of one module, in the order of the source."""
    tree = ast.parse(source)
    counts: Counter[str] = Counter()
    for statement in tree.body:
        place = _place(statement)
        for owner, member, index, node in _descendants(statement):
            before = ast.unparse(node)
            for replacement in _replacements(node):
                _put(owner, member, index, replacement)
                name = f"{module} {place}: {before[:_SHOWN]!r} -> {ast.unparse(replacement)[:_SHOWN]!r}"
                counts[name] += 1
                number = f" #{counts[name]}" if counts[name] > 1 else ""
                yield Mutant(name + number, place, node.lineno, ast.unparse(ast.fix_missing_locations(tree)))
            _put(owner, member, index, node)
        yield from _without_entries(tree, statement, module)


def _without_entries(tree: ast.Module, statement: ast.stmt, module: str) -> Iterator[Mutant]:
    """Mutants of a table at the top of the module, each without one entry."""
    table = statement.value if isinstance(statement, ast.Assign | ast.AnnAssign) else None
    if not isinstance(table, ast.Dict):
        return
    keys, values = table.keys, table.values
    for index, (key, value) in enumerate(zip(keys, values, strict=True)):
        table.keys, table.values = [*keys[:index], *keys[index + 1 :]], [*values[:index], *values[index + 1 :]]
        entry = f"{ast.unparse(key)}: {ast.unparse(value)}" if key is not None else f"**{ast.unparse(value)}"
        name = f"{module} {_place(statement)}: without {entry[:_SHOWN]!r}"
        yield Mutant(name, _place(statement), value.lineno, ast.unparse(tree))
    table.keys, table.values = keys, values


def place_digests(source: str) -> dict[str, str]:
    """A digest of each outermost function, class and assignment, which changes with its code but not with its docstring."""
    digests: dict[str, str] = {}
    for statement in ast.parse(source).body:
        text = digests.get(_place(statement), "") + ast.unparse(_without_docs(statement))
        digests[_place(statement)] = sha256(text.encode()).hexdigest()[:16]
    return digests


def _place(statement: ast.stmt) -> str:
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return statement.name
    target = statement.targets[0] if isinstance(statement, ast.Assign) else getattr(statement, "target", None)
    return ast.unparse(target) if target is not None else "module"


def _without_docs(statement: ast.stmt) -> ast.stmt:
    for node in ast.walk(statement):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            rest = [child for child in body if not (isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant))]
            node.body = rest or [ast.Pass()]  # type: ignore[attr-defined]  # every node whose body is a list takes one
    return statement


def _descendants(node: ast.AST) -> Iterator[tuple[ast.AST, str, int | None, ast.stmt | ast.expr]]:
    """Yields every statement and expression under a node, with its owner, the owner's member, and the index in a list."""
    for member, value in ast.iter_fields(node):
        if member in _NOT_CODE:
            continue
        for index, child in enumerate(value) if isinstance(value, list) else ((None, value),):
            if isinstance(child, ast.stmt | ast.expr):
                yield node, member, index, child
            if isinstance(child, ast.AST):
                yield from _descendants(child)


def _put(owner: ast.AST, member: str, index: int | None, node: ast.AST) -> None:
    if index is None:
        setattr(owner, member, node)
    else:
        getattr(owner, member)[index] = node


def _replacements(node: ast.stmt | ast.expr) -> Iterator[ast.stmt | ast.expr]:
    """Yields the replacements of a node, one for each mutant."""
    if isinstance(node, ast.Raise):
        yield ast.copy_location(ast.Pass(), node)
    elif isinstance(node, ast.Compare):
        for place, operator in enumerate(node.ops):
            for other in _COMPARISONS[type(operator)]:
                changed = [*node.ops[:place], other(), *node.ops[place + 1 :]]
                yield ast.copy_location(ast.Compare(node.left, changed, node.comparators), node)
    elif isinstance(node, ast.BoolOp):
        other_word = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        yield ast.copy_location(ast.BoolOp(other_word, node.values), node)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield node.operand
    elif isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS and not _is_text(node):
        yield ast.copy_location(ast.BinOp(node.left, _OPERATORS[type(node.op)](), node.right), node)
    elif isinstance(node, ast.AugAssign) and type(node.op) in _OPERATORS:
        yield ast.copy_location(ast.AugAssign(node.target, _OPERATORS[type(node.op)](), node.value), node)
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS:
        function = ast.copy_location(ast.Name(_FUNCTIONS[node.func.id], ast.Load()), node.func)
        yield ast.copy_location(ast.Call(function, node.args, node.keywords), node)


def _is_text(node: ast.BinOp) -> bool:
    sides = (node.left, node.right)
    return any(isinstance(side, ast.JoinedStr) or isinstance(getattr(side, "value", None), str | bytes) for side in sides) or any(
        _is_text(side) for side in sides if isinstance(side, ast.BinOp)
    )
