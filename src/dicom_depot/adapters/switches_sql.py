"""What an operator switches on and off at run time, kept in the database so that it holds for all processes."""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.dialects.sqlite import insert

from dicom_depot.adapters.database import Database
from dicom_depot.adapters.schema import switches


class SqlSwitches:
    """Named switches; one that was never set is off."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def is_on(self, name: str) -> bool:
        statement = sa.select(switches.c.is_on).where(switches.c.name == name)
        with self._database.read() as connection:
            return bool(connection.execute(statement).scalar_one_or_none())

    def set(self, name: str, *, is_on: bool) -> None:
        """Durable on return. Idempotent."""
        statement = insert(switches).values(name=name, is_on=is_on)
        with self._database.write() as connection:
            connection.execute(statement.on_conflict_do_update(index_elements=("name",), set_={"is_on": is_on}))
