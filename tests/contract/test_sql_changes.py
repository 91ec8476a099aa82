"""The SQL change feed: one entry for each number, whatever happens to the instances later."""

from __future__ import annotations

import itertools
import sqlite3
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from random import Random

import pytest
from alembic.command import upgrade

from dicom_depot.adapters.changes_sql import SqlChangeFeed
from dicom_depot.adapters.database import Database, _alembic_config
from dicom_depot.adapters.index_sql import SqlIndex
from dicom_depot.domain.identifiers import parse_identifier
from dicom_depot.ports import Change, ChangeAction, ChangeState
from dicom_depot.testing.index_contract import make_record

_CREATE, _UPDATE, _DELETE = ChangeAction.CREATE, ChangeAction.UPDATE, ChangeAction.DELETE
_CURRENT, _REPLACED, _DELETED = ChangeState.CURRENT, ChangeState.REPLACED, ChangeState.DELETED
_LATER = timedelta(hours=1)
_NOON = datetime(2026, 1, 31, 12, tzinfo=UTC)


class Place:
    """A database with its index and its change feed."""

    def __init__(self, path: Path) -> None:
        self.database = Database(path)
        self.database.migrate()
        self.index = SqlIndex(self.database)
        self.feed = SqlChangeFeed(self.database)

    def do(self, *changes: str) -> None:
        """`+` stores, `=` replaces, `-` deletes; each with other bytes."""
        for change in changes:
            if change[0] == "-":
                self.index.delete(parse_identifier(change[1:]))
            else:
                content = str(self.index.sequence())
                self.index.add([make_record(change[1:], content, may_replace=change[0] == "=")])

    def all(self) -> list[Change]:
        return self.feed.changes(0, 10_000)

    def set_times(self, *times: datetime) -> None:
        """Pretend that the changes happened then."""
        with closing(sqlite3.connect(self.database.path)) as connection:
            for number, time in enumerate(times, 1):
                text = time.replace(tzinfo=None).isoformat(" ", "microseconds")
                connection.execute("UPDATE changes SET occurred_at = ? WHERE sequence = ?", (text, number))
            connection.commit()

    def window(self, since: datetime | None, before: datetime | None, after: int = 0, limit: int = 100) -> list[int]:
        return [entry.sequence for entry in self.feed.changes(after, limit, since, before)]


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    made = Place(tmp_path / "depot.sqlite")
    yield made
    made.database.close()


def told(entries: list[Change]) -> list[tuple[int, str, ChangeAction, ChangeState]]:
    return [(entry.sequence, str(entry.ref), entry.action, entry.state) for entry in entries]


def test_where_nothing_happened_the_feed_is_empty(place: Place) -> None:
    assert place.all() == []
    assert place.feed.latest_change() is None
    assert place.window(_NOON, None) == []


def test_each_number_has_one_entry_and_nothing_else_has_one(place: Place) -> None:
    place.index.add([make_record("1/2/3", "a"), make_record("1/2/4"), make_record("1/2/3", "a")])
    place.index.add([make_record("1/2/3", "a", may_replace=True), make_record("1/2/4", "conflicting")])
    place.do("=1/2/3", "=1/5/6", "-7", "-1/2/4", "-1", "-1", "+1/2/3")
    entries = place.all()
    assert [entry.sequence for entry in entries] == list(range(1, place.index.sequence() + 1))
    assert told(entries[:5]) == [
        (1, "1/2/3", _CREATE, _REPLACED),
        (2, "1/2/4", _CREATE, _DELETED),
        (3, "1/2/3", _UPDATE, _REPLACED),
        (4, "1/5/6", _CREATE, _DELETED),
        (5, "1/2/4", _DELETE, _DELETED),
    ]
    assert {(str(entry.ref), entry.action) for entry in entries[5:7]} == {("1/2/3", _DELETE), ("1/5/6", _DELETE)}
    assert told(entries[7:]) == [(8, "1/2/3", _CREATE, _CURRENT)]


@pytest.mark.parametrize(
    ("changes", "states"),
    [
        (["+"], [_CURRENT]),
        (["+", "="], [_REPLACED, _CURRENT]),
        (["+", "=", "="], [_REPLACED, _REPLACED, _CURRENT]),
        (["+", "-"], [_DELETED, _DELETED]),
        (["+", "=", "-"], [_DELETED, _DELETED, _DELETED]),
        (["+", "-", "+"], [_REPLACED, _REPLACED, _CURRENT]),
        (["+", "-", "=", "-"], [_DELETED] * 4),
    ],
    ids=lambda value: "".join(value) if isinstance(value[0], str) and len(value[0]) == 1 else "",
)
def test_the_state_is_what_became_of_the_version(place: Place, changes: list[str], states: list[ChangeState]) -> None:
    place.do("+1/2/30", *(f"{change}1/2/3" for change in changes), "+1/20/3", "-1/20/3")
    entries = [entry for entry in place.all() if str(entry.ref) == "1/2/3"]
    assert [entry.state for entry in entries] == states
    live = [
        entry.instance_id for entry in place.index.scan(0, 100) if entry.identifier == "1/2/3" if not entry.is_deleted
    ]
    assert [entry.instance_id for entry in entries if entry.instance_id is not None] == live
    assert all((entry.instance_id is not None) == (entry.state is _CURRENT) for entry in entries)


def test_several_versions_in_one_call_have_an_entry_each(place: Place) -> None:
    place.index.add([make_record("1/2/3", content, may_replace=True) for content in "abc"])
    assert told(place.all()) == [
        (1, "1/2/3", _CREATE, _REPLACED),
        (2, "1/2/3", _UPDATE, _REPLACED),
        (3, "1/2/3", _UPDATE, _CURRENT),
    ]


def test_the_latest_change_is_the_last_entry_of_the_feed(place: Place) -> None:
    for change in ("+1/2/3", "+1/2/4", "=1/2/3", "-1/2", "+1/2/4"):
        place.do(change)
        assert place.feed.latest_change() == place.all()[-1]
    assert [entry.sequence for entry in place.all()] == [1, 2, 3, 4, 5, 6]


def test_entries_stay_when_what_they_are_about_is_swept(place: Place) -> None:
    place.do("+1/2/3", "=1/2/3", "+1/2/4", "-1/2/4", "+1/2/5", "-1/2/5")
    before = place.all()
    place.index.forget([id_ for id_, _ in place.index.sweepable(datetime.now(UTC) + _LATER, None, 100)])
    assert len(place.index.scan(0, 100)) == 1
    assert place.all() == before


def test_times_are_those_of_the_change_with_their_zone(place: Place) -> None:
    before = datetime.now(UTC)
    place.do("+1/2/3", "=1/2/3", "-1")
    times = [entry.occurred_at for entry in place.all()]
    assert times == sorted(times)
    assert before <= times[0]
    assert times[-1] <= datetime.now(UTC)
    assert all(time.utcoffset() == timedelta(0) for time in times)


@pytest.mark.parametrize("limit", [1, 2, 3, 7, 19, 20, 21])
def test_every_page_size_shows_each_entry_once_in_order(place: Place, limit: int) -> None:
    place.do(
        *(f"+1/{n % 3}/{n}" for n in range(12)), *(f"=1/{n % 3}/{n}" for n in range(5)), "-1/0/0", "-1/1/1", "-1/2/2"
    )
    entries: list[Change] = []
    while page := place.feed.changes(entries[-1].sequence if entries else 0, limit):
        assert len(page) <= limit
        entries += page
    assert entries == place.all()
    assert len(entries) == 20
    assert place.feed.changes(20, limit) == place.feed.changes(10**15, limit) == []


def test_a_window_begins_with_its_first_moment_and_ends_before_its_last(place: Place) -> None:
    place.do(*(f"+1/2/{n}" for n in range(6)))
    second, tick = timedelta(seconds=1), timedelta(microseconds=1)
    moments = [_NOON - second, _NOON - tick, _NOON, _NOON + tick, _NOON + second, _NOON + 2 * second]
    place.set_times(*moments)
    assert place.window(_NOON, _NOON + second) == [3, 4]
    assert place.window(_NOON, None) == [3, 4, 5, 6]
    assert place.window(None, _NOON) == [1, 2]
    assert place.window(_NOON + tick, _NOON + second + tick) == [4, 5]
    assert place.window(_NOON + 3 * second, None) == []
    cuts = [_NOON - 2 * second, *moments, _NOON + 3 * second]
    assert [n for since, before in itertools.pairwise(cuts) for n in place.window(since, before)] == [
        1, 2, 3, 4, 5, 6,
    ]  # fmt: skip


def test_a_windows_moments_may_be_in_any_time_zone(place: Place) -> None:
    place.do("+1/2/3", "+1/2/4", "+1/2/5")
    place.set_times(_NOON - _LATER, _NOON, _NOON + _LATER)
    for hours in (-12, -5, 0, 3, 14):
        zone = timezone(timedelta(hours=hours))
        assert place.window(_NOON.astimezone(zone), (_NOON + _LATER).astimezone(zone)) == [2]


@pytest.mark.parametrize("limit", [1, 2, 3, 5, 9])
def test_a_window_is_paged_by_how_many_entries_are_left_out(place: Place, limit: int) -> None:
    place.do(*(f"+1/2/{n}" for n in range(9)))
    place.set_times(*(_NOON + timedelta(seconds=n // 2) for n in range(9)))
    since, before = _NOON + timedelta(seconds=1), _NOON + timedelta(seconds=4)
    found: list[int] = []
    while page := place.window(since, before, len(found), limit):
        assert len(page) <= limit
        found += page
    assert found == [3, 4, 5, 6, 7, 8]


@pytest.mark.parametrize("writers", [4])
def test_readers_beside_writers_miss_nothing_by_number_or_by_time(place: Place, writers: int) -> None:
    is_done = threading.Event()

    def write(writer: int) -> None:
        randomness = Random(writer)
        other = SqlIndex(Database(place.database.path)) if writer % 2 else place.index  # as another process would
        for number in range(40):
            records = [make_record(f"1/{writer}/{n}", f"{number} {n}", may_replace=True) for n in range(1 + number % 4)]
            other.add([*records, make_record(f"2/2/{randomness.randrange(9)}", f"{writer} {number}", may_replace=True)])
            if number % 5 == 0:
                other.delete(parse_identifier(f"1/{writer}/0"))

    def read_by_number() -> list[int]:
        found: list[int] = []
        while True:
            is_last = is_done.is_set()
            page = place.feed.changes(found[-1] if found else 0, 7)
            found += [entry.sequence for entry in page]
            if is_last and not page:
                return found

    def read_by_time() -> list[int]:
        found: list[int] = []
        since = _NOON - timedelta(days=365)
        while True:
            is_last = is_done.is_set()
            before = datetime.now(UTC)
            if before <= since:
                continue
            found += [entry.sequence for entry in place.feed.changes(0, 10_000, since, before)]
            since = before
            if is_last:
                return found

    with ThreadPoolExecutor(writers + 2) as pool:
        readers = [pool.submit(read_by_number), pool.submit(read_by_time)]
        try:
            list(pool.map(write, range(writers)))
        finally:
            is_done.set()
        seen = [reader.result() for reader in readers]
    last = place.index.sequence()
    assert last > 300
    assert seen == [list(range(1, last + 1))] * 2


# The database of the release before


def _database_at_0002(path: Path) -> Database:
    """As that release left it: live and deleted instances, one of them stored again, one swept."""
    database = Database(path)
    with database.write() as connection:
        config = _alembic_config()
        config.attributes["connection"] = connection
        upgrade(config, "0002")
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("INSERT INTO studies (id, study_uid) VALUES (1, '1'), (2, '2')")
        connection.execute(
            "INSERT INTO series (id, study_id, series_uid) VALUES (1, 1, '1.1'), (2, 1, '1.2'), (3, 2, '1.1')"
        )
        rows: list[tuple[int, str, int, int]] = [  # series, instance, stored by, deleted by
            (1, "5", 1, 0),
            (1, "6", 2, 6),
            (2, "5", 3, 8),
            (3, "5", 4, 0),
            # 5 and 7 stored and deleted what was swept
            (1, "6", 9, 0),
            (2, "7", 10, 11),
        ]
        for number, (series, sop, created, deleted) in enumerate(rows, 1):
            connection.execute(
                "INSERT INTO instances (series_id, sop_instance_uid, sop_class_uid, transfer_syntax_uid, store_key,"
                " size, sha256, xxh3, stored_at, created_sequence, deleted_sequence, deleted_at)"
                " VALUES (?, ?, '1.2', '1.2.840.10008.1.2', ?, 10, ?, 1, ?, ?, ?, ?)",
                (series, sop, f"key/{number}", bytes(32), _text(created), created, deleted, deleted and _text(deleted)),
            )
        connection.execute("UPDATE instances SET deleted_at = NULL WHERE deleted_sequence = 0")
        connection.execute("UPDATE counters SET value = 11 WHERE name = 'sequence'")
        connection.commit()
    return database


def _moment(number: int) -> datetime:
    return _NOON + timedelta(minutes=number, microseconds=number)


def _text(number: int) -> str:
    return _moment(number).replace(tzinfo=None).isoformat(" ", "microseconds")


def test_a_database_of_the_release_before_gets_an_entry_for_all_that_its_rows_tell(tmp_path: Path) -> None:
    database = _database_at_0002(tmp_path / "depot.sqlite")
    database.migrate()
    database.check_version()
    feed = SqlChangeFeed(database)
    entries = feed.changes(0, 100)
    assert told(entries) == [
        (1, "1/1.1/5", _CREATE, _CURRENT),
        (2, "1/1.1/6", _CREATE, _REPLACED),
        (3, "1/1.2/5", _CREATE, _DELETED),
        (4, "2/1.1/5", _CREATE, _CURRENT),
        (6, "1/1.1/6", _DELETE, _REPLACED),
        (8, "1/1.2/5", _DELETE, _DELETED),
        (9, "1/1.1/6", _CREATE, _CURRENT),
        (10, "1/1.2/7", _CREATE, _DELETED),
        (11, "1/1.2/7", _DELETE, _DELETED),
    ]
    assert [entry.occurred_at for entry in entries] == [_moment(entry.sequence) for entry in entries]
    assert [entry.sequence for entry in feed.changes(0, 100, _moment(3), _moment(9))] == [3, 4, 6, 8]
    assert [entry.instance_id for entry in entries if entry.state is _CURRENT] == [1, 4, 5]


def test_after_the_migration_the_feed_goes_on_with_the_next_number(tmp_path: Path) -> None:
    database = _database_at_0002(tmp_path / "depot.sqlite")
    database.migrate()
    index, feed = SqlIndex(database), SqlChangeFeed(database)
    index.add([make_record("1/1.1/5", "other", may_replace=True), make_record("3/1/1")])
    index.delete(parse_identifier("2"))
    assert told(feed.changes(11, 100)) == [
        (12, "1/1.1/5", _UPDATE, _CURRENT),
        (13, "3/1/1", _CREATE, _CURRENT),
        (14, "2/1.1/5", _DELETE, _DELETED),
    ]
    assert feed.changes(0, 1)[0].state is _REPLACED
    assert [entry.instance_id for entry in index.scan(0, 100)][-1] == 8


def test_a_migration_that_is_interrupted_leaves_the_database_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = _database_at_0002(tmp_path / "depot.sqlite")
    with closing(sqlite3.connect(database.path)) as connection:  # two rows with one number: the copy fails half way
        connection.execute("UPDATE instances SET deleted_sequence = 1 WHERE deleted_sequence = 11")
        connection.commit()
        before = connection.execute("SELECT name, sql FROM sqlite_master ORDER BY name").fetchall()
    with pytest.raises(Exception, match="UNIQUE"):
        database.migrate()
    with closing(sqlite3.connect(database.path)) as connection:
        assert connection.execute("SELECT name, sql FROM sqlite_master ORDER BY name").fetchall() == before
        assert connection.execute("SELECT version_num FROM alembic_version").fetchone() == ("0002",)
        connection.execute("UPDATE instances SET deleted_sequence = 11 WHERE deleted_sequence = 1")
        connection.commit()
    database.migrate()
    assert len(SqlChangeFeed(database).changes(0, 100)) == 9
