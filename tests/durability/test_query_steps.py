"""An export by query whose planning is interrupted anywhere, while the archive changes: it ends with what matched at
its cut-off.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from dicom_depot.domain.export import Matching
from dicom_depot.domain.identifiers import parse_identifier
from dicom_depot.domain.operation import OperationId
from dicom_depot.domain.search import Level
from dicom_depot.export import planner
from dicom_depot.testing.faults import Crash, FaultPlan, When
from dicom_depot.testing.index_contract import make_record
from dicom_depot.testing.samples import many_small
from tests.durability.steps_bench import CHUNK_INSTANCES, Bench, expected_tree
from tests.support.archive import Archive, import_in_process

_COUNT = 14


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Archive:
    samples = many_small(_COUNT, 1200, instances_per_series=5, series_per_study=2)
    return import_in_process(tmp_path_factory.mktemp("queries"), samples)


@pytest.fixture
def new_bench(archive: Archive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Bench]:
    """Benches whose pages are one chunk each."""
    monkeypatch.setattr(planner, "_CHUNKS_IN_PAGE", 1)
    numbers = itertools.count()

    def make() -> Bench:
        place = tmp_path / str(next(numbers))
        (place / "out").mkdir(parents=True)
        return Bench(archive.copy_to(place / "data"), place / "out")

    return make


def _query(archive: Archive) -> tuple[Matching, list[str]]:
    """All but two instances, and what they are called."""
    wanted = [*archive.identifiers[:3], *archive.identifiers[4:-1]]
    listed = ",".join(each.split("/")[2] for each in wanted)
    return Matching(Level.INSTANCE, {"Modality": "CT", "SOPInstanceUID": listed}), wanted


def _change(bench: Bench, wanted: list[str]) -> None:
    """Delete what the query matched, store what it would match, and sweep what nobody needs."""
    with bench.process() as process:
        process.index.delete(parse_identifier(wanted[-1]))
        process.index.delete(parse_identifier(wanted[0]))
        study, series, sop = wanted[5].split("/")
        process.index.add(
            [make_record(f"{study}/{other}/{sop}", "late", modality="CT") for other in (series, f"{series}.1")]
        )
        process.upkeep.run()


def _die(bench: Bench, faults: FaultPlan) -> None:
    with bench.process(faults) as process, suppress(Crash):
        process.engine.take_over()
        process.engine.run()


def _assert_exact(bench: Bench, operation_id: OperationId, wanted: list[str]) -> None:
    end = bench.end(operation_id)
    tree = expected_tree(bench.archive.contents, wanted)
    size = sum(map(len, tree.values()))
    assert (end.status, end.error, end.log) == ("succeeded", None, [])
    assert end.counters == (len(wanted), len(wanted), 0, size, size)
    assert end.tree == tree


def _places(counted: FaultPlan) -> list[tuple[str, int, When]]:
    names = ("operations.source", "index.select_in_series", "operations.save_plan")
    return [
        (name, number, when)
        for name in names
        for number in sorted({1, 2, counted.calls[name]} - {counted.calls[name] + 1})
        for when in (When if name == "operations.save_plan" else [When.BEFORE])
    ]


def test_wherever_planning_stops_the_export_ends_with_what_matched(
    archive: Archive, new_bench: Callable[[], Bench]
) -> None:
    asked, wanted = _query(archive)
    bench, counted = new_bench(), FaultPlan()
    operation_id = bench.start_query(asked)
    assert bench.run(counted) == 1
    _assert_exact(bench, operation_id, wanted)
    places = _places(counted)
    assert counted.calls["operations.save_plan"] >= len(wanted) // CHUNK_INSTANCES

    for place in places:
        bench = new_bench()
        operation_id = bench.start_query(asked)
        faults = FaultPlan(*place)
        _die(bench, faults)
        assert faults.acted_count == 1, place
        _change(bench, wanted)
        bench.run()
        _assert_exact(bench, operation_id, wanted)


def test_what_was_not_planned_when_it_was_canceled_is_planned_when_it_is_resumed(
    archive: Archive, new_bench: Callable[[], Bench]
) -> None:
    asked, wanted = _query(archive)
    bench = new_bench()
    operation_id = bench.start_query(asked)
    _die(bench, FaultPlan("operations.save_plan", 2))
    with bench.process() as process:
        process.exports.cancel(operation_id)
    bench.run()
    end = bench.end(operation_id)
    assert (end.status, end.counters[0]) == ("canceled", CHUNK_INSTANCES)
    with bench.process() as process:
        process.index.delete(parse_identifier(wanted[-1]))  # its bytes are there until somebody sweeps
        assert not process.operations.get(operation_id).is_planned
        process.resumes.resume(operation_id)
    bench.run()
    _assert_exact(bench, operation_id, wanted)


def test_a_query_that_matches_nothing_succeeds_with_nothing_but_its_log(new_bench: Callable[[], Bench]) -> None:
    bench = new_bench()
    operation_id = bench.start_query(Matching(Level.SERIES, {"Modality": "US"}))
    bench.run()
    _assert_exact(bench, operation_id, [])
