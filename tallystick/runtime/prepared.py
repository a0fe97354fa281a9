"""SQL statements that are compiled once and then run many rows in one call of the driver.

SQLAlchemy's own `execute` looks up, binds and post-processes a statement at each call, which costs more than the database needs
for the row. A `Prepared` does that once for each database system, and converts values by the types of their columns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection, Dialect
from sqlalchemy.sql.compiler import SQLCompiler

Statement = sa.Insert | sa.Update | sa.Delete
Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class _Compiled:
    sql: str
    parameters: tuple[tuple[str, Callable[[Any], Any] | None], ...]
    """The name of each parameter, in the order of their positions, and what converts its value for the driver."""
    constants: Row
    """Values that the statement itself contains."""
    size: int
    """Members that a row has."""

    def bind(self, row: Row) -> tuple[Any, ...]:
        """The parameters of a row, by position. Raises ValueError for a row with other members than the statement's."""
        if len(row) != self.size:
            raise ValueError(f"expected a row of {self.size} members, got {', '.join(row) or 'none'}: {self.sql}")
        values = {**self.constants, **row} if self.constants else row
        try:
            return tuple([values[name] if convert is None else convert(values[name]) for name, convert in self.parameters])
        except KeyError as error:
            raise ValueError(f"row.{error.args[0]}: missing: {self.sql}") from None


class Prepared:
    """An INSERT, UPDATE or DELETE without its rows. It returns no rows.

    `statement`: the statement, or a function that returns it for a dialect's name ("sqlite", "postgresql") where they differ, as
    for upserts. `columns`: those that an INSERT sets; None: all but a number that the database assigns.
    """

    def __init__(self, statement: Statement | Callable[[str], Statement], columns: Sequence[str] | None = None) -> None:
        self._statement, self._columns = statement, columns
        self._compiled: dict[str, _Compiled] = {}

    def run(self, connection: Connection, *rows: Row) -> int:
        """Runs the statement for each row, in one call of the driver. Returns how many rows of the table it changed.

        Raises ValueError for a row with other members than the statement's, and SQLAlchemy's errors.
        """
        compiled = self._compiled.get(connection.dialect.name)
        if compiled is None:
            compiled = self._compiled[connection.dialect.name] = self._compile(connection.dialect)
        bound = list(map(compiled.bind, rows))
        if not bound:
            return 0
        result = connection.exec_driver_sql(compiled.sql, bound if len(bound) > 1 else bound[0])
        return int(result.rowcount)

    def _compile(self, dialect: Dialect) -> _Compiled:
        statement = self._statement(dialect.name) if callable(self._statement) else self._statement
        columns = self._columns
        if isinstance(statement, sa.Insert):
            statement = statement.inline()  # else SQLAlchemy lets PostgreSQL return the new key
            if columns is None:
                numbered = getattr(statement.table, "autoincrement_column", None)
                columns = [column.key for column in statement.table.columns if column is not numbered]
        compiled = statement.compile(dialect=dialect, column_keys=columns)
        if not isinstance(compiled, SQLCompiler) or compiled.post_compile_params or compiled.prefetch:
            raise TypeError(f"expected a statement whose rows give all values, without IN lists and defaults: {statement}")
        positions = compiled.positiontup or []  # a name may stand at several positions
        binds = {name: compiled.binds[name] for name in positions}
        constants = {name: bind.value for name, bind in binds.items() if not bind.required}
        convert = {name: bind.type.dialect_impl(dialect).bind_processor(dialect) for name, bind in binds.items()}
        parameters = tuple((name, convert[name]) for name in positions)
        return _Compiled(compiled.string, parameters, constants, len(binds) - len(constants))
