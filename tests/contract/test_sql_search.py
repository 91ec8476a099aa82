"""Searching in SQL: live counts, the upgrade of a database of the release before, and that indexes are used."""

from __future__ import annotations

import sqlite3
import zlib
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import Random

import pytest
import sqlalchemy as sa
from alembic.command import upgrade

from dicom_depot.adapters import search_sql
from dicom_depot.adapters.database import Database, _alembic_config
from dicom_depot.adapters.index_sql import SqlIndex
from dicom_depot.adapters.search_sql import SqlSearch
from dicom_depot.codec.qido import SearchResource, parse_search
from dicom_depot.domain.identifiers import SeriesRef, StudyRef, parse_identifier
from dicom_depot.domain.search import Found, Level, SearchQuery
from dicom_depot.testing.index_contract import make_record

_LATER = timedelta(hours=1)
_RESOURCES = {level.value: SearchResource(level) for level in Level}


def query(resource: str | SearchResource, *filters: tuple[str, str], is_fuzzy: bool = False) -> SearchQuery:
    wanted = _RESOURCES[resource] if isinstance(resource, str) else resource
    return parse_search([*filters, ("fuzzymatching", str(is_fuzzy))], wanted, {}).query


class Place:
    """A database with its index and its search."""

    def __init__(self, path: Path) -> None:
        self.database = Database(path)
        self.index = SqlIndex(self.database)
        self.search = SqlSearch(self.database)

    def found(self, resource: str, *filters: tuple[str, str], is_fuzzy: bool = False) -> list[Found]:
        return self.search.page(query(resource, *filters, is_fuzzy=is_fuzzy), 1000, 0).found

    def names(self, resource: str, *filters: tuple[str, str], is_fuzzy: bool = False) -> list[str]:
        """Of each result the UIDs down to its level."""
        depth = list(_RESOURCES).index(resource) + 1
        found = self.found(resource, *filters, is_fuzzy=is_fuzzy)
        return ["/".join(str(each.ref).split("/")[:depth]) for each in found]

    def rows(self, statement: str) -> list[tuple[object, ...]]:
        with closing(sqlite3.connect(self.database.path)) as connection:
            return connection.execute(statement).fetchall()


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    made = Place(tmp_path / "depot.sqlite")
    made.database.migrate()
    yield made
    made.database.close()


# Live counts


def test_counts_add_up_after_any_history(place: Place) -> None:
    randomness = Random(4)
    for number in range(300):
        identifier = "/".join(str(randomness.randrange(3)) for _ in range(3))
        match randomness.randrange(8):
            case 0:
                place.index.delete(parse_identifier("/".join(identifier.split("/")[: randomness.randrange(1, 4)])))
            case 1:
                swept = place.index.sweepable(datetime.now(UTC) + _LATER, None, randomness.randrange(1, 9))
                place.index.forget([id_ for id_, _ in swept])
            case 2:
                ids = [each.instance_id for each in place.index.scan(0, 1000)]
                place.index.forget(randomness.sample(ids, min(len(ids), 2)))  # live ones too, as a check repairs
            case _:
                kind = randomness.random() < 0.5
                place.index.add([make_record(identifier, f"{number}", may_replace=kind), make_record("9/9/9", "same")])
        if number % 20 == 0 or number == 299:
            check_counts(place)


def check_counts(place: Place) -> None:
    live = "FROM instances i JOIN series s ON s.id = i.series_id WHERE i.deleted_sequence = 0"
    for table, owner in (("series", "s.id"), ("studies", "s.study_id")):
        counted = place.rows(f"SELECT {owner}, count(*), max(i.id) {live} GROUP BY {owner} ORDER BY 1")
        rows = place.rows(f"SELECT id, instance_count, newest_id FROM {table} ORDER BY 1")  # noqa: S608
        assert [row for row in rows if row[1:] != (0, 0)] == counted
    counts = place.search.study_counts([each.study_id for each in place.found("study")])
    assert sum(each.instance_count for each in counts.values()) == len(place.found("instance"))
    assert sum(each.series_count for each in counts.values()) == len(place.found("series"))
    assert {each.study_id for each in place.found("instance")} == set(counts)


def test_two_connections_count_together(place: Place) -> None:
    other = Place(place.database.path)
    for number in range(10):
        (place, other)[number % 2].index.add([make_record(f"1/{number % 3}/{number}")])
    other.index.delete(parse_identifier("1/0"))
    check_counts(place)
    assert place.names("series") == ["1/2", "1/1"]
    other.database.close()


def test_values_of_what_is_forgotten_are_gone(place: Place) -> None:
    record = make_record("1/2/3")
    record.header.attributes["patient_name"] = "Doe^Jane"
    place.index.add([record])
    assert place.names("study", ("PatientName", "doe jane"), is_fuzzy=True) == ["1"]
    place.index.delete(parse_identifier("1"))
    for _ in range(2):
        assert place.names("study", ("PatientName", "doe^jane")) == []
        assert place.names("study", ("PatientName", "doe jane"), is_fuzzy=True) == []
        place.index.add([make_record("1/2/4")])
    assert place.names("study") == ["1"]


# Indexes

_SELECTIVE: tuple[tuple[str, tuple[str, str]], ...] = (
    ("study", ("StudyInstanceUID", "1.2,1.3")),
    ("study", ("PatientID", "P1")),
    ("study", ("PatientID", "P1*")),
    ("study", ("StudyDate", "20240101-20240102")),
    ("study", ("StudyTime", "10")),
    ("study", ("AccessionNumber", "A\\B")),
    ("study", ("PatientBirthDate", "-19000101")),
    ("study", ("StudyID", "1")),
    ("study", ("StudyDescription", "head")),
    ("study", ("PatientName", "Doe^Jane")),
    ("study", ("ReferringPhysicianName", "Doe^*")),
    ("study", ("ModalitiesInStudy", "SR")),
    ("series", ("SeriesInstanceUID", "1.2")),
    ("series", ("SeriesNumber", "77")),
    ("series", ("SeriesDescription", "T1*")),
    ("series", ("ManufacturerModelName", "x")),
    ("series", ("PerformedProcedureStepStartDate", "20240101")),
    ("series", ("RequestAttributesSequence.RequestedProcedureID", "R1")),
    ("instance", ("SOPInstanceUID", "1.2")),
    ("instance", ("SOPClassUID", "1.2")),
    ("instance", ("InstanceNumber", "7")),
)


def plans(place: Place, wanted: SearchQuery) -> list[str]:
    """The steps by which SQLite answers a query."""
    seen: list[tuple[str, object]] = []

    def note(_connection: object, _cursor: object, statement: str, parameters: object, *_: object) -> None:
        seen.append((statement, parameters))

    sa.event.listen(place.database.engine, "before_cursor_execute", note)
    try:
        place.search.page(wanted, 100, 0)
    finally:
        sa.event.remove(place.database.engine, "before_cursor_execute", note)
    selects = [(statement, parameters) for statement, parameters in seen if statement.startswith("SELECT")]
    assert selects
    with closing(sqlite3.connect(place.database.path)) as connection:
        return [
            row[3]
            for statement, parameters in selects
            for row in connection.execute(f"EXPLAIN QUERY PLAN {statement}", parameters)  # type: ignore[arg-type]
        ]


def test_selective_queries_are_answered_from_indexes(place: Place) -> None:
    place.index.add([make_record(f"1/2/{number}") for number in range(3)])
    levels = list(_RESOURCES)
    for level_of, condition in _SELECTIVE:
        for level in levels[levels.index(level_of) :]:
            assert_no_scan(plans(place, query(level, condition)))


def test_words_and_scopes_are_answered_from_indexes(place: Place) -> None:
    place.index.add([make_record(f"1/2/{number}") for number in range(3)])
    for level in _RESOURCES:
        assert_no_scan(plans(place, query(level, ("PatientName", "doe ja"), is_fuzzy=True)))
    study, series = parse_identifier("1"), parse_identifier("1/2")
    assert isinstance(study, StudyRef)
    assert isinstance(series, SeriesRef)
    assert_no_scan(plans(place, query(SearchResource(Level.SERIES, study))))
    assert_no_scan(plans(place, query(SearchResource(Level.INSTANCE, study))))
    assert_no_scan(plans(place, query(SearchResource(Level.INSTANCE, series), ("InstanceNumber", "3"))))


def test_what_matches_very_many_is_walked_from_the_newest_without_sorting(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search_sql, "GATHERED_MAX", 0)
    place.index.add([make_record(f"1/{number % 2}/{number}") for number in range(6)])
    for wanted in (query("instance"), query("instance", ("StudyInstanceUID", "1"))):
        steps = plans(place, wanted)
        walks = {"SCAN instances", "SEARCH instances USING INTEGER PRIMARY KEY (rowid<?)"}
        assert walks & set(steps), "by the internal id, backwards"
        assert not any("TEMP B-TREE FOR ORDER BY" in step for step in steps)
    names = place.names("instance", ("StudyInstanceUID", "1"))
    assert names == ["1/1/5", "1/0/4", "1/1/3", "1/0/2", "1/1/1", "1/0/0"]


def assert_no_scan(steps: list[str]) -> None:
    assert [step for step in steps if step.startswith("SCAN")] == [], steps


# The database of the release before


def test_a_database_of_the_release_before_is_counted_and_brought_into_form(tmp_path: Path) -> None:
    place = Place(tmp_path / "depot.sqlite")
    with place.database.write() as connection:
        config = _alembic_config()
        config.attributes["connection"] = connection
        upgrade(config, "0003")
    fill_0003(place.database.path)
    place.database.migrate()
    place.database.check_version()
    check_counts(place)
    assert place.names("study") == ["2", "1"]
    assert place.names("series") == ["2/1", "1/1"]
    assert place.names("study", ("StudyDate", "20240102"), ("StudyDescription", "HEAD *")) == ["1"]
    assert place.names("study", ("StudyTime", "10")) == ["1"]
    assert place.names("study", ("PatientName", "muller^jurgen")) == ["1"]
    assert place.names("study", ("PatientName", "太 山"), is_fuzzy=True) == ["2"], "what the newest live instance says"
    assert place.names("study", ("PatientName", "wrong"), is_fuzzy=True) == []
    assert place.names("series", ("RequestAttributesSequence.RequestedProcedureID", "r2")) == ["2/1"]
    assert place.names("series", ("Modality", "ct")) == ["1/1"]
    assert place.names("study", ("ModalitiesInStudy", "PT")) == [], "nothing of it is live"


def fill_0003(path: Path) -> None:
    """A study without metadata (its back-fill did not come so far); one whose newest instance was deleted; one that was
    deleted as a whole.
    """
    name, requests = '{"Alphabetic":"Yamada^Taro","Ideographic":"山田^太郎"}', '{"00401001":{"vr":"SH","Value":["R2"]}}'
    members = f'"00100010":{{"vr":"PN","Value":[{name}]}},"00400275":{{"vr":"SQ","Value":[{{}},{requests}]}}'
    packed = zlib.compress(f"{{{members}}}".encode())
    with closing(sqlite3.connect(path)) as connection:
        connection.executemany(
            "INSERT INTO studies (id, study_uid, study_date, study_time, study_description, patient_name)"
            " VALUES (?, ?, ?, ?, ?, ?)",
            [
                (1, "1", "2024.01.02", "10:11", "Head  and neck", "Müller^Jürgen"),
                (2, "2", "20240101", None, None, "Wrong^Name"),
                (3, "3", "20240101", None, None, "Gone^Name"),
            ],
        )
        connection.executemany(
            "INSERT INTO series (id, study_id, series_uid, modality) VALUES (?, ?, ?, ?)",
            [(1, 1, "1", "CT"), (2, 2, "1", "MR"), (3, 3, "1", "PT"), (4, 1, "2", "PT")],
        )
        rows = [(1, 1, 0), (2, 1, 0), (3, 2, 0), (4, 2, 8), (5, 3, 9), (6, 4, 10)]  # instance, series, deleted by
        for number, series, deleted in rows:
            connection.execute(
                "INSERT INTO instances (id, series_id, sop_instance_uid, sop_class_uid, transfer_syntax_uid, store_key,"
                " size, sha256, xxh3, stored_at, created_sequence, deleted_sequence)"
                " VALUES (?, ?, ?, '1.2', '1.2', ?, 1, ?, 1, '2026-01-01 00:00:00.000000', ?, ?)",
                (number, series, str(number), f"key/{number}", bytes(32), number, deleted),
            )
        connection.execute("INSERT INTO instance_metadata VALUES (3, ?, x'')", (packed,))
        connection.execute("UPDATE counters SET value = 10 WHERE name = 'sequence'")
        connection.commit()
