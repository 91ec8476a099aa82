"""The SQL catalog: what is stored now, page by page, and the back-fill of metadata."""

from __future__ import annotations

import itertools
import json
import sqlite3
import threading
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import Random

import pytest

from dicom_depot.adapters.catalog_sql import SqlCatalog
from dicom_depot.adapters.database import Database
from dicom_depot.adapters.index_sql import SqlIndex
from dicom_depot.domain.errors import NotFound
from dicom_depot.domain.identifiers import InstanceRef, Ref, parse_identifier
from dicom_depot.domain.instance import InstanceRecord, Metadata
from dicom_depot.ports import AddOutcome, ResourceVersion, StoredInstance
from dicom_depot.testing.index_contract import make_record

_LATER = timedelta(hours=1)
_IMPLICIT = "1.2.840.10008.1.2"
_EXPLICIT = "1.2.840.10008.1.2.1"


class Place:
    """A database with its index and its catalog."""

    def __init__(self, path: Path) -> None:
        self.database = Database(path)
        self.database.migrate()
        self.index = SqlIndex(self.database)
        self.catalog = SqlCatalog(self.database)

    def store(self, *identifiers: str, content: str = "bytes", may_replace: bool = False) -> list[AddOutcome]:
        return self.index.add([make_record(each, content, may_replace=may_replace) for each in identifiers])

    def store_with_metadata(self, *identifiers: str) -> None:
        self.index.add([replace(make_record(each), metadata=metadata_of(each)) for each in identifiers])

    def delete(self, identifier: str) -> int:
        return self.index.delete(parse_identifier(identifier))

    def version(self, identifier: str) -> ResourceVersion:
        return self.catalog.version_of(parse_identifier(identifier))

    def walk(self, identifier: str, limit: int = 1000) -> list[StoredInstance]:
        """All pages; each within its limit, and full but for the last."""
        found: list[StoredInstance] = []
        after = None
        while True:
            page, following = self.catalog.instances(parse_identifier(identifier), after, limit)
            assert len(page) <= limit
            found += page
            if following is None:
                return found
            assert len(page) == limit, "a page before the last that is not full"
            assert following != after, "a page that does not move on"
            after = following

    def ids(self, identifier: str) -> dict[str, int]:
        return {str(each.ref): each.instance_id for each in self.walk(identifier)}

    def sweep(self) -> None:
        self.index.forget([id_ for id_, _ in self.index.sweepable(datetime.now(UTC) + _LATER, None, 1000)])

    def fill(self, limit: int) -> list[list[int]]:
        """The back-fill's whole walk with such batches: the ids of each that lacked metadata."""
        batches: list[list[int]] = []
        while True:
            lacking, done_up_to = self.catalog.without_metadata(limit)
            if done_up_to is None:
                assert lacking == []
                return batches
            batches.append([each.instance_id for each in lacking])
            self.catalog.add_metadata({each.instance_id: metadata_of(str(each.ref)) for each in lacking}, done_up_to)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    made = Place(tmp_path / "depot.sqlite")
    yield made
    made.database.close()


def metadata_of(identifier: str) -> Metadata:
    """Told apart by an attribute and by its layout."""
    content = {"00104000": {"vr": "LT", "Value": [identifier]}}
    return Metadata(zlib.compress(json.dumps(content).encode()), f"layout of {identifier}".encode())


def with_syntax(identifier: str, syntax: str) -> InstanceRecord:
    record = make_record(identifier, syntax, may_replace=True)
    return replace(record, header=replace(record.header, transfer_syntax_uid=syntax))


# Versions


def test_a_version_is_the_last_number_and_the_count_of_what_lies_below(place: Place) -> None:
    place.store("1/2/3", "1/2/4", "1/5/6", "2/2/3")
    found = [tuple(place.version(each)) for each in ("1", "1/2", "1/5", "1/2/3", "2", "2/2/3")]
    assert found == [(3, 3), (2, 2), (3, 1), (1, 1), (4, 1), (4, 1)]


@pytest.mark.parametrize(
    ("change", "changed"),
    [
        (lambda place: place.store("1/2/9"), {"1", "1/2"}),
        (lambda place: place.store("1/9/9"), {"1"}),
        (lambda place: place.store("1/2/3", content="other", may_replace=True), {"1", "1/2", "1/2/3"}),
        (lambda place: place.delete("1/2/4"), {"1", "1/2"}),
        (lambda place: (place.delete("1/2/3"), place.store("1/2/3")), {"1", "1/2", "1/2/3"}),
        (lambda place: place.delete("1/5"), {"1"}),
        (lambda place: place.store("1/2/3", may_replace=True), set()),
        (lambda place: place.store("1/2/3", content="other"), set()),
    ],
    ids=["store", "new series", "replace", "delete", "store again", "delete series", "same bytes", "conflict"],
)
def test_a_version_changes_with_each_change_below_and_with_no_other(
    place: Place, change: object, changed: set[str]
) -> None:
    place.store("1/2/3", "1/2/4", "1/5/6", "2/2/3")
    asked = ("1", "1/2", "1/2/3", "2", "2/2", "2/2/3")
    before = {each: place.version(each) for each in asked}
    assert callable(change)
    change(place)
    assert {each for each in asked if place.version(each) != before[each]} == changed


def test_two_different_contents_never_have_the_same_version(place: Place) -> None:
    randomness = Random(7)
    seen: dict[tuple[str, ResourceVersion], frozenset[int]] = {}
    for step in range(300):
        identifier = f"1/{randomness.randrange(2)}/{randomness.randrange(4)}"
        if randomness.random() < 0.5:
            place.store(identifier, content=str(step), may_replace=True)
        else:
            place.delete(identifier)
        for asked in ("1", "1/0", "1/1"):
            content = frozenset(each.instance_id for each in place.walk(asked))
            if content:
                assert seen.setdefault((asked, place.version(asked)), content) == content
    assert len(seen) > 200


@pytest.mark.parametrize("identifier", ["9", "1/9", "1/2/9", "9/2/3", "1/9/3", "1/2/3", "3", "3/4"])
def test_what_is_not_there_or_no_more_has_no_version_and_an_empty_page(place: Place, identifier: str) -> None:
    place.store("1/2/3", "1/2/4", "3/4/5")
    place.delete("1/2/3")
    place.delete("3")
    with pytest.raises(NotFound) as caught:
        place.version(identifier)
    assert caught.value.target == ("study", "series", "instance")[identifier.count("/")]
    assert place.walk(identifier) == []
    assert place.catalog.transfer_syntaxes(parse_identifier(identifier)) == frozenset()


# Pages


def test_an_instance_has_all_that_retrieval_needs(place: Place) -> None:
    old, new = make_record("1/2/3", "old", size=5), make_record("1/2/3", "new", size=7, may_replace=True)
    place.index.add([old])
    [before] = place.walk("1/2/3")
    assert before == StoredInstance(before.instance_id, old.ref, old.store_key, 5, _EXPLICIT, 1)
    place.index.add([make_record("1/2/4"), new])
    for asked in ("1", "1/2", "1/2/3"):
        after = place.walk(asked)[0]
        assert after == StoredInstance(after.instance_id, new.ref, new.store_key, 7, _EXPLICIT, 3)
        assert after.instance_id != before.instance_id


def test_every_page_size_walks_by_series_then_by_instance(place: Place) -> None:
    identifiers = [
        f"{study}/{study}.{series}/{n}" for n in (5, 1, 10, 2, 7) for series in (2, 1, 3) for study in (1, 2)
    ]
    place.store(*identifiers)
    place.delete("1/1.3")  # an empty series between others
    place.store("1/1.4/1")
    for asked in ("1", "2", "1/1.1", "2/2.3", "1/1.1/5", "1/1.4"):
        whole = [str(each.ref) for each in place.walk(asked)]
        live = {each for each in (*identifiers, "1/1.4/1") if not each.startswith("1/1.3/")}
        assert sorted(whole) == sorted(each for each in live if f"{each}/".startswith(f"{asked}/"))
        series = [key for key, _ in itertools.groupby(each.rpartition("/")[0] for each in whole)]
        assert len(series) == len(set(series)), "a series in two pieces"
        for _, group in itertools.groupby(whole, lambda each: each.rpartition("/")[0]):
            in_series = list(group)
            assert in_series == sorted(in_series)
        for limit in range(1, len(whole) + 3):
            assert [str(each.ref) for each in place.walk(asked, limit)] == whole, (asked, limit)


@pytest.mark.parametrize("limit", [1, 2, 5, 7, 20])
def test_a_walk_shows_all_that_stays_once_and_in_order_whatever_comes_and_goes(place: Place, limit: int) -> None:
    identifiers = [f"1/{n % 3}/{n:02}" for n in range(30)]
    place.store(*identifiers)
    order = [str(each.ref) for each in place.walk("1")]
    gone: set[str] = set()
    found: list[str] = []
    after = None
    for number in itertools.count():
        page, after = place.catalog.instances(parse_identifier("1"), after, limit)
        found += [str(each.ref) for each in page]
        if after is None:
            break
        if number >= 20:  # whoever adds for ever can keep a walk going for ever
            continue
        place.store(*(f"1/{series}/{n:02}.{number}" for series in range(3) for n in range(0, 30, 10)))
        for victim in (order[number], order[-1 - number]) if number < 12 else ():
            place.delete(victim)
            gone.add(victim)
        if number % 2:
            place.store(order[number], content="again")
        place.store(order[14], content=f"replaced {number}", may_replace=True)
    assert len(found) == len(set(found))
    stayed = [each for each in order if each not in gone]
    assert len(stayed) >= 5
    assert [each for each in found if each in set(stayed)] == stayed


def test_walks_beside_writers_miss_nothing_that_stays(place: Place) -> None:
    stay = [f"1/{n % 4}/{n:03}" for n in range(0, 200, 2)]
    place.store(*stay)
    is_done = threading.Event()

    def write(writer: int) -> None:
        randomness = Random(writer)
        while not is_done.is_set():
            n = randomness.randrange(1, 200, 2)
            place.store(f"1/{n % 4}/{n:03}", f"1/{writer + 4}/{n}", content=str(writer), may_replace=True)
            place.delete(f"1/{n % 4}/{n:03}")

    with ThreadPoolExecutor(3) as pool:
        writers = [pool.submit(write, writer) for writer in range(3)]
        try:
            for limit in (1, 3, 7, 50, 1000) * 3:
                found = [str(each.ref) for each in place.walk("1", limit)]
                assert len(found) == len(set(found))
                assert set(found) >= set(stay)
        finally:
            is_done.set()
        for each in writers:
            each.result()


def test_transfer_syntaxes_are_those_of_live_instances_below(place: Place) -> None:
    place.index.add([with_syntax("1/2/3", _IMPLICIT), with_syntax("1/2/4", _EXPLICIT), with_syntax("1/5/6", "1.2.3")])

    def syntaxes(identifier: str) -> set[str]:
        return set(place.catalog.transfer_syntaxes(parse_identifier(identifier)))

    assert syntaxes("1") == {_IMPLICIT, _EXPLICIT, "1.2.3"}
    assert syntaxes("1/2") == {_IMPLICIT, _EXPLICIT}
    assert syntaxes("1/5/6") == {"1.2.3"}
    place.delete("1/2/4")
    assert syntaxes("1/2") == {_IMPLICIT}
    place.index.add([with_syntax("1/2/3", "1.2.4")])
    assert syntaxes("1/2") == {"1.2.4"}


# Metadata


def test_metadata_is_given_for_those_that_have_it(place: Place) -> None:
    place.store_with_metadata("1/2/3", "1/2/4")
    place.store("1/2/5")
    ids = place.ids("1")
    wanted = {ids[each]: metadata_of(each) for each in ("1/2/3", "1/2/4")}
    assert place.catalog.metadata([]) == {}
    assert place.catalog.metadata([*ids.values(), 10**9]) == wanted
    assert place.catalog.metadata([ids["1/2/5"]]) == {}


def test_metadata_belongs_to_its_own_instance_however_they_were_stored(place: Place) -> None:
    place.store_with_metadata("1/2/3")
    mixed = [replace(make_record(f"1/2/{n}"), metadata=metadata_of(f"1/2/{n}") if n % 3 else None) for n in range(30)]
    replacing = replace(make_record("1/2/7", "new", may_replace=True), metadata=metadata_of("new"))
    assert AddOutcome.REPLACED in place.index.add([*mixed, replacing])
    place.delete("1/2/8")
    place.sweep()  # makes gaps in the ids
    place.store_with_metadata("2/2/1", "2/2/2")
    for identifier, id_ in (place.ids("1") | place.ids("2")).items():
        number = int(identifier.rpartition("/")[2])
        is_kept = identifier.startswith("2/") or number % 3 or number == 3
        expected = {id_: metadata_of(identifier)} if is_kept else {}
        if identifier == "1/2/7":
            expected = {id_: metadata_of("new")}
        assert place.catalog.metadata([id_]) == expected, identifier


def test_a_sweep_takes_the_metadata_with_it(place: Place) -> None:
    place.store_with_metadata("1/2/3", "1/2/4")
    ids = place.ids("1")
    place.delete("1/2/3")
    place.sweep()
    assert place.catalog.metadata(list(ids.values())) == {ids["1/2/4"]: metadata_of("1/2/4")}
    with closing(sqlite3.connect(place.database.path)) as connection:
        assert connection.execute("SELECT count(*) FROM instance_metadata").fetchone() == (1,)


@pytest.mark.parametrize("limit", [1, 2, 3, 7, 100])
def test_the_back_fill_comes_to_each_live_instance_that_lacks_metadata_once(place: Place, limit: int) -> None:
    place.store(*(f"1/2/{n:02}" for n in range(10)))
    place.store_with_metadata(*(f"1/3/{n:02}" for n in range(5)))
    place.store(*(f"1/4/{n:02}" for n in range(5)))
    place.delete("1/2/04")
    ids = place.ids("1")
    lacking = [id_ for ref, id_ in sorted(ids.items(), key=lambda item: item[1]) if not ref.startswith("1/3/")]
    batches = place.fill(limit)
    assert [id_ for batch in batches for id_ in batch] == lacking
    assert all(len(batch) <= limit for batch in batches)
    assert place.catalog.metadata(list(ids.values())) == {id_: metadata_of(ref) for ref, id_ in ids.items()}
    assert place.catalog.without_metadata(limit) == ([], None)


def test_instances_that_lack_metadata_are_described_whole(place: Place) -> None:
    record = make_record("1/2/3", size=9)
    place.store("9/9/9")
    place.index.add([record])
    [_, found], _ = place.catalog.without_metadata(10)
    assert [found] == place.walk("1")
    assert isinstance(found.ref, InstanceRef)
    assert (found.store_key, found.size) == (record.store_key, 9)


def test_what_is_stored_while_the_back_fill_runs_is_come_to_as_well(place: Place) -> None:
    place.store("1/2/1", "1/2/2")
    place.fill(1)
    place.store("1/2/3")
    assert place.fill(1) == [[place.ids("1")["1/2/3"]]]


def test_the_back_fill_goes_on_in_the_next_process_where_it_was(place: Place) -> None:
    place.store(*(f"1/2/{n}" for n in range(6)))
    ids = sorted(place.ids("1").values())
    lacking, done_up_to = place.catalog.without_metadata(2)
    assert ([each.instance_id for each in lacking], done_up_to) == (ids[:2], ids[1])
    place.catalog.add_metadata({}, ids[1])  # both could not be read: nothing is found, and it moves on
    following = SqlCatalog(Database(place.database.path))
    lacking, done_up_to = following.without_metadata(10)
    assert ([each.instance_id for each in lacking], done_up_to) == (ids[2:], ids[5])
    assert following.without_metadata(10) == (lacking, ids[5]), "a look does not move it on"


def test_to_add_metadata_again_changes_nothing_and_never_goes_back(place: Place) -> None:
    place.store("1/2/3", "1/2/4", "1/2/5")
    ids = place.ids("1")
    found = {id_: metadata_of(ref) for ref, id_ in ids.items()}
    for _ in range(2):
        place.catalog.add_metadata(found, max(found))
    place.catalog.add_metadata({ids["1/2/3"]: metadata_of("late")}, min(found))
    assert place.catalog.metadata(list(found)) == found
    assert place.catalog.without_metadata(10) == ([], None)


def test_metadata_of_what_was_swept_meanwhile_is_let_go(place: Place) -> None:
    place.store("1/2/3", "1/2/4")
    ids = place.ids("1")
    lacking, done_up_to = place.catalog.without_metadata(10)
    assert done_up_to is not None
    place.delete("1/2/3")
    place.sweep()
    place.catalog.add_metadata({each.instance_id: metadata_of(str(each.ref)) for each in lacking}, done_up_to)
    assert place.catalog.metadata(list(ids.values())) == {ids["1/2/4"]: metadata_of("1/2/4")}


def test_two_refs_that_begin_alike_are_not_taken_for_each_other(place: Place) -> None:
    place.store("1/2/3", "1/2/30", "1/20/3", "10/2/3", "1.2/2/3")
    refs: list[Ref] = [parse_identifier(each) for each in ("1", "1/2", "1/2/3")]
    assert [len(place.catalog.instances(ref, None, 10)[0]) for ref in refs] == [3, 2, 1]
    assert [place.catalog.version_of(ref).instance_count for ref in refs] == [3, 2, 1]


def test_what_the_newest_instance_says_is_searched_once_its_metadata_is_there(place: Place) -> None:
    place.store("1/2/3", "1/2/4")
    ids = place.ids("1")
    older, newest = ({"00100020": {"vr": "LO", "Value": [value]}} for value in ("OLD", "New"))
    found = {
        id_: Metadata(zlib.compress(json.dumps(content).encode()), b"layout")
        for id_, content in ((ids["1/2/3"], older), (ids["1/2/4"], newest))
    }
    place.catalog.add_metadata(found, max(found))
    with place.database.read() as connection:
        assert connection.exec_driver_sql("SELECT patient_id FROM studies").all() == [("new",)]
