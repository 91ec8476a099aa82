"""An index with its search on a real database, without a server, beside the plain archive that must say the same. The
only assertion here is that both take the same instances.
"""

from __future__ import annotations

import hashlib
import itertools
import sqlite3
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import NamedTuple

from alembic.command import upgrade

from dicom_depot.adapters import search_sql
from dicom_depot.adapters.catalog_sql import SqlCatalog
from dicom_depot.adapters.database import Database, _alembic_config
from dicom_depot.adapters.folder_store import FolderBlobStore
from dicom_depot.adapters.index_sql import SqlIndex
from dicom_depot.adapters.query_tags_sql import SqlQueryTags
from dicom_depot.adapters.search_sql import SqlSearch
from dicom_depot.codec.dicom_json import ReadInstance, read_instance
from dicom_depot.codec.qido import SearchResource, parse_search
from dicom_depot.domain.identifiers import InstanceRef, parse_identifier
from dicom_depot.domain.instance import AttributeValues, InstanceRecord
from dicom_depot.domain.search import ATTRIBUTES as OURS
from dicom_depot.domain.search import Level
from dicom_depot.services.metadata import MetadataReader
from dicom_depot.services.search import SearchAnswer, SearchService
from tests.support.search_data import CHANGES, ROW_FIELDS, asked, file_of, row_of, searchable
from tests.support.search_oracle import ATTRIBUTES, LEVELS, REQUESTS, Archive, Instance, Row


class Event(NamedTuple):
    """Instances that are stored in one call, or the UIDs of what is deleted."""

    stored: Sequence[Instance] = ()
    may_replace: bool = False
    deleted: tuple[str, ...] = ()


class Query(NamedTuple):
    """A route by level and UIDs in the path, with its filters."""

    level: str
    scope: tuple[str, ...]
    filters: tuple[tuple[str, str], ...]
    is_fuzzy: bool
    limit: int
    offset: int

    def parameters(self) -> list[tuple[str, str]]:
        """As they stand in a URL: attributes by keyword and by tag, settings in any letter case."""
        named = [
            (name if number % 2 else ATTRIBUTES[name].tag, value) for number, (name, value) in enumerate(self.filters)
        ]
        settings = {
            "fuzzyMatching": self.is_fuzzy,
            "Limit": self.limit,
            "OFFSET": self.offset,
            "INCLUDEFIELD": ROW_FIELDS,
        }
        return [*named, *((name, str(value)) for name, value in settings.items())]


class Wish(NamedTuple):
    """A query, of which is decided later what of the stored instances it is made from."""

    route: tuple[str, int]
    base: int
    other: int
    filters: Sequence[tuple[int, int]]
    limit: int
    offset: int

    def of(self, archive: Archive) -> Query:
        """Made of what is stored: it asks for what one instance says, or almost."""
        level, length = self.route
        nobody = Instance("1.1", "1.1", "5")
        base, other = (archive.live[each % len(archive.live)] if archive.live else nobody for each in self[1:3])
        told = sorted(
            (each for each in searchable(level, length) if base.told(each)),
            key=lambda each: ATTRIBUTES[each].vr == "UI",
        )
        filters: dict[str, str] = {}
        is_fuzzy = False
        for number, change_number in self.filters if told else ():
            keyword = told[number % len(told)] if number else searchable(level, length)[-1]
            changes = CHANGES[ATTRIBUTES[keyword].vr]
            change = changes[change_number % len(changes)]
            made = asked(keyword, base.told(keyword), change, other.told(keyword))
            is_name = ATTRIBUTES[keyword].vr == "PN"
            if made is None or (is_name and any(ATTRIBUTES[each].vr == "PN" for each in filters)):
                continue  # fuzzy matching is of all names of a query
            if keyword not in REQUESTS or not any(each in filters for each in REQUESTS):
                filters[keyword] = made[0]
                is_fuzzy |= made[1]
        return Query(level, base.uids[:length], tuple(filters.items()), is_fuzzy, self.limit, self.offset)


@cache
def _template(revision: str = "head") -> bytes:
    """An empty database at this version of the schema."""
    with tempfile.TemporaryDirectory() as folder:
        database = Database(Path(folder) / "depot.sqlite")
        with database.write() as connection:
            config = _alembic_config()
            config.attributes["connection"] = connection
            upgrade(config, revision)
        database.close()
        with closing(sqlite3.connect(database.path)) as connection_of_ours:
            return connection_of_ours.serialize()


_keys = itertools.count()


@dataclass
class Place:
    """A real database with its index, its search, and the plain archive that must say the same."""

    database: Database
    service: SearchService
    archive: Archive = field(default_factory=Archive)
    said: dict[tuple[str, ...], AttributeValues] = field(default_factory=dict)
    """What the instance that was stored last said, by study and by series."""

    def do(self, event: Event) -> None:
        index = SqlIndex(self.database)
        if event.deleted:
            assert index.delete(parse_identifier("/".join(event.deleted))) == self.archive.delete(*event.deleted)
            return
        outcomes = index.add([record_of(each, may_replace=event.may_replace) for each in event.stored])
        changed = [self.archive.store(each, may_replace=event.may_replace) for each in event.stored]
        assert [outcome.name in ("STORED", "REPLACED") for outcome in outcomes] == changed
        for each, is_changed in zip(event.stored, changed, strict=True):
            if is_changed:
                self.said |= dict.fromkeys((each.uids[:1], each.uids[:2]), read_of(each).header.attributes)

    def ask(self, query: Query, asked_by: str) -> SearchAnswer:
        scope = parse_identifier("/".join(query.scope)) if query.scope else None
        assert not isinstance(scope, InstanceRef)
        search = parse_search(query.parameters(), SearchResource(Level(query.level), scope), self.service.extended())
        return self.service.search(search, "standard", "http://depot/studies", (asked_by,))

    def found(self, query: Query) -> tuple[list[Row], int | None]:
        """The rows, and how many follow; nobody asked before, so that this is as of now."""
        answer = self.ask(query, f"somebody {next(_keys)}")
        return [row_of(query.level, result) for result in answer.results], answer.remaining

    def uids(self, query: Query) -> list[tuple[str, ...]]:
        """Those of what is found, straight from the index."""
        wanted = parse_search(query.parameters(), SearchResource(Level(query.level)), {})
        found = self.service.index.page(wanted.query, wanted.limit, wanted.offset).found
        return [tuple(str(each.ref).split("/"))[: LEVELS.index(query.level) + 1] for each in found]

    def expected(self, query: Query) -> list[Row]:
        return self.archive.search(query.level, query.scope, query.filters, is_fuzzy=query.is_fuzzy)


@contextmanager
def place() -> Iterator[Place]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "depot.sqlite"
        path.write_bytes(_template())
        database = Database(path)
        store = FolderBlobStore(Path(folder) / "store", may_create=True)
        metadata = MetadataReader(SqlCatalog(database), store)
        yield Place(database, SearchService(SqlSearch(database), metadata, SqlQueryTags(database)))
        database.close()


@contextmanager
def walking() -> Iterator[None]:
    """The other plan: the index walks the rows as soon as anything matches."""
    before, search_sql.GATHERED_MAX = search_sql.GATHERED_MAX, 0
    try:
        yield
    finally:
        search_sql.GATHERED_MAX = before


@cache
def _read(content: bytes) -> ReadInstance:
    return read_instance(content, len(content))


def read_of(instance: Instance) -> ReadInstance:
    """What our codec reads in its file."""
    return _read(file_of(instance))


def record_of(instance: Instance, *, may_replace: bool = False) -> InstanceRecord:
    content, read = file_of(instance), read_of(instance)
    sha256 = hashlib.sha256(content).digest()
    return InstanceRecord(
        read.header, f"key/{next(_keys)}", len(content), sha256, 7, metadata=read.metadata, may_replace=may_replace
    )


def index_rows(database: Database) -> dict[tuple[str, ...], tuple[object, ...]]:
    """What the index says of each study and series that lives: columns, counts, newest instance, values held apart."""
    own = {level: [each for each in OURS if each.level is level and each.held == "column"] for level in Level}
    found: dict[tuple[str, ...], tuple[object, ...]] = {}
    with closing(sqlite3.connect(database.path)) as connection:
        for level, keys, tables in (
            (Level.STUDY, "study_uid", "studies AS r"),
            (Level.SERIES, "study_uid, series_uid", "series AS r JOIN studies ON studies.id = r.study_id"),
        ):
            columns = "".join(f", r.{each.column}" for each in own[level])
            names = [each.column for each in OURS if each.level is level and each.held == "values"]
            wanted = ", ".join(f"'{name}', '{name}:words'" for name in names)
            rows = connection.execute(
                f"SELECT {keys}, r.id, r.instance_count,"  # noqa: S608
                f" (SELECT sop_instance_uid FROM instances WHERE id = r.newest_id AND deleted_sequence = 0){columns}"
                f" FROM {tables} WHERE r.instance_count > 0"
            ).fetchall()
            for row in rows:
                length = len(keys.split(","))
                values = connection.execute(
                    f"SELECT name, value FROM search_values WHERE owner_id = ? AND name IN ({wanted}) ORDER BY 1, 2",  # noqa: S608
                    (row[length],),
                )
                found[row[:length]] = (*row[length + 1 :], *values.fetchall())
    return found


def make_older(here: Place, path: Path) -> Database:
    """The same history in a database as the release before left it, at version 0003: no counts, no values held apart,
    and studies and series say what was stored last, live or not, as the file says it.
    """
    path.write_bytes(_template("0003"))
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("ATTACH ? AS newer", (str(here.database.path),))
        for table in ("studies", "series", "instances", "instance_metadata", "changes"):
            names = ", ".join(row[1] for row in connection.execute(f"PRAGMA main.table_info({table})"))
            connection.execute(f"INSERT INTO {table} ({names}) SELECT {names} FROM newer.{table}")  # noqa: S608
        (last,) = connection.execute("SELECT coalesce(max(sequence), 0) FROM changes").fetchone()
        connection.execute("UPDATE counters SET value = ? WHERE name = 'sequence'", (last,))
        for uids, attributes in here.said.items():
            level, table = (Level.STUDY, "studies") if len(uids) == 1 else (Level.SERIES, "series")
            columns = [each.column for each in OURS if each.level is level and each.parent is None]
            assigned = ", ".join(f"{column} = ?" for column in columns)
            row = (
                "(SELECT series.id FROM series JOIN studies ON studies.id = study_id"
                " WHERE study_uid = ? AND series_uid = ?)"
            )
            if level is Level.STUDY:
                row = "(SELECT id FROM studies WHERE study_uid = ?)"
            connection.execute(
                f"UPDATE {table} SET {assigned} WHERE id = {row}",  # noqa: S608
                (*(attributes[column] for column in columns), *uids),
            )
        connection.commit()
    return Database(path)
