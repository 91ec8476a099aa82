"""The promises of `ports.InstanceIndex`, as tests that every index inherits. See `testing.contracts` for how."""

from __future__ import annotations

import hashlib
import itertools
import threading
from array import array
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Generic, TypeVar

from dicom_depot.domain.identifiers import InstanceRef, Ref, parse_identifier
from dicom_depot.domain.instance import InstanceHeader, InstanceRecord
from dicom_depot.domain.search import INSTANCE_UID, SOP_CLASS, Condition, Exactly, Level, attributes_of
from dicom_depot.ports import AddOutcome, IndexEntry, InstanceIndex, KnownInstance

IndexT = TypeVar("IndexT", bound=InstanceIndex)

_STORED, _THERE, _CONFLICT = AddOutcome.STORED, AddOutcome.ALREADY_THERE, AddOutcome.CONFLICTING
_REPLACED = AddOutcome.REPLACED
_WRITERS = 4
_LATER = timedelta(hours=1)
_keys = itertools.count()
_INSTANCE_NUMBER = next(each for each in attributes_of(Level.INSTANCE) if each.keyword == "InstanceNumber")


def make_record(
    identifier: str,
    content: str = "bytes",
    *,
    size: int = 100,
    xxh3: int = 7,
    may_replace: bool = False,
    **attributes: str | int | None,
) -> InstanceRecord:
    """The record of an instance whose bytes are told apart by `content`. Attributes are named by their columns."""
    header = InstanceHeader(_instance(identifier), "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.1.2.1", attributes)
    sha256 = hashlib.sha256(content.encode()).digest()
    return InstanceRecord(header, f"key/{next(_keys)}", size, sha256, xxh3, may_replace=may_replace)


class InstanceIndexContract(Generic[IndexT]):
    """What every InstanceIndex keeps."""

    def make_index(self) -> IndexT:
        """An empty index of its own for the test that asks."""
        raise NotImplementedError

    def series_id(self, index: IndexT, identifier: str) -> int:
        """The internal id of a series."""
        raise NotImplementedError

    def test_what_was_added_is_found_with_checksum_and_size(self) -> None:
        index = self.make_index()
        first, second = make_record("1/2/3", "a", size=5), make_record("1/2/4", "b", size=0)
        assert index.add([first, second]) == [_STORED, _STORED]
        unknown = [_instance("1/2/5"), _instance("1/3/3"), _instance("2/2/3")]
        found = index.find([*unknown, first.ref, second.ref, first.ref])
        assert found == {first.ref: KnownInstance(first.sha256, 5), second.ref: KnownInstance(second.sha256, 0)}
        assert index.find([]) == {}
        assert index.add([]) == []

    def test_the_same_bytes_are_there_already_and_other_bytes_conflict(self) -> None:
        index = self.make_index()
        original = make_record("1/2/3", "a")
        index.add([original])
        assert index.add([make_record("1/2/3", "a"), make_record("1/2/4"), make_record("1/2/3", "b")]) == [
            _THERE,
            _STORED,
            _CONFLICT,
        ]
        assert index.find([original.ref])[original.ref].sha256 == original.sha256
        assert index.scan(0, 10)[0].store_key == original.store_key
        assert len(index.scan(0, 10)) == 2

    def test_of_records_with_the_same_identifiers_in_one_call_the_first_wins(self) -> None:
        index = self.make_index()
        records = [
            make_record("1/2/3", "a"),
            make_record("1/2/3", "b"),
            make_record("1/2/3", "a"),
            make_record("1/2/4"),
        ]
        assert index.add(records) == [_STORED, _CONFLICT, _THERE, _STORED]
        assert [entry.store_key for entry in index.scan(0, 10)] == [records[0].store_key, records[3].store_key]

    def test_an_instance_is_known_by_all_three_identifiers(self) -> None:
        index = self.make_index()
        everywhere = ["1/2/3", "1/9/3", "9/2/3", "1.2/2/3", "01/2/3", "1/2/03"]
        assert index.add([make_record(each, each) for each in everywhere]) == [_STORED] * len(everywhere)
        assert len(index.find([_instance(each) for each in everywhere])) == len(everywhere)
        assert index.delete(_ref("1")) == 3  # 1.2 and 01 are other studies

    def test_thousands_of_records_and_identifiers_fit_in_one_call(self) -> None:
        index = self.make_index()
        records = [make_record(f"{n % 7}/{n % 50}/{n}", str(n)) for n in range(2500)]
        assert set(index.add(records)) == {_STORED}
        refs = [record.ref for record in records]
        assert index.find(refs).keys() == set(refs)
        assert index.unmatched([*refs, _instance("9/9/9")], index.sequence()) == [_instance("9/9/9")]
        assert len(_selected(index, refs, index.sequence(), 1000)) == 2500

    def test_each_store_and_delete_takes_one_number_and_nothing_else_does(self) -> None:
        index = self.make_index()
        start = index.sequence()
        index.add([make_record("1/2/3"), make_record("1/2/4"), make_record("1/2/3")])
        assert index.sequence() == start + 2
        index.add([make_record("1/2/3"), make_record("1/2/4", "other")])
        assert index.sequence() == start + 2
        assert index.delete(_instance("1/2/3")) == 1
        assert index.sequence() == start + 3
        assert index.delete(_instance("1/2/3")) == 0
        assert index.sequence() == start + 3

    def test_delete_takes_what_lies_below_and_may_be_repeated(self) -> None:
        index = self.make_index()
        identifiers = ["1/2/3", "1/2/4", "1/3/5", "1/4/6", "2/2/3"]
        index.add([make_record(each, each) for each in identifiers])
        for text, count in (("1/2/3", 1), ("1/2", 1), ("1", 2), ("1", 0), ("7/8/9", 0), ("2/3", 0)):
            assert index.delete(parse_identifier(text)) == count, text
        assert [str(ref) for ref in index.find([_instance(each) for each in identifiers])] == ["2/2/3"]
        deleted = {entry.identifier for entry in index.scan(0, 10) if entry.is_deleted}
        assert deleted == {"1/2/3", "1/2/4", "1/3/5", "1/4/6"}

    def test_a_cutoff_shows_the_index_as_it_was_then(self) -> None:
        index = self.make_index()
        visible: set[str] = set()
        history: list[tuple[int, set[str]]] = [(index.sequence(), set())]
        for text in ("+1/2/3", "+1/2/4", "-1/2/3", "+2/2/3", "+1/2/3", "-1", "-2/2", "+1/2/4", "-1/2/4", "+1/2/4"):
            identifier = text[1:]
            if text[0] == "+":
                assert index.add([make_record(identifier, text)]) == [_STORED]
                visible.add(identifier)
            else:
                index.delete(parse_identifier(identifier))
                visible -= {each for each in visible if f"{each}/".startswith(f"{identifier}/")}
            history.append((index.sequence(), set(visible)))
        questions = [parse_identifier(each) for each in ("1", "2", "1/2", "2/2", "1/2/3", "1/2/4", "2/2/3", "3")]
        for cutoff, then in history:
            assert index.totals(cutoff) == (len(then), 100 * len(then))
            assert _identifiers(index, _selected(index, None, cutoff, 2)) == sorted(then)
            below = {str(ref): any(f"{each}/".startswith(f"{ref}/") for each in then) for ref in questions}
            assert [str(ref) for ref in index.unmatched(questions, cutoff)] == [
                text for text, is_matched in below.items() if not is_matched
            ]
            for ref in questions:
                expected = sorted(each for each in then if f"{each}/".startswith(f"{ref}/"))
                assert _identifiers(index, _selected(index, [ref], cutoff, 2)) == expected

    def test_what_is_stored_again_after_a_delete_is_a_new_instance(self) -> None:
        index = self.make_index()
        old, new = make_record("1/2/3", "old", size=1), make_record("1/2/3", "new", size=2)
        index.add([old])
        before = index.sequence()
        index.delete(old.ref)
        between = index.sequence()
        assert index.add([new]) == [_STORED]
        [[old_id], [], [new_id]] = [_selected(index, None, cutoff, 9) for cutoff in (before, between, index.sequence())]
        assert old_id != new_id
        assert [each.store_key for each in index.fetch([new_id, old_id])] == [new.store_key, old.store_key]
        assert index.find([old.ref])[old.ref].size == 2

    def test_a_replacement_takes_one_number_from_which_on_the_old_instance_is_invisible(self) -> None:
        index = self.make_index()
        old, new = make_record("1/2/3", "old", size=1), make_record("1/2/3", "new", size=20, may_replace=True)
        index.add([old, make_record("1/2/4", size=300)])
        before = index.sequence()
        assert index.add([new]) == [_REPLACED]
        after = index.sequence()
        assert after == before + 1
        assert index.find([old.ref]) == {old.ref: KnownInstance(new.sha256, 20)}
        assert [index.totals(cutoff) for cutoff in (before, after)] == [(2, 301), (2, 320)]
        for refs in (None, [_ref("1")], [_ref("1/2")], [_ref("1/2/3"), _ref("1/2/4")]):
            then, now = _selected(index, refs, before, 1), _selected(index, refs, after, 1)
            assert {row.store_key for row in index.fetch(then)} > {old.store_key}
            assert {row.store_key for row in index.fetch(now)} > {new.store_key}
            assert len(then) == len(now) == len({*then, *now}) - 1 == 2
        assert index.unmatched([old.ref], before) == index.unmatched([old.ref], after) == []
        assert {entry.store_key: entry.is_deleted for entry in index.scan(0, 10)}[old.store_key]
        assert sum(entry.is_deleted for entry in index.scan(0, 10)) == 1

    def test_the_same_bytes_replace_nothing(self) -> None:
        index = self.make_index()
        original = make_record("1/2/3", "same")
        index.add([original])
        before = index.sequence()
        assert index.add([make_record("1/2/3", "same", may_replace=True)]) == [_THERE]
        assert index.sequence() == before
        assert [entry.store_key for entry in index.scan(0, 10)] == [original.store_key]

    def test_to_replace_what_is_not_there_is_to_store_it(self) -> None:
        index = self.make_index()
        assert index.add([make_record("1/2/3", may_replace=True), make_record("1/2/4", may_replace=True)]) == [
            _STORED,
            _STORED,
        ]
        index.delete(_ref("1/2/3"))
        assert index.add([make_record("1/2/3", "other", may_replace=True)]) == [_STORED]
        assert index.sequence() == 4

    def test_of_replacements_in_one_call_each_has_its_moment_and_the_last_stays(self) -> None:
        index = self.make_index()
        contents = ["a", "b", "b", "a", "c"]
        records = [make_record("1/2/3", content, may_replace=True) for content in contents]
        strict, other = make_record("1/2/3", "d"), make_record("1/2/4")
        outcomes = index.add([*records, strict, other, make_record("1/2/3", "c")])
        assert outcomes == [_STORED, _REPLACED, _THERE, _REPLACED, _REPLACED, _CONFLICT, _STORED, _THERE]
        kept = [records[0], records[1], records[3], records[4]]
        assert index.sequence() == len(kept) + 1
        seen = [
            [row.store_key for row in index.fetch(_selected(index, [strict.ref], cutoff, 9))]
            for cutoff in range(index.sequence() + 1)
        ]
        moments = [key for keys in seen for key in keys]
        assert list(dict.fromkeys(moments)) == [record.store_key for record in kept]
        assert all(len(keys) == 1 for keys in seen[1:]), "between two versions there was none"
        assert index.find([strict.ref])[strict.ref].sha256 == records[4].sha256

    def test_thousands_are_replaced_in_one_call_and_no_other_is(self) -> None:
        index = self.make_index()
        numbers = range(1500)
        index.add([make_record(f"{n % 3}/{n % 20}/{n}", "old", size=1) for n in numbers])
        before = index.sequence()
        records = [
            make_record(f"{n % 3}/{n % 20}/{n}", "new" if n % 2 else "old", size=1000, may_replace=n % 5 > 0)
            for n in numbers
        ]
        outcomes = index.add(records)
        expected = [(_REPLACED if n % 5 else _CONFLICT) if n % 2 else _THERE for n in numbers]
        assert outcomes == expected
        assert index.sequence() == before + expected.count(_REPLACED)
        assert index.totals(before) == (1500, 1500)
        assert index.totals(index.sequence()) == (1500, 1500 + 999 * expected.count(_REPLACED))

    def test_what_was_replaced_is_swept_as_what_was_deleted(self) -> None:
        index = self.make_index()
        old = make_record("1/2/3", "old")
        index.add([old, make_record("1/2/4")])
        [old_id] = [entry.instance_id for entry in index.scan(0, 10) if entry.store_key == old.store_key]
        cutoff = index.sequence()  # an export that begins here needs the old one
        index.add([make_record("1/2/3", "new", may_replace=True)])
        now = datetime.now(UTC)
        assert index.sweepable(now - _LATER, None, 10) == []
        assert index.sweepable(now + _LATER, cutoff, 10) == []
        for oldest in (cutoff + 1, None):
            assert index.sweepable(now + _LATER, oldest, 10) == [(old_id, old.store_key)]
        assert index.remaining([old_id]) == (1, [old.store_key])
        index.forget([old_id])
        assert index.remaining([old_id]) == (0, [])
        assert index.forgotten_up_to() == cutoff + 1
        assert index.totals(index.sequence()) == (2, 200)
        assert index.add([make_record("1/2/3", "new", may_replace=True)]) == [_THERE]

    def test_of_threads_that_replace_the_same_instance_each_takes_its_turn(self) -> None:
        index = self.make_index()
        index.add([make_record("1/2/3", "first")])

        def write(writer: int) -> list[AddOutcome]:
            outcomes: list[AddOutcome] = []
            for number in range(20):
                records = [make_record("1/2/3", f"{writer} {number} {n}", may_replace=True) for n in range(2)]
                outcomes += index.add([*records, make_record("1/2/3", "first")])[:2]
            return outcomes

        with ThreadPoolExecutor(_WRITERS) as pool:
            outcomes = [outcome for done in pool.map(write, range(_WRITERS)) for outcome in done]
        assert outcomes == [_REPLACED] * (_WRITERS * 40)
        assert index.sequence() == 1 + len(outcomes)
        ids = [_selected(index, None, cutoff, 9) for cutoff in range(1, index.sequence() + 1)]
        assert all(len(at_cutoff) == 1 for at_cutoff in ids)
        assert len({id_ for [id_] in ids}) == len(ids)

    def test_every_page_size_selects_each_instance_once_in_the_same_order(self) -> None:
        index = self.make_index()
        identifiers = [f"{study}/{series}/{n}" for study in (1, 2, 3) for series in (1, 2) for n in range(study + 1)]
        index.add([make_record(each, each) for each in identifiers])
        index.delete(_instance("2/1/1"))
        cutoff = index.sequence()
        index.add([make_record("2/1/1"), make_record("1/1/99")])  # after the cut-off
        selections: list[tuple[Sequence[Ref] | None, int]] = [
            (None, 17),
            ([_ref("3"), _ref("1")], 12),
            ([_ref("2/1"), _ref("1/2"), _ref("9/9")], 4),
            ([_ref("2/2/1"), _ref("1/1/0"), _ref("2/1/1"), _ref("3/2/3")], 3),
            ([_ref("9")], 0),
        ]
        for refs, count in selections:
            whole = _selected(index, refs, cutoff, 1000)
            assert len(whole) == len(set(whole)) == count, refs
            for limit in range(1, 20):
                assert _selected(index, refs, cutoff, limit) == whole, (refs, limit)

    def test_paging_is_not_disturbed_by_what_is_stored_and_deleted_meanwhile(self) -> None:
        index = self.make_index()
        identifiers = [f"{n % 3}/{n % 5}/{n:03}" for n in range(60)]
        index.add([make_record(each, each) for each in identifiers])
        cutoff = index.sequence()
        for refs in (None, [_ref(str(n)) for n in range(3)], [_ref(each) for each in identifiers]):
            expected = _selected(index, refs, cutoff, 1000)
            found: list[int] = []
            after = None
            for number in itertools.count():
                page = index.select(refs, cutoff, after, 7)
                found += [instance.instance_id for instance in page.instances]
                if page.resume_after is None:
                    break
                after = page.resume_after
                index.add([make_record(f"{number % 3}/{number % 5}/{n:03}.5", f"{number}") for n in range(0, 60, 7)])
                index.delete(_ref(identifiers[number]))
                index.delete(_ref(identifiers[-1 - number]))
                index.add([make_record(identifiers[number], "again")])
            assert found == expected

    def test_in_series_what_meets_the_conditions_is_selected_in_pages_of_every_size(self) -> None:
        index = self.make_index()
        identifiers = [f"{study}/{series}/{n}" for study in (1, 2, 3) for series in (1, 2) for n in range(9)]
        index.add([make_record(each, each, instance_number=int(each[-1])) for each in identifiers])
        index.delete(_instance("2/1/4"))
        ids = {place: self.series_id(index, place) for place in ("1/1", "1/2", "2/1", "3/2")}
        series_ids = array("q", sorted(ids.values()))
        cutoff = index.sequence()
        # What happens after the cut-off changes nothing, in the series that are selected and in others.
        index.delete(_instance("1/1/3"))
        index.add([make_record("1/2/3", "new", may_replace=True, instance_number=4)])
        index.add([make_record(f"{place}/99", instance_number=3) for place in ("1/1", "2/2")])

        some = Condition(_INSTANCE_NUMBER, Exactly((3, 4)))
        listed = Condition(INSTANCE_UID, Exactly(("3", "7")))
        of_class = Condition(SOP_CLASS, Exactly(("1.2.840.10008.5.1.4.1.1.2",)))
        for conditions, numbers in (
            ([], range(9)),
            ([some], (3, 4)),
            ([some, listed], (3,)),
            ([listed, of_class], (3, 7)),
            ([Condition(SOP_CLASS, Exactly(("1.2",)))], ()),
        ):
            expected = sorted({f"{place}/{n}" for place in ids for n in numbers} - {"2/1/4"})
            for limit in (1, 2, 3, 4, 5, 7, 1000):
                found: list[int] = []
                after = None
                while True:
                    page = index.select_in_series(series_ids, conditions, cutoff, after, limit)
                    assert len(page.instances) <= limit
                    found += [instance.instance_id for instance in page.instances]
                    after = page.resume_after
                    if after is None:
                        break
                assert _identifiers(index, found) == expected, (conditions, limit)
                assert len(found) == len(expected)
        assert index.select_in_series([], [], cutoff, None, 5) == ([], None)

    def test_unmatched_keeps_the_order_it_was_asked_in(self) -> None:
        index = self.make_index()
        index.add([make_record("1/2/3")])
        asked = ["9", "1", "1/9", "1/2", "8/8/8", "1/2/3", "1/2/9", "2/2/3", "1/3/3", "9/9"]
        expected = [_ref(each) for each in ("9", "1/9", "8/8/8", "1/2/9", "2/2/3", "1/3/3", "9/9")]
        assert index.unmatched([_ref(each) for each in asked], index.sequence()) == expected
        assert index.unmatched([], index.sequence()) == []

    def test_fetch_returns_rows_in_the_order_asked_and_checksums_unchanged(self) -> None:
        index = self.make_index()
        checksums = [0, 1, (1 << 63) - 1, 1 << 63, (1 << 64) - 1]
        records = [make_record(f"1/2/{n}", xxh3=xxh3, size=n) for n, xxh3 in enumerate(checksums)]
        index.add(records)
        ids = _selected(index, None, index.sequence(), 100)
        index.delete(_ref("1"))
        rows = index.fetch([*reversed(ids), 10**9])
        assert [row.xxh3 for row in rows] == checksums[::-1]
        assert [(row.identifier, row.store_key, row.size, row.instance_id) for row in rows] == [
            (str(record.ref), record.store_key, record.size, id_)
            for record, id_ in zip(reversed(records), reversed(ids), strict=True)
        ]
        assert index.fetch([]) == []

    def test_scan_walks_all_rows_by_id(self) -> None:
        index = self.make_index()
        records = [make_record(f"1/2/{n}", str(n), size=n) for n in range(7)]
        index.add(records)
        index.delete(_ref("1/2/3"))
        for limit in range(1, 9):
            entries: list[IndexEntry] = []
            while page := index.scan(entries[-1].instance_id if entries else 0, limit):
                assert len(page) <= limit
                entries += page
            assert [(each.identifier, each.store_key, each.size, each.sha256) for each in entries] == [
                (str(record.ref), record.store_key, record.size, record.sha256) for record in records
            ]
            assert [each.is_deleted for each in entries] == [False, False, False, True, False, False, False]

    def test_only_what_was_deleted_long_enough_ago_and_no_export_needs_is_swept(self) -> None:
        index = self.make_index()
        records = [make_record(f"1/2/{n}", str(n)) for n in range(4)]
        index.add(records)
        index.delete(records[0].ref)
        cutoff = index.sequence()  # an export that begins here does not see 0, and sees 1
        index.delete(records[1].ref)
        now = datetime.now(UTC)
        assert index.sweepable(now - _LATER, None, 10) == []
        keys = [[key for _, key in index.sweepable(now + _LATER, oldest, 10)] for oldest in (None, cutoff, cutoff - 1)]
        assert keys == [[records[0].store_key, records[1].store_key], [records[0].store_key], []]
        assert len(index.sweepable(now + _LATER, None, 1)) == 1

    def test_forgotten_rows_are_gone_for_good_and_can_come_again(self) -> None:
        index = self.make_index()
        record = make_record("1/2/3")
        index.add([record, make_record("1/2/4")])
        index.delete(record.ref)
        [(id_, key)] = index.sweepable(datetime.now(UTC) + _LATER, None, 10)
        assert key == record.store_key
        for _ in range(2):
            index.forget([id_])
        assert index.fetch([id_]) == []
        assert [entry.identifier for entry in index.scan(0, 10)] == ["1/2/4"]
        assert index.sweepable(datetime.now(UTC) + _LATER, None, 10) == []
        assert index.add([make_record("1/2/3", "again")]) == [_STORED]

    def test_what_has_a_number_up_to_a_cutoff_that_was_read_is_all_that_ever_will(self) -> None:
        index = self.make_index()
        writing = threading.Event()
        seen: list[tuple[int, tuple[int, int]]] = []

        def read() -> None:
            while not writing.is_set():
                cutoff = index.sequence()
                seen.append((cutoff, index.totals(cutoff)))

        def write(writer: int) -> int:
            taken = 0
            for number in range(25):
                own = [make_record(f"1/{writer}/{number}.{n}", str(n)) for n in range(1 + number % 5)]
                shared = [make_record(f"2/1/{number}.{n}", str(n)) for n in range(3)]
                taken += index.add([*own, *shared]).count(_STORED)
                if number % 4 == 0:
                    taken += index.delete(own[0].ref)
            return taken

        with ThreadPoolExecutor(_WRITERS + 1) as pool:
            reader = pool.submit(read)
            taken = sum(pool.map(write, range(_WRITERS)))
            writing.set()
            reader.result()
        assert index.sequence() == taken, "a number is missing"
        for cutoff, totals in seen:
            assert index.totals(cutoff) == totals, "something appeared or vanished below a cut-off"

    def test_of_threads_that_add_the_same_instances_one_stores_each(self) -> None:
        index = self.make_index()

        def write(writer: int) -> list[AddOutcome]:
            numbers = list(range(120))
            for_this = numbers if writer % 2 else numbers[::-1]
            outcomes: dict[int, AddOutcome] = {}
            for start in range(0, 120, 10):
                batch = for_this[start : start + 10]
                added = index.add([make_record(f"1/2/{n}", "same") for n in batch])
                outcomes |= dict(zip(batch, added, strict=True))
            return [outcomes[n] for n in numbers]

        with ThreadPoolExecutor(_WRITERS) as pool:
            by_instance = list(zip(*pool.map(write, range(_WRITERS)), strict=True))
        assert all(sorted(outcomes) == [_THERE] * (_WRITERS - 1) + [_STORED] for outcomes in by_instance)


def _ref(text: str) -> Ref:
    return parse_identifier(text)


def _instance(text: str) -> InstanceRef:
    ref = parse_identifier(text)
    assert isinstance(ref, InstanceRef)
    return ref


def _selected(index: InstanceIndex, refs: Sequence[Ref] | None, cutoff: int, limit: int) -> list[int]:
    """The internal ids of a whole selection, page by page; each page within its limit."""
    found: list[int] = []
    after = None
    while True:
        page = index.select(refs, cutoff, after, limit)
        assert len(page.instances) <= limit
        found += [instance.instance_id for instance in page.instances]
        if page.resume_after is None:
            return found
        assert page.resume_after != after, "a page that does not move on"
        after = page.resume_after


def _identifiers(index: InstanceIndex, ids: Iterable[int]) -> list[str]:
    return sorted(row.identifier for row in index.fetch(list(ids)))
