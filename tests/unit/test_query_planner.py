"""Planning an export by query: what is decided with the cut-off, and extended query tags that come and go."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from pathlib import Path

import pytest
import sqlalchemy as sa

from dicom_depot.adapters.database import Database
from dicom_depot.adapters.index_sql import SqlIndex
from dicom_depot.adapters.operations_sql import SqlOperations
from dicom_depot.adapters.query_tags_sql import SqlQueryTags
from dicom_depot.adapters.schema import extended_query_tags, search_values
from dicom_depot.adapters.search_sql import SqlSearch
from dicom_depot.domain.errors import QueryTagGone
from dicom_depot.domain.export import Answered, Matching, Source
from dicom_depot.domain.identifiers import parse_identifier
from dicom_depot.domain.operation import OperationId
from dicom_depot.domain.search import Level, SearchQuery
from dicom_depot.export.planner import Planner
from dicom_depot.testing.index_contract import make_record
from dicom_depot.testing.operations_contract import new_operation

TAG = "00091001"


class Place:
    """A database with twelve series of three instances, CT and MR by turns; and planners on it."""

    def __init__(self, path: Path) -> None:
        self.database = Database(path)
        self.database.migrate()
        self.index, self.operations = SqlIndex(self.database), SqlOperations(self.database)
        self.index.add(
            [
                make_record(f"{study}/{series}/{n}", modality="CT" if series % 2 else "MR", instance_number=n)
                for study in range(1, 4)
                for series in range(1, 5)
                for n in range(1, 4)
            ]
        )

    def planner(self, search: SqlSearch | None = None) -> Planner:
        """In chunks of one: a page is ten instances."""
        search = search or SqlSearch(self.database)
        return Planner(self.index, search, SqlQueryTags(self.database), self.operations, 1, 1 << 40)

    def start(self, source: Source) -> OperationId:
        decision = self.planner().decide(source)
        id_ = self.operations.create(new_operation(source=decision.source, cutoff=decision.cutoff)).id
        self.operations.begin(id_)
        return id_

    def plan(self, operation_id: OperationId) -> list[str]:
        """Plan to the end, each page by a planner that knows nothing; the identifiers that are planned by then."""
        while self.planner().plan_page(operation_id, 1) is not None:
            pass
        numbers = self.operations.runnable(operation_id, 10_000)
        chunks = [self.operations.claim_chunk(operation_id, 1, number) for number in numbers]
        return [row.identifier for chunk in chunks if chunk for row in self.index.fetch(chunk.instance_ids)]

    def add_tag(self, level: Level, vr: str, values: Callable[[str], list[tuple[str, str]]]) -> int:
        """A tag that is ready. values: of an owner's identifier, as (`value` or `words`, text)."""
        tables = "instances i JOIN series s ON s.id = i.series_id JOIN studies t ON t.id = s.study_id"
        owners = {"study": "t.id, t.study_uid", "series": "s.id, t.study_uid || '/' || s.series_uid"}.get(
            level, "i.id, t.study_uid || '/' || s.series_uid || '/' || i.sop_instance_uid"
        )
        statement = f"SELECT DISTINCT {owners} FROM {tables}"  # noqa: S608  (constants only)
        with self.database.write() as connection:
            tag_id = connection.execute(
                sa.insert(extended_query_tags)
                .values(path=TAG, vr=vr, level=level, status="ready", is_enabled=True)
                .returning(extended_query_tags.c.id)
            ).scalar_one()
            for owner, identifier in connection.exec_driver_sql(statement).all():
                for kind, value in values(identifier):
                    name = f"tag:{tag_id}" + (":words" if kind == "words" else "")
                    connection.execute(sa.insert(search_values).values(name=name, value=value, owner_id=owner))
        return int(tag_id)

    def change_tag(self, statement: str) -> None:
        with self.database.write() as connection:
            connection.exec_driver_sql(statement)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path / "depot.sqlite")


def all_of(number: str) -> list[str]:
    return sorted(f"{study}/{series}/{number}" for study in range(1, 4) for series in range(1, 5))


def test_only_series_with_an_instance_that_meets_the_query_are_walked(place: Place) -> None:
    asked = Matching(Level.INSTANCE, {"SOPInstanceUID": "2", "StudyInstanceUID": "1,2"})
    decided = place.planner().decide(asked).source
    assert isinstance(decided, Answered)
    assert len(decided.series_ids) == 8
    place.index.delete(parse_identifier("1/3/2"))
    decided = place.planner().decide(asked).source
    assert isinstance(decided, Answered)
    assert len(decided.series_ids) == 7
    assert place.plan(place.start(asked)) == [each for each in all_of("2") if each[0] < "3" and each != "1/3/2"]


@pytest.mark.parametrize(
    "filters", [{"Modality": "US"}, {"Modality": "CT", "InstanceNumber": "9"}, {"StudyInstanceUID": "9"}]
)
def test_a_query_that_matches_nothing_is_planned_at_once(place: Place, filters: dict[str, str]) -> None:
    asked = Matching(Level.INSTANCE, filters)
    counted = place.planner().dry_run(asked)
    assert (counted.count, counted.bytes_total, counted.unmatched) == (0, 0, ())
    operation_id = place.start(asked)
    assert place.plan(operation_id) == []
    operation = place.operations.get(operation_id)
    assert (operation.is_planned, operation.total) == (True, 0)
    assert place.operations.is_settled(operation_id)


@pytest.mark.parametrize(
    ("vr", "value", "is_fuzzy", "found"),
    [
        ("LO", "blue 2", False, "2"),
        ("LO", "*2", False, "2"),
        ("LO", "red*\\blue 2", False, ""),
        ("LO", "blue 1\\blue 2", False, "12"),
        ("PN", "blu", True, "123"),
        ("PN", "2 blu", True, "2"),
    ],
)
def test_an_extended_query_tag_of_instances_is_asked_of_each_instance(
    place: Place, vr: str, value: str, *, is_fuzzy: bool, found: str
) -> None:
    def values(identifier: str) -> list[tuple[str, str]]:
        return [("value", f"blue {identifier[-1]}"), ("words", "blue"), ("words", identifier[-1])]

    place.add_tag(Level.INSTANCE, vr, values)
    asked = Matching(Level.INSTANCE, {TAG: value}, is_fuzzy)
    expected = sorted(each for number in found for each in all_of(number))
    assert place.planner().dry_run(asked).count == len(expected)
    assert sorted(place.plan(place.start(asked))) == expected


@pytest.mark.parametrize("level", list(Level))
def test_a_tag_that_goes_while_the_export_is_planned_ends_it(place: Place, level: Level) -> None:
    def values(identifier: str) -> list[tuple[str, str]]:
        return [("value", "x")]

    tag_id = place.add_tag(level, "LO", values)
    operation_id = place.start(Matching(Level.INSTANCE, {TAG: "x"}))
    planner = place.planner()
    assert planner.plan_page(operation_id, 1) is not None
    place.change_tag("UPDATE extended_query_tags SET is_enabled = 0, error_count = 1")
    assert planner.plan_page(operation_id, 1) is not None, "all of its values are still there"
    assert place.planner().plan_page(operation_id, 1) is not None
    planner.require_plannable(operation_id)

    place.change_tag("DELETE FROM extended_query_tags")
    for each in (planner, place.planner()):
        with pytest.raises(QueryTagGone, match="Start a new export"):
            each.plan_page(operation_id, 1)
    with pytest.raises(QueryTagGone):
        planner.require_plannable(operation_id)
    assert place.add_tag(level, "LO", values) != tag_id
    with pytest.raises(QueryTagGone):
        place.planner().plan_page(operation_id, 1)
    assert len(place.plan(place.start(Matching(Level.INSTANCE, {TAG: "x"})))) == 36


def test_a_tag_that_goes_while_the_query_is_answered_is_noticed(place: Place) -> None:
    place.add_tag(Level.STUDY, "LO", lambda _: [("value", "x")])

    class Meanwhile(SqlSearch):
        def snapshot(self, query: SearchQuery) -> tuple[int, array[int]]:
            place.change_tag("DELETE FROM extended_query_tags")
            return super().snapshot(query)

    planner = place.planner(Meanwhile(place.database))
    with pytest.raises(QueryTagGone):
        planner.decide(Matching(Level.STUDY, {TAG: "x"}))


def test_queries_without_tags_do_not_care_for_them(place: Place) -> None:
    place.add_tag(Level.STUDY, "LO", lambda _: [("value", "x")])
    operation_id = place.start(Matching(Level.SERIES, {"Modality": "CT"}))
    place.change_tag("DELETE FROM extended_query_tags")
    assert len(place.plan(operation_id)) == 18
