"""Searches against a plain Python filter: random archives with replacements and deletes, random queries, both plans."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dicom_depot.codec.search_values import columns_of, loads
from dicom_depot.domain.matching import column_form
from dicom_depot.domain.search import ATTRIBUTES as OURS
from tests.support.search_data import CHANGES, CLASSES, ODD, ROUTES, SOUND, STORED, asked, row_of, some_of
from tests.support.search_oracle import ATTRIBUTES, REQUESTS, Instance
from tests.support.search_place import Event, Place, Query, Wish, index_rows, make_older, place, read_of, walking

EVERYTHING = 200

_UIDS = st.tuples(st.sampled_from(("1.1", "1.2", "1.10")), st.sampled_from(("1.1", "2.2")), st.sampled_from("567"))


@st.composite
def instances(draw: st.DrawFn, start: int) -> Instance:
    """With values from a few neighbours of each VR's list, so that instances resemble each other."""
    keywords = draw(st.lists(st.sampled_from(STORED), unique=True, min_size=2, max_size=9))
    values = {keyword: draw(st.sampled_from(some_of(ATTRIBUTES[keyword].vr, start))) for keyword in keywords}
    values["SOPClassUID"] = draw(st.sampled_from(CLASSES))
    steps = st.sampled_from(some_of("SH", start))
    return Instance(*draw(_UIDS), values, tuple(draw(st.lists(st.tuples(steps, steps), max_size=2))))


def _events(start: int) -> st.SearchStrategy[list[Event]]:
    stored = st.lists(instances(start), min_size=1, max_size=3)
    stores = st.tuples(stored, st.booleans()).map(lambda drawn: Event(*drawn))
    deletes = st.tuples(_UIDS, st.integers(1, 3)).map(lambda drawn: Event(deleted=drawn[0][: drawn[1]]))
    return st.lists(st.one_of(stores, stores, stores, stores, deletes), min_size=3, max_size=8)


EVENTS = st.integers(0, 60).flatmap(_events)


_PICK = st.integers(0, 60)
WISHES = st.tuples(
    st.sampled_from(ROUTES),
    _PICK,
    _PICK,
    st.lists(st.tuples(_PICK, _PICK), max_size=3),
    st.sampled_from((EVERYTHING, EVERYTHING, EVERYTHING, 1, 2)),
    st.sampled_from((0, 0, 0, 1, 2, 5)),
).map(lambda drawn: Wish(*drawn))


bounded = settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)


@bounded
@given(EVENTS, st.lists(WISHES, min_size=10, max_size=25))
def test_what_is_found_is_what_a_plain_filter_finds(events: list[Event], wishes: list[Wish]) -> None:
    with place() as here:
        for event in events:
            here.do(event)
        for query in [wish.of(here.archive) for wish in wishes]:
            everything = here.expected(query)
            page = everything[query.offset : query.offset + query.limit]
            following = max(0, len(everything) - query.offset - query.limit)
            found, remaining = here.found(query)
            assert found == page, query
            assert remaining == following or (remaining is None and following), query
            with walking():
                assert here.found(query) == (page, None if following else 0), query


@pytest.mark.parametrize(
    "keyword",
    [
        *("StudyDescription", "AccessionNumber", "PatientName", "StudyDate", "StudyTime", "Modality", "SeriesNumber"),
        *("ModalitiesInStudy", "RequestAttributesSequence.RequestedProcedureID"),
    ],
)
def test_every_value_is_asked_for_in_every_way(keyword: str) -> None:
    """All values that the data above have, beside each other, so that what resembles another is told apart from it."""
    vr = ATTRIBUTES[keyword].vr
    stored = "Modality" if keyword == "ModalitiesInStudy" else keyword
    hits = 0
    with place() as here:
        for number, value in enumerate((*SOUND[vr], *ODD[vr])):
            attributes = {"SOPClassUID": CLASSES[0], "PatientID": str(number)}
            requests = [(value, ""), ("", value)][REQUESTS.index(keyword)] if keyword in REQUESTS else ("", "")
            if keyword not in REQUESTS:
                attributes[stored] = value
            here.do(Event(stored=[Instance(f"1.{number}", "1", "1", attributes, (requests,))]))
        level = ATTRIBUTES[keyword].level
        for number, base in enumerate(here.archive.live):
            other = here.archive.live[number - 1]
            for change in CHANGES[vr]:
                made = asked(keyword, base.told(keyword), change, other.told(keyword))
                if made is not None:
                    query = Query(level, (), ((keyword, made[0]),), made[1], EVERYTHING, 0)
                    expected = [row.uids for row in here.expected(query)]
                    assert here.uids(query) == expected, query
                    with walking():
                        assert here.uids(query) == expected, query
                    hits += 0 < len(expected) < len(here.archive.live)
    assert hits > len(SOUND[vr])


@bounded
@given(EVENTS, EVENTS, WISHES)
def test_pages_are_of_the_moment_of_the_first_one(before: list[Event], after: list[Event], wish: Wish) -> None:
    """Whatever is stored between them; instances that are new, that is: what is deleted is gone at once."""
    with place() as here:
        for event in before:
            here.do(event)
        query = wish.of(here.archive)
        whole = [row.uids for row in here.expected(query)]
        known = {each.uids for each in here.archive.live}
        pages: list[tuple[str, ...]] = []
        for number in range(len(whole) + 1):
            answer = here.ask(query._replace(limit=1, offset=number), "one reader")
            pages += [row_of(query.level, result).uids for result in answer.results]
            if number < len(after):
                fresh = [_elsewhere(each) for each in after[number].stored if _elsewhere(each).uids not in known]
                here.do(Event(stored=fresh))
        assert pages == whole


def _elsewhere(instance: Instance) -> Instance:
    """The same in a study of its own: in one that is there it would change what that study says."""
    return Instance(f"9.{instance.study}", instance.series, instance.sop, instance.values, instance.requests)


@bounded
@given(EVENTS)
def test_after_any_history_the_index_says_what_a_new_one_of_what_is_left_would(events: list[Event]) -> None:
    with place() as here, place() as fresh:
        for event in events:
            here.do(event)
        if here.archive.live:
            fresh.do(Event(stored=here.archive.live))
        assert index_rows(here.database) == index_rows(fresh.database)


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(EVENTS)
def test_a_database_of_the_release_before_is_brought_to_the_same(events: list[Event]) -> None:
    with place() as here, tempfile.TemporaryDirectory() as folder:
        for event in events:
            here.do(event)
        older = make_older(here, Path(folder) / "depot.sqlite")
        older.migrate()
        assert index_rows(older) == index_rows(here.database)
        later = Place(older, here.service)
        later.archive = here.archive
        for event in events[:3]:
            later.do(event)
        older.close()


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 60).flatmap(instances))
def test_the_metadata_of_an_instance_says_what_its_header_says(instance: Instance) -> None:
    read = read_of(instance)
    told = columns_of(loads(read.metadata.dicom_json))
    for attribute in OURS:
        header, metadata = (column_form(attribute, each[attribute.column]) for each in (read.header.attributes, told))
        if attribute.vr == "PN":  # padding within names is no part of them
            header, metadata = (None if each is None else str(each).strip(" =") for each in (header, metadata))
        assert (header or None) == (metadata or None), attribute.keyword
