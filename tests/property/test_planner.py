"""Planning against a model in plain Python: random archives with deletions, random identifiers, random chunk bounds."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dicom_depot.adapters.database import Database
from dicom_depot.adapters.index_sql import SqlIndex
from dicom_depot.adapters.operations_sql import SqlOperations
from dicom_depot.adapters.query_tags_sql import SqlQueryTags
from dicom_depot.adapters.search_sql import SqlSearch
from dicom_depot.domain.export import ClaimedChunk, Everything
from dicom_depot.domain.identifiers import parse_identifier
from dicom_depot.domain.operation import OperationId
from dicom_depot.export import planner as planner_module
from dicom_depot.export.planner import Planner
from dicom_depot.testing.index_contract import make_record
from dicom_depot.testing.operations_contract import listed, new_operation

UIDS = st.sampled_from("123")
IDENTIFIERS = st.lists(UIDS, min_size=1, max_size=3).map("/".join)
INSTANCES = st.lists(UIDS, min_size=3, max_size=3).map("/".join)
EVENTS = st.lists(
    st.tuples(st.sampled_from(["store", "store", "delete"]), IDENTIFIERS, st.integers(0, 50)), max_size=25
)


@dataclass
class Model:
    """The instances that live, by identifier, with their sizes; in plain Python."""

    live: dict[str, int] = field(default_factory=dict)

    def apply(self, index: SqlIndex, events: list[tuple[str, str, int]]) -> None:
        for kind, identifier, size in events:
            if kind == "delete":
                gone = [each for each in self.live if f"{each}/".startswith(f"{identifier}/")]
                assert index.delete(parse_identifier(identifier)) == len(gone)
                for each in gone:
                    del self.live[each]
            else:
                instance = "/".join((identifier.split("/") * 3)[:3])
                index.add([make_record(instance, f"{size}", size=size)])
                self.live.setdefault(instance, size)


@contextmanager
def empty() -> Iterator[tuple[SqlIndex, SqlOperations]]:
    with tempfile.TemporaryDirectory() as folder:
        database = Database(Path(folder) / "depot.sqlite")
        database.migrate()
        yield SqlIndex(database), SqlOperations(database)
        database.close()


def planner_of(index: SqlIndex, operations: SqlOperations, count_max: int, bytes_max: int) -> Planner:
    database = index._database
    return Planner(index, SqlSearch(database), SqlQueryTags(database), operations, count_max, bytes_max)


def claimed_chunks(operations: SqlOperations, operation_id: OperationId) -> list[ClaimedChunk]:
    numbers = operations.runnable(operation_id, 10_000)
    chunks = [operations.claim_chunk(operation_id, 1, number) for number in numbers]
    return [chunk for chunk in chunks if chunk is not None]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    before=EVENTS,
    after=EVENTS,
    identifiers=st.one_of(st.none(), st.lists(IDENTIFIERS, min_size=1, max_size=12)),
    count_max=st.integers(1, 4),
    bytes_max=st.integers(1, 100),
    refs_in_page=st.integers(1, 5),
    planners=st.lists(st.integers(0, 1), min_size=1, max_size=3),
)
def test_a_plan_is_exactly_what_the_model_says(
    before: list[tuple[str, str, int]],
    after: list[tuple[str, str, int]],
    identifiers: list[str] | None,
    count_max: int,
    bytes_max: int,
    refs_in_page: int,
    planners: list[int],
) -> None:
    with empty() as (index, operations), _page_of(refs_in_page):
        model = Model()
        model.apply(index, before)
        then = dict(model.live)
        source = Everything() if identifiers is None else listed(*identifiers)
        id_ = operations.create(new_operation(source=source, cutoff=index.sequence())).id
        operations.begin(id_)
        counted = planner_of(index, operations, count_max, bytes_max).dry_run(source)

        # Two planners take turns, as after a crash, and the archive changes between the pages.
        both = [planner_of(index, operations, count_max, bytes_max) for _ in range(2)]
        turn = 0
        while not operations.get(id_).is_planned:
            assert both[planners[turn % len(planners)]].plan_page(id_, 1) is not None
            model.apply(index, after[turn : turn + 3])
            turn += 1
        assert [each.plan_page(id_, 1) for each in both] == [None, None]

        distinct = None if identifiers is None else set(identifiers)
        expected = {
            each: size
            for each, size in then.items()
            if distinct is None or any(f"{each}/".startswith(f"{one}/") for one in distinct)
        }
        unmatched = {one for one in distinct or () if not any(f"{each}/".startswith(f"{one}/") for each in then)}

        chunks = claimed_chunks(operations, id_)
        planned: list[tuple[str, int]] = []
        for chunk in chunks:
            rows = index.fetch(chunk.instance_ids)
            sizes = [row.size for row in rows]
            assert 1 <= len(rows) == len(chunk.instance_ids) <= count_max
            assert sum(sizes) <= bytes_max or len(rows) == 1
            planned += [(row.identifier, row.size) for row in rows]
        assert sorted(planned) == sorted(expected.items()), "each once, as it was when the export was made"

        lines = [line.identifier for _, line in operations.failures(id_, (-1, -1), 1000)]
        assert sorted(lines) == sorted(unmatched)
        operation = operations.get(id_)
        assert operation.total == len(expected) + len(unmatched)
        assert operation.skipped == len(unmatched)
        assert operation.bytes_total == sum(expected.values())
        assert (counted.count, counted.bytes_total) == (len(expected), sum(expected.values()))
        assert {str(ref) for ref in counted.unmatched} == unmatched
        assert len(counted.unmatched) == len(unmatched)


@settings(max_examples=15, deadline=None)
@given(st.lists(INSTANCES, min_size=1, max_size=27, unique=True), st.integers(1, 30))
def test_identifiers_of_instances_in_many_pages_are_planned_once(instances: list[str], count_max: int) -> None:
    with empty() as (index, operations):
        index.add([make_record(each, each) for each in instances])
        id_ = operations.create(new_operation(source=listed(*instances), cutoff=index.sequence())).id
        operations.begin(id_)
        planner = planner_of(index, operations, count_max, 1 << 40)
        while planner.plan_page(id_, 1) is not None:
            pass
        found = [row.identifier for chunk in claimed_chunks(operations, id_) for row in index.fetch(chunk.instance_ids)]
        assert sorted(found) == sorted(instances)


@contextmanager
def _page_of(refs: int) -> Iterator[None]:
    """Small pages of identifiers, so that a few of them already make several."""
    usual = planner_module._REFS_IN_PAGE
    planner_module._REFS_IN_PAGE = refs
    try:
        yield
    finally:
        planner_module._REFS_IN_PAGE = usual
