"""What a database's faults are told as; and that what stands in a statement's parameters is never told."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest
import sqlalchemy as sa

from dicom_depot.adapters.database import Database
from dicom_depot.domain.errors import DepotError, ServiceUnavailable, StorageFull


def _operational(text: str) -> sa.exc.OperationalError:
    return sa.exc.OperationalError("SELECT 1", {}, sqlite3.OperationalError(text))


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (sa.exc.TimeoutError("QueuePool limit reached"), ServiceUnavailable),
        (_operational("unable to open database file"), ServiceUnavailable),
        (_operational("disk I/O error"), ServiceUnavailable),
        (_operational("database is locked"), ServiceUnavailable),
        (_operational("database or disk is full"), StorageFull),
    ],
)
def test_faults_that_may_pass_are_told_as_such(error: Exception, expected: type[DepotError], tmp_path: Path) -> None:
    database = Database(tmp_path / "depot.sqlite")
    try:
        for transaction in (database.read, database.write):
            with pytest.raises(expected), transaction():
                raise error
    finally:
        database.close()


def test_parameters_do_not_stand_in_errors(tmp_path: Path) -> None:
    database = Database(tmp_path / "depot.sqlite")
    try:
        with pytest.raises(sa.exc.OperationalError) as caught, database.read() as connection:
            connection.execute(sa.text("SELECT * FROM nothing WHERE name = :name"), {"name": "DOE^JANE"})
        assert "DOE" not in str(caught.value)
    finally:
        database.close()
