"""The connection to the SQL database that holds the index and the operations: engine, transactions, migrations.

SQLite runs in WAL mode with synchronous=FULL, so that a committed transaction survives a power cut. Writers take turns
twice: by a lock inside the process, and by BEGIN IMMEDIATE with a busy timeout between processes (an import may run
beside the service).
"""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from alembic.command import upgrade
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory

from dicom_depot.domain.errors import ConfigurationError, ServiceUnavailable, StorageFull

BUSY_TIMEOUT_SECONDS = 60


class Database:
    """One SQLite file. Safe for many threads; open one per process."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        # It holds patients' names. A file that is there is not opened: closing it again would let go of the locks that
        # another connection of this process holds on it (POSIX locks belong to the process, not to the descriptor).
        with suppress(FileExistsError):
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        self.path = path
        self.engine = sa.create_engine(
            sa.URL.create("sqlite", database=str(path)),
            connect_args={"timeout": BUSY_TIMEOUT_SECONDS, "check_same_thread": False},
            pool_size=8,
            max_overflow=56,
            hide_parameters=True,  # they hold patients' names, and errors are logged
        )
        self._write_turn = threading.Lock()
        sa.event.listen(self.engine, "connect", _prepare)

    @contextmanager
    def read(self) -> Iterator[sa.Connection]:
        """A consistent view: everything read in it stems from one moment."""
        with _translated(), self.engine.connect() as connection:
            connection.exec_driver_sql("BEGIN")
            yield connection

    @contextmanager
    def write(self) -> Iterator[sa.Connection]:
        """A transaction, durable when the block has ended, or undone when it raises."""
        with _translated(), self._write_turn, self.engine.connect() as connection:
            connection.exec_driver_sql("BEGIN IMMEDIATE")
            yield connection
            connection.commit()

    def migrate(self) -> None:
        """Bring the schema to the version of this release. Does nothing when it is there."""
        current, newest = self._versions()
        if current == newest:
            return
        self._refuse_unknown(current)
        with self.write() as connection:
            config = _alembic_config()
            config.attributes["connection"] = connection
            upgrade(config, "head")

    def check_version(self) -> None:
        """Raises ConfigurationError when the schema is not the one that this release works with."""
        current, newest = self._versions()
        if current != newest:
            self._refuse_unknown(current)
            raise ConfigurationError(
                f"The database schema is at version {current or 'none'}, this release needs {newest}. "
                "Run `dicom-depot migrate`."
            )

    def close(self) -> None:
        self.engine.dispose()

    def _versions(self) -> tuple[str | None, str | None]:
        with self.read() as connection:
            current = MigrationContext.configure(connection).get_current_revision()
        return current, ScriptDirectory.from_config(_alembic_config()).get_current_head()

    def _refuse_unknown(self, current: str | None) -> None:
        known = {script.revision for script in ScriptDirectory.from_config(_alembic_config()).walk_revisions()}
        if current is not None and current not in known:
            raise ConfigurationError(
                f"The database schema is at version {current}, which this release does not know: it was written by a "
                "newer release. Install that release again, or restore a backup."
            )


def _alembic_config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
    return config


def _prepare(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # transactions are begun explicitly, see Database.read and .write
    for pragma in (
        "journal_mode=WAL",
        "synchronous=FULL",
        "foreign_keys=ON",
        "cache_size=-16384",
        "journal_size_limit=67108864",
        "temp_store=MEMORY",
    ):
        connection.execute(f"PRAGMA {pragma}").close()


@contextmanager
def _translated() -> Iterator[None]:
    """Name the faults of a database that a caller can do something about."""
    try:
        yield
    except sa.exc.TimeoutError as error:
        raise ServiceUnavailable("All connections to the database are in use; try again later.") from error
    except (sa.exc.DatabaseError, sqlite3.DatabaseError) as error:
        reason = str(error.orig if isinstance(error, sa.exc.DatabaseError) else error)
        if "full" in reason:
            raise StorageFull("The disk that holds the database is full; free space and try again.") from error
        if "locked" in reason or "busy" in reason:
            raise ServiceUnavailable("The database is busy; try again later.") from error
        if "unable to open database file" in reason or "disk I/O error" in reason:
            raise ServiceUnavailable(
                "The database file cannot be opened, read or written; see to its disk and folder, then try again."
            ) from error
        if "not a database" in reason or "malformed" in reason:
            raise ConfigurationError(
                "The database file is damaged or not a database of this service. Restore it from a backup."
            ) from error
        raise
