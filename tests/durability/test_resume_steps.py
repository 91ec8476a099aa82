"""Resuming, step by step on the real adapters: from every place where an export can end early, with a death at every
call, with steps of the former generation that come late, and with instances that were deleted meanwhile.
"""

from __future__ import annotations

import copy
import itertools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dicom_depot.domain.errors import (
    Conflict,
    DestinationFault,
    DestinationRefused,
    FaultKind,
    InstancesSwept,
    ServiceUnavailable,
    SourceFault,
)
from dicom_depot.domain.export import ChunkOutcome
from dicom_depot.domain.identifiers import parse_identifier
from dicom_depot.domain.operation import OperationError, OperationId, OperationStatus
from dicom_depot.export import copier, runner
from dicom_depot.export.runner import StepResult
from dicom_depot.testing.faults import Crash, FaultPlan, When
from dicom_depot.testing.samples import many_small
from tests.durability.steps_bench import Bench, End, Process
from tests.support.archive import Archive, import_in_process

_COUNT = 14
_CORRUPT, _MISSING = 4, 9
_BY_THE_CLOCK = "operations.statuses"


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Archive:
    samples = many_small(_COUNT, 1200, instances_per_series=5, series_per_study=2)
    made = import_in_process(tmp_path_factory.mktemp("resume"), samples)
    made.damage(corrupt=[made.identifiers[_CORRUPT]], missing=[made.identifiers[_MISSING]])
    return made


@pytest.fixture
def new_bench(archive: Archive, tmp_path: Path) -> Callable[[], Bench]:
    numbers = itertools.count()

    def make() -> Bench:
        place = tmp_path / str(next(numbers))
        (place / "out").mkdir(parents=True)
        return Bench(archive.copy_to(place / "data"), place / "out")

    return make


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "_OWN_TROUBLE_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(copier, "_BACK_OFF_FIRST_SECONDS", 0.01)


def _sources(archive: Archive) -> list[str]:
    """Studies that hold everything, and identifiers that match nothing, of every kind."""
    studies = list(dict.fromkeys(identifier.split("/")[0] for identifier in archive.identifiers))
    return [*studies, "1.2.3", f"{studies[0]}/1.2.3", "1.2.3/1.2.3/1.2.4"]


def _refused() -> DestinationFault:
    return DestinationFault("Refused", "the role was withdrawn", FaultKind.PERMANENT)


@pytest.fixture(scope="module")
def undisturbed(archive: Archive, tmp_path_factory: pytest.TempPathFactory) -> tuple[End, FaultPlan]:
    place = tmp_path_factory.mktemp("undisturbed")
    (place / "out").mkdir()
    bench, counted = Bench(archive.copy_to(place / "data"), place / "out"), FaultPlan()
    operation_id = bench.start(*_sources(archive))
    bench.run(counted)
    end = bench.end(operation_id)
    assert end.status == "succeeded"
    assert end.counters[:3] == (_COUNT + 3, _COUNT - 2, 5)
    return end, counted


def _fail(bench: Bench, at: int) -> OperationId:
    """Start an export that loses its right to write at the `at`-th instance."""
    operation_id = bench.start(*_sources(bench.archive))
    bench.run(FaultPlan("destination.put", at, error=_refused, times=1000))
    assert bench.end(operation_id).status == "failed"
    return operation_id


def _copy_of(bench: Bench, place: Path) -> Bench:
    place.mkdir()
    shutil.copytree(bench.root, place / "out")
    return Bench(bench.archive.copy_to(place / "data"), place / "out", copy.deepcopy(bench.records))


def _resume_and_run(bench: Bench, operation_id: OperationId, faults: FaultPlan | None = None) -> bool:
    """Resume in a process with these faults, then run to the end; whether the resume was accepted at all."""
    is_accepted = True
    try:
        with bench.process(faults) as process:
            process.resumes.resume(operation_id)
            process.engine.run()
    except Crash:
        with bench.process() as process:
            is_accepted = process.operations.get(operation_id).generation == 2
    bench.run()
    return is_accepted


def test_wherever_the_right_to_write_is_lost_a_resumed_export_ends_exact(
    new_bench: Callable[[], Bench], undisturbed: tuple[End, FaultPlan]
) -> None:
    expected, _ = undisturbed
    for at in range(1, _COUNT - 1):
        bench = new_bench()
        operation_id = _fail(bench, at)
        assert _resume_and_run(bench, operation_id)
        assert bench.end(operation_id) == expected, at


def test_an_export_that_is_lost_again_and_again_is_resumed_again_and_again(
    new_bench: Callable[[], Bench], undisturbed: tuple[End, FaultPlan]
) -> None:
    expected, _ = undisturbed
    bench = new_bench()
    operation_id = _fail(bench, 2)
    for generation in range(2, 6):
        with bench.process(FaultPlan("destination.put", 3, error=_refused, times=1000)) as process:
            assert process.resumes.resume(operation_id).generation == generation
            process.engine.run()
    assert bench.end(operation_id).status == "failed"
    assert bench.end(operation_id).error == "Refused"
    assert _resume_and_run(bench, operation_id)
    assert bench.end(operation_id) == expected


def _places(counted: FaultPlan) -> Iterator[tuple[str, int]]:
    for name, count in sorted(counted.calls.items()):
        if name != _BY_THE_CLOCK:
            yield from ((name, number) for number in range(1, count + 1))


def test_a_death_at_any_call_leaves_it_ended_as_it_was_or_running_to_an_exact_end(
    new_bench: Callable[[], Bench], undisturbed: tuple[End, FaultPlan], tmp_path: Path
) -> None:
    expected, _ = undisturbed
    failed_bench, counted = new_bench(), FaultPlan()
    operation_id = _fail(failed_bench, 8)
    failed = failed_bench.end(operation_id)
    bench = _copy_of(failed_bench, tmp_path / "undisturbed")
    assert _resume_and_run(bench, operation_id, counted)
    places = list(_places(counted))
    assert len(places) > 60
    refused = 0
    for name, number in places:  # after a call is before the next one: half of the places are enough
        bench = _copy_of(failed_bench, tmp_path / f"{name}-{number}")
        plan = FaultPlan(name, number, When.AFTER, Crash)
        if _resume_and_run(bench, operation_id, plan):
            assert bench.end(operation_id) == expected, (name, number)
        else:
            refused += 1
            assert bench.end(operation_id) == failed, (name, number)
            assert _resume_and_run(bench, operation_id)
            assert bench.end(operation_id) == expected, (name, number)
        assert plan.acted_count == 1, (name, number)
    assert 0 < refused < len(places)


def test_canceled_between_any_two_workflows_it_is_resumed_exact(
    new_bench: Callable[[], Bench], undisturbed: tuple[End, FaultPlan]
) -> None:
    """Among them: before anything was planned, and with chunks in the queue."""
    expected, _ = undisturbed
    for count in range(20):
        bench = new_bench()
        operation_id = bench.start(*_sources(bench.archive))
        with bench.process() as process:
            process.engine.take_over()
            for _ in range(count):
                if bench.records.waiting:
                    process.engine.run_one()
            if process.operations.get(operation_id).status is OperationStatus.SUCCEEDED:
                break
            process.exports.cancel(operation_id)
            process.engine.run()
        assert bench.end(operation_id).status == "canceled"
        assert _resume_and_run(bench, operation_id)
        assert bench.end(operation_id) == expected, count
    else:
        raise AssertionError("the export was never at its end")


def test_planning_that_stopped_between_two_pages_goes_on_there(
    new_bench: Callable[[], Bench], undisturbed: tuple[End, FaultPlan]
) -> None:
    expected, counted = undisturbed
    for number in range(1, counted.calls["index.unmatched"] + 1):
        bench = new_bench()
        operation_id = bench.start(*_sources(bench.archive))
        bench.run(FaultPlan("index.unmatched", number, error=lambda: RuntimeError("a defect")))
        end = bench.end(operation_id)
        assert (end.status, end.error) == ("failed", "InternalError")
        with bench.process() as process:
            assert not process.operations.get(operation_id).is_planned
        assert _resume_and_run(bench, operation_id)
        assert bench.end(operation_id) == expected, number


def test_one_that_copied_everything_and_could_not_write_its_log_only_writes_it(
    new_bench: Callable[[], Bench], undisturbed: tuple[End, FaultPlan]
) -> None:
    expected, counted = undisturbed
    bench = new_bench()
    operation_id = bench.start(*_sources(bench.archive))
    bench.run(FaultPlan("destination.write_log", counted.calls["destination.write_log"], error=_refused, times=1000))
    assert bench.end(operation_id).status == "failed"
    again = FaultPlan()
    assert _resume_and_run(bench, operation_id, again)
    assert bench.end(operation_id) == expected
    assert again.calls["destination.put"] == 0


def test_lines_of_a_stopped_chunk_do_not_stay_in_the_log(new_bench: Callable[[], Bench], archive: Archive) -> None:
    """A skip that the next attempt does not meet any more leaves an empty log."""
    bench = new_bench()
    operation_id = bench.start(*archive.identifiers[:3])
    refusals = iter([DestinationFault("TooLarge", "no", FaultKind.INSTANCE), *[_refused() for _ in range(9)]])
    bench.run(FaultPlan("destination.put", 1, error=lambda: next(refusals), times=10))
    assert [error for _, error in bench.end(operation_id).log] == ["TooLarge: no"]
    assert _resume_and_run(bench, operation_id)
    end = bench.end(operation_id)
    assert (end.status, end.counters[:3], end.log) == ("succeeded", (3, 3, 0), [])


def test_a_destination_that_still_refuses_changes_nothing(new_bench: Callable[[], Bench]) -> None:
    bench = new_bench()
    operation_id = _fail(bench, 8)
    failed = bench.end(operation_id)
    with bench.process(FaultPlan("destination.write_log", 1, error=_refused)) as process:
        before = process.operations.get(operation_id)
        with pytest.raises(DestinationRefused, match="the role was withdrawn") as refused:
            process.resumes.resume(operation_id)
        assert refused.value.code == "Refused"
        assert process.operations.get(operation_id) == before
    assert bench.end(operation_id) == failed


def test_steps_of_the_former_generation_that_come_late_do_nothing(
    new_bench: Callable[[], Bench], undisturbed: tuple[End, FaultPlan]
) -> None:
    bench = new_bench()
    operation_id = bench.start(*_sources(bench.archive))
    with bench.process() as late, bench.process() as process:
        process.engine.take_over()
        process.engine.run_one()
        held = late.operations.claim_chunk(operation_id, 1, 0)
        assert held is not None
        process.exports.cancel(operation_id)
        process.engine.run()
        assert process.operations.get(operation_id).status is OperationStatus.CANCELED
        resumed = process.resumes.resume(operation_id)

        assert not late.operations.commit_chunk(held, ChunkOutcome(exported=len(held.instance_ids)))
        assert late.runner.begin(operation_id, 1) == StepResult([], is_settled=False)
        assert late.runner.plan(operation_id, 1) is None
        for number in range(5):
            assert late.runner.run_chunk(operation_id, 1, number) == StepResult([], is_settled=False)
        late.runner.finish(operation_id, 1)
        late.runner._fail(operation_id, 1, OperationError("Late", "too late"))
        assert process.operations.get(operation_id) == resumed
        process.engine.run()
    assert bench.end(operation_id) == undisturbed[0]


def test_the_next_generation_in_the_same_process_signs_in_anew_and_does_not_stop(
    new_bench: Callable[[], Bench], undisturbed: tuple[End, FaultPlan]
) -> None:
    bench, plan = new_bench(), FaultPlan()
    operation_id = bench.start(*_sources(bench.archive))
    with bench.process(plan) as process:
        process.engine.take_over()
        process.engine.run_one()
        process.engine.run_one()
        opened = process.runner._opened(operation_id, 1)
        process.exports.cancel(operation_id)
        assert opened.watch.stop.is_set()
        opens = plan.calls["destinations.open"]
        # The former generation is still open here, as it is where another process finished it.
        with bench.process() as other:
            while process.operations.get(operation_id).status is not OperationStatus.CANCELED:
                other.engine.run_one()
            other.resumes.resume(operation_id)
        process.engine.run()
        assert plan.calls["destinations.open"] == opens + 1
        assert process.runner._open == {}
    assert bench.end(operation_id) == undisturbed[0]


def test_another_request_for_the_same_operation_is_turned_away(new_bench: Callable[[], Bench]) -> None:
    bench = new_bench()
    operation_id = _fail(bench, 8)
    with bench.process() as process:

        def resume_again() -> DestinationFault:
            with pytest.raises(Conflict, match="Another request"):
                process.resumes.resume(operation_id)
            return _refused()

        # In the middle of the first request another one arrives.
        with bench.process(FaultPlan("destination.write_log", 1, error=resume_again)) as first:
            first.resumes._at_hand = process.resumes._at_hand
            with pytest.raises(DestinationRefused):
                first.resumes.resume(operation_id)
        assert process.resumes.resume(operation_id).generation == 2


def _to_copy(process: Process, operation_id: OperationId) -> dict[str, str]:
    """Identifier to store key of the instances in chunks that are not done."""
    ids = [id_ for _, ids in process.operations.unfinished(operation_id, -1, 100) for id_ in ids]
    return {stored.identifier: stored.store_key for stored in process.index.fetch(ids)}


@pytest.mark.parametrize("what", ["row and bytes", "bytes"])
def test_without_the_instances_that_were_planned_it_is_not_resumed(new_bench: Callable[[], Bench], what: str) -> None:
    bench = new_bench()
    operation_id = _fail(bench, 8)
    failed = bench.end(operation_id)
    with bench.process() as process:
        identifier, store_key = list(_to_copy(process, operation_id).items())[-1]
        process.index.delete(parse_identifier(identifier))
        if what == "bytes":
            process.store.delete(store_key)  # all that a sweep did before it died
        else:
            assert process.upkeep.sweep() == 1
        with pytest.raises(InstancesSwept, match="Start a new export"):
            process.resumes.resume(operation_id)
    assert bench.end(operation_id) == failed


def test_instances_that_were_deleted_but_not_swept_are_exported_as_planned(
    new_bench: Callable[[], Bench], undisturbed: tuple[End, FaultPlan]
) -> None:
    bench = new_bench()
    operation_id = _fail(bench, 8)
    with bench.process() as process:
        for identifier in _to_copy(process, operation_id):
            process.index.delete(parse_identifier(identifier))
        process.resumes.resume(operation_id)
        assert process.upkeep.sweep() == 0
        process.engine.run()
    assert bench.end(operation_id) == undisturbed[0]
    with bench.process() as process:
        assert process.upkeep.sweep() > 0


def test_what_was_copied_already_may_be_gone(
    new_bench: Callable[[], Bench], undisturbed: tuple[End, FaultPlan]
) -> None:
    bench = new_bench()
    operation_id = _fail(bench, 8)
    with bench.process() as process:
        copied = set(bench.archive.identifiers) - set(_to_copy(process, operation_id))
        assert copied
        for identifier in copied:
            process.index.delete(parse_identifier(identifier))
        assert process.upkeep.sweep() == len(copied)
    assert _resume_and_run(bench, operation_id)
    assert bench.end(operation_id) == undisturbed[0]


def test_what_was_not_planned_yet_must_all_be_there_still(new_bench: Callable[[], Bench], archive: Archive) -> None:
    """Nobody would miss an instance that was swept before it was planned: the count would be wrong without a trace."""
    bench = new_bench()
    operation_id = bench.start(*_sources(archive))
    with bench.process() as process:
        process.exports.cancel(operation_id)
        process.engine.run()
        process.index.delete(parse_identifier(archive.identifiers[0]))
        assert process.upkeep.sweep() == 1
        with pytest.raises(InstancesSwept):
            process.resumes.resume(operation_id)


def test_nothing_is_swept_while_a_resume_looks_at_what_is_there(new_bench: Callable[[], Bench]) -> None:
    bench = new_bench()
    operation_id = _fail(bench, 8)
    swept: list[int] = []
    with bench.process() as process:
        for identifier in _to_copy(process, operation_id):
            process.index.delete(parse_identifier(identifier))

        def sweep() -> DestinationFault:
            swept.append(process.upkeep.sweep())
            return _refused()

        with bench.process(FaultPlan("destination.write_log", 1, error=sweep)) as resuming:
            resuming.resumes.hold_sweeps = process.upkeep.held
            with pytest.raises(DestinationRefused):
                resuming.resumes.resume(operation_id)
        assert swept == [0]
        assert process.upkeep.sweep() > 0


def test_a_store_that_is_away_is_not_taken_for_a_swept_one(new_bench: Callable[[], Bench]) -> None:
    bench = new_bench()
    operation_id = _fail(bench, 8)
    away = FaultPlan("store.stream", 1, error=lambda: SourceFault("Away", "away", FaultKind.TRANSIENT))
    with bench.process(away) as process:
        for identifier in _to_copy(process, operation_id):
            process.index.delete(parse_identifier(identifier))
        with pytest.raises(ServiceUnavailable):
            process.resumes.resume(operation_id)
        assert process.resumes.resume(operation_id).generation == 2
