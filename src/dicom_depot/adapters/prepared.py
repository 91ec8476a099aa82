"""Statements of SQLAlchemy Core, compiled once and run by the driver: where each is run for every single instance,
SQLAlchemy's own execution takes several times as long as the database's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import sqlite

_DIALECT = sqlite.dialect(paramstyle="qmark")

Row = tuple[Any, ...]


class Prepared:
    """One statement. `columns`: those that an INSERT without values of its own sets."""

    def __init__(self, statement: sa.sql.ClauseElement, columns: Sequence[str] | None = None) -> None:
        compiled = statement.compile(dialect=_DIALECT, column_keys=columns)
        assert isinstance(compiled, sa.sql.compiler.SQLCompiler)
        self._text = str(compiled)
        self._binds = [
            (name, compiled.binds[name].type.dialect_impl(_DIALECT).bind_processor(_DIALECT), compiled.params[name])
            for name in compiled.positiontup or ()
        ]

    def one(self, connection: sa.Connection, values: Mapping[str, Any]) -> Row:
        """Run it, for its only row."""
        cursor = connection.connection.cursor()
        try:
            cursor.execute(self._text, self._bound(values))
            row = cursor.fetchone()
            assert row is not None
            return tuple(row)
        finally:
            cursor.close()

    def all(self, connection: sa.Connection, values: Mapping[str, Any]) -> list[Row]:
        """Run it, for all its rows."""
        cursor = connection.connection.cursor()
        try:
            cursor.execute(self._text, self._bound(values))
            return list(cursor.fetchall())
        finally:
            cursor.close()

    def many(self, connection: sa.Connection, rows: Iterable[Mapping[str, Any]]) -> None:
        """Run it once for each of `rows`."""
        cursor = connection.connection.cursor()
        try:
            cursor.executemany(self._text, [self._bound(row) for row in rows])
        finally:
            cursor.close()

    def _bound(self, values: Mapping[str, Any]) -> list[Any]:
        return [
            values.get(name, constant) if convert is None else convert(values.get(name, constant))
            for name, convert, constant in self._binds
        ]
