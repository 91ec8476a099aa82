"""The database that the migrations make is the one that the code has in mind, and no other is worked with."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext

from dicom_depot.adapters.database import Database
from dicom_depot.adapters.index_sql import SqlIndex
from dicom_depot.adapters.schema import metadata
from dicom_depot.domain.errors import ConfigurationError
from dicom_depot.testing.index_contract import make_record


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    opened = Database(tmp_path / "folder with % and ?" / "depot.sqlite")
    yield opened
    opened.close()


def write(database: Database, statement: str) -> None:
    with closing(sqlite3.connect(database.path)) as connection:
        connection.execute(statement)
        connection.commit()


def test_the_migrated_schema_is_the_one_that_the_adapters_use(database: Database) -> None:
    database.migrate()
    with database.engine.connect() as connection:
        context = MigrationContext.configure(
            connection, opts={"compare_type": True, "compare_server_default": True, "render_as_batch": True}
        )
        assert compare_metadata(context, metadata) == []


def test_constraints_and_indexes_are_those_of_the_schema_too(database: Database, tmp_path: Path) -> None:
    database.migrate()
    drawn = sa.create_engine(f"sqlite:///{tmp_path}/drawn.sqlite")
    metadata.create_all(drawn)

    def shape(engine: sa.Engine) -> dict[str, object]:
        inspector = sa.inspect(engine)
        return {
            table: (
                inspector.get_pk_constraint(table),
                sorted(inspector.get_unique_constraints(table), key=str),
                sorted(inspector.get_foreign_keys(table), key=str),
                sorted(inspector.get_indexes(table), key=str),
                [(column["name"], str(column["type"]), column["nullable"]) for column in inspector.get_columns(table)],
            )
            for table in inspector.get_table_names()
            if table != "alembic_version"
        }

    migrated = shape(database.engine)
    assert migrated == shape(drawn)
    assert migrated.keys() == metadata.tables.keys()
    drawn.dispose()


def test_ids_are_never_given_twice(database: Database) -> None:
    """A chunk holds internal ids: one that was swept must not come to mean another instance."""
    database.migrate()
    index = SqlIndex(database)
    index.add([make_record("1/2/3"), make_record("1/2/4")])
    ids = [entry.instance_id for entry in index.scan(0, 10)]
    index.forget(ids)
    index.add([make_record("1/2/5")])
    assert index.scan(0, 10)[0].instance_id > max(ids)


def test_migrating_again_changes_nothing(database: Database) -> None:
    database.migrate()
    SqlIndex(database).add([make_record("1/2/3")])
    database.migrate()
    database.check_version()
    assert SqlIndex(database).totals(1) == (1, 100)


def test_a_database_without_a_schema_is_refused_with_the_remedy(database: Database) -> None:
    with pytest.raises(ConfigurationError, match=r"version none.*dicom-depot migrate"):
        database.check_version()


def test_a_database_of_a_newer_release_is_refused_and_left_alone(database: Database) -> None:
    database.migrate()
    write(database, "UPDATE alembic_version SET version_num = '9999'")
    content = database.path.read_bytes()
    for refuse in (database.check_version, database.migrate):
        with pytest.raises(ConfigurationError, match=r"9999.*newer release"):
            refuse()
    assert database.path.read_bytes() == content


def test_commits_survive_a_power_cut_by_the_databases_settings(database: Database) -> None:
    database.migrate()
    with database.read() as connection:
        settings = [
            connection.exec_driver_sql(f"PRAGMA {name}").scalar()
            for name in ("journal_mode", "synchronous", "foreign_keys")
        ]
    assert settings == ["wal", 2, 1]


def test_a_write_that_raises_leaves_nothing(database: Database) -> None:
    database.migrate()

    def interrupted() -> None:
        with database.write() as connection:
            connection.exec_driver_sql("UPDATE counters SET value = 99")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert SqlIndex(database).sequence() == 0
    SqlIndex(database).add([make_record("1/2/3")])
