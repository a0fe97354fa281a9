"""Statements of SQLAlchemy Core that SQLite's driver runs itself, for transactions that run for every job.

SQLAlchemy spends several times as long on a statement as SQLite does. A `SqliteStatement` is compiled once, at import, and then
costs one call of the driver. It runs in the transaction of the SQLAlchemy connection that it is given.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection
from sqlalchemy.dialects import sqlite
from sqlalchemy.engine import result_tuple
from sqlalchemy.exc import DBAPIError

Parameters = Mapping[str, object]
"""Values by the names of a statement's bound parameters; further names are ignored."""
_DIALECT = sqlite.dialect(paramstyle="named")


class SqliteStatement:
    """See the module's docstring. `columns`: those that an INSERT gets, separated by spaces; its parameters have their names.

    Values are bound as they are, without the types of their columns: text, whole numbers, bytes, None and booleans. Its methods
    raise SQLAlchemy's DBAPIError if the database fails.
    """

    def __init__(self, statement: sa.ClauseElement, columns: str = "") -> None:
        compiled = statement.compile(dialect=_DIALECT, column_keys=columns.split() or None)
        self.sql = str(compiled)
        if "POSTCOMPILE" in self.sql:
            raise ValueError(f"expected a statement whose text does not depend on its values, got: {self.sql}")
        self._constants = {name: value for name, value in compiled.params.items() if value is not None}
        self._row: Callable[[Sequence[Any]], Any] | None = None

    def run(self, c: Connection, parameters: Parameters) -> int:
        """Runs it for its effect. Returns the number of rows that it wrote."""
        return self._execute(c, parameters).rowcount

    def insert(self, c: Connection, parameters: Parameters) -> int:
        """Runs an INSERT of one row. Returns the row's number; 0 if nothing was inserted."""
        cursor = self._execute(c, parameters)
        return (cursor.lastrowid or 0) if cursor.rowcount > 0 else 0

    def all(self, c: Connection, parameters: Parameters) -> list[Any]:
        """Returns the rows, each with its columns as attributes."""
        cursor = self._execute(c, parameters)
        try:
            rows = cursor.fetchall()
        except sqlite3.Error as error:
            raise self._translated(error) from error
        return list(map(self._row_of(cursor), rows)) if rows else []

    def first(self, c: Connection, parameters: Parameters) -> Any | None:
        """Returns the first row; None if there is none."""
        cursor = self._execute(c, parameters)
        try:
            row = cursor.fetchone()
            make = self._row_of(cursor) if row is not None else None
            cursor.close()
        except sqlite3.Error as error:
            raise self._translated(error) from error
        return None if make is None else make(row)

    def _execute(self, c: Connection, parameters: Parameters) -> sqlite3.Cursor:
        try:
            return _driver(c).execute(self.sql, self._constants | dict(parameters) if self._constants else parameters)
        except sqlite3.Error as error:
            raise self._translated(error) from error

    def _row_of(self, cursor: sqlite3.Cursor) -> Callable[[Sequence[Any]], Any]:
        if self._row is None:
            self._row = result_tuple([column[0] for column in cursor.description])
        return self._row

    def _translated(self, error: sqlite3.Error) -> Exception:
        """As SQLAlchemy would raise it. Parameters may contain secrets, so they are left out."""
        translated: Exception = DBAPIError.instance(self.sql, None, error, sqlite3.Error, hide_parameters=True)
        return translated


def _driver(c: Connection) -> sqlite3.Connection:
    connection: Any = c.connection.dbapi_connection
    driver: sqlite3.Connection = connection
    return driver
