"""Every durable step run twice and failed once, at every call of every port, on the real adapters."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from random import Random
from threading import Barrier

import pytest

from dicom_depot.domain.errors import (
    DestinationFault,
    DestinationRefused,
    FaultKind,
    ServiceUnavailable,
    SourceFault,
    StorageFull,
)
from dicom_depot.domain.export import ChunkOutcome
from dicom_depot.domain.operation import OperationError, OperationId, OperationStatus
from dicom_depot.export import copier, runner
from dicom_depot.testing.faults import Crash, FaultPlan, When
from dicom_depot.testing.samples import many_small
from tests.durability.steps_bench import (
    WINDOW,
    Bench,
    End,
    ForeignError,
    Process,
    counters,
    expected_tree,
    specification,
)
from tests.support.archive import Archive, import_in_process, read_folder

_COUNT = 10
_CORRUPT, _MISSING = 4, 7
_UNMATCHED_STUDY = "1.2.3"
# The first is asked by a thread of its own, so that the number of a call means nothing. The second is asked once,
# when a process starts, and refuses the start. The third is told to raise nothing.
_UNCOUNTED = {"operations.statuses", "operations.active", "destination.close"}


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Archive:
    samples = many_small(_COUNT, 1200, instances_per_series=3, series_per_study=2)
    made = import_in_process(tmp_path_factory.mktemp("steps"), samples)
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
    """A study, a series and an instance of the next one, an instance once more; unmatched ones of every kind."""
    refs = archive.identifiers
    first_study, next_series = refs[0].split("/")[0], refs[6].rsplit("/", 1)[0]
    return [
        first_study,
        _UNMATCHED_STUDY,
        next_series,
        refs[2],
        refs[9],
        f"{first_study}/1.2.3",
        f"{next_series}/1.2.3",
        f"{_UNMATCHED_STUDY}/1.2.3/1.2.4",
    ]


def _run(bench: Bench, faults: FaultPlan | None = None) -> End:
    operation_id = bench.start(*_sources(bench.archive))
    bench.run(faults)
    return bench.end(operation_id)


@pytest.fixture(scope="module")
def undisturbed(archive: Archive, tmp_path_factory: pytest.TempPathFactory) -> tuple[End, FaultPlan]:
    place = tmp_path_factory.mktemp("undisturbed")
    (place / "out").mkdir()
    counted = FaultPlan()
    return _run(Bench(archive.copy_to(place / "data"), place / "out"), counted), counted


# Nothing to distinguish before and after.
_WITHOUT_EFFECT = (
    "index.",
    "store.",
    *(
        f"operations.{name}"
        for name in ("get", "is_", "log_state", "runnable", "failures", "plan_pos", "source", "seal")
    ),
)


def _places(counted: FaultPlan, *prefixes: str, has_all_reads: bool = False) -> Iterator[tuple[str, int, When]]:
    """The calls of an undisturbed run: those with an effect, before and after each; the first and the last of those
    that only read, because a death before a read is one after the effect before it.
    """
    for name, count in sorted(counted.calls.items()):
        if name in _UNCOUNTED or not name.startswith(prefixes):
            continue
        is_read = name.startswith(_WITHOUT_EFFECT)
        for number in range(1, count + 1):
            if is_read and not has_all_reads and number not in {1, count}:
                continue
            yield name, number, When.BEFORE
            if not is_read:
                yield name, number, When.AFTER


def test_the_undisturbed_export_is_what_the_specification_says(
    archive: Archive, undisturbed: tuple[End, FaultPlan]
) -> None:
    end, _ = undisturbed
    refs = archive.identifiers
    skipped = {refs[_CORRUPT], refs[_MISSING]}
    assert end.status == "succeeded"
    assert end.error is None
    assert end.tree == expected_tree(archive.contents, [ref for ref in refs if ref not in skipped])
    assert sorted(identifier for identifier, _ in end.log) == sorted(
        [
            *skipped,
            *(ref for ref in _sources(archive) if "1.2.3" in ref.split("/")),
        ]
    )
    assert end.counters[:3] == (_COUNT + 4, _COUNT - 2, 6)


@pytest.mark.parametrize(
    "has_all_reads", [False, pytest.param(True, marks=pytest.mark.long)], ids=["some reads", "all reads"]
)
def test_a_death_before_or_after_any_call_changes_nothing(
    new_bench: Callable[[], Bench], undisturbed: tuple[End, FaultPlan], has_all_reads: bool
) -> None:
    expected, counted = undisturbed
    prefixes = ("operations.", "index.", "store.", "destination", "step.")
    places = list(_places(counted, *prefixes, has_all_reads=has_all_reads))
    assert len(places) > 100
    for name, number, when in places:
        plan = FaultPlan(name, number, when, Crash)
        assert _run(new_bench(), plan) == expected, (name, number, when)
        assert plan.acted_count == 1, (name, number, when)


def test_a_busy_or_full_database_at_any_call_is_waited_out(
    new_bench: Callable[[], Bench], undisturbed: tuple[End, FaultPlan]
) -> None:
    expected, counted = undisturbed
    troubles = itertools.cycle([ServiceUnavailable, StorageFull])
    for name, number, when in _places(counted, "operations.", "index."):
        trouble = next(troubles)
        plan = FaultPlan(name, number, when, partial(trouble, "for a while"), times=2)
        assert _run(new_bench(), plan) == expected, (name, number, when)
        assert plan.acted_count, (name, number, when)


def test_a_passing_fault_of_source_or_destination_at_any_call_is_retried(
    new_bench: Callable[[], Bench], undisturbed: tuple[End, FaultPlan]
) -> None:
    expected, counted = undisturbed
    sides = {"store.": SourceFault, "destination.": DestinationFault}
    for prefix, fault in sides.items():
        for name, number, when in _places(counted, prefix):
            plan = FaultPlan(name, number, when, partial(fault, "Busy", "busy", FaultKind.TRANSIENT), times=3)
            assert _run(new_bench(), plan) == expected, (name, number, when)


def test_an_error_that_no_rule_covers_fails_the_operation_and_never_leaves_it_hanging(
    new_bench: Callable[[], Bench], undisturbed: tuple[End, FaultPlan], caplog: pytest.LogCaptureFixture
) -> None:
    expected, counted = undisturbed
    caplog.set_level("CRITICAL")
    errors: Iterator[Callable[[], Exception]] = itertools.cycle(
        [partial(RuntimeError, "a defect"), partial(ForeignError, "what?")]
    )
    for name, number, when in _places(counted, "operations.", "index.", "store.", "destination"):
        if when is When.AFTER and name.startswith("operations."):
            continue  # a database that commits and says that it did not is what deaths are about
        error = next(errors)
        end = _run(new_bench(), FaultPlan(name, number, when, error))
        assert _is_sound(end, expected), (name, number, when, error, end)
        if end.status == "succeeded":
            assert end == expected, (name, number, when, error)
        else:
            assert end.error in {"InternalError", "Foreign"}


def test_a_refused_instance_is_one_more_skip_and_nothing_else(
    new_bench: Callable[[], Bench], undisturbed: tuple[End, FaultPlan]
) -> None:
    expected, counted = undisturbed
    for number in range(1, counted.calls["destination.put"] + 1):
        refusal = FaultPlan(
            "destination.put", number, error=partial(DestinationFault, "Refused", "no", FaultKind.INSTANCE)
        )
        end = _run(new_bench(), refusal)
        assert end.status == "succeeded"
        assert len(end.tree) == len(expected.tree) - 1
        assert set(end.log) - set(expected.log) == {
            (one, "Refused: no") for one, error in end.log if "Refused" in error
        }
        assert len(end.log) == len(expected.log) + 1
        assert end.counters[1:3] == (expected.counters[1] - 1, expected.counters[2] + 1)


def test_a_permanent_fault_fails_the_operation_and_keeps_its_counters_true(
    new_bench: Callable[[], Bench], undisturbed: tuple[End, FaultPlan]
) -> None:
    expected, counted = undisturbed
    for prefix, fault in {"destination.": DestinationFault, "store.": SourceFault}.items():
        for name, number, when in _places(counted, prefix):
            plan = FaultPlan(name, number, when, partial(fault, "Gone", "gone", FaultKind.PERMANENT))
            end = _run(new_bench(), plan)
            assert _is_sound(end, expected), (name, number, end)
            assert end.error == ("Gone" if end.status == "failed" else None)
            # The log's refresh may fail for any reason; only its last write matters.
            assert end.status == "failed" or name == "destination.write_log"


@pytest.mark.parametrize("into", [OperationStatus.CANCELING, OperationStatus.FAILING])
def test_a_death_while_an_operation_is_ending_early_leaves_it_ended_early_and_true(
    new_bench: Callable[[], Bench], undisturbed: tuple[End, FaultPlan], into: OperationStatus
) -> None:
    expected, _ = undisturbed

    def end_early(plan: FaultPlan) -> End:
        bench = new_bench()
        operation_id = bench.start(*_sources(bench.archive))
        with bench.process() as process:
            process.engine.take_over()
            for _ in range(3):
                process.engine.run_one()
            process.operations.claim_chunk(operation_id, 1, _first_planned(process, operation_id))
        with bench.process() as process:  # the one before died while it copied a chunk
            error = OperationError("Gone", "gone") if into is OperationStatus.FAILING else None
            process.operations.stop(operation_id, into, error)
        bench.run(plan)
        return bench.end(operation_id)

    counted = FaultPlan()
    plain = end_early(counted)
    assert plain.status == {"canceling": "canceled", "failing": "failed"}[into]
    assert _is_sound(plain, expected)
    prefixes = ("operations.", "index.", "destination", "step.") if into is OperationStatus.CANCELING else ("step.",)
    for name, number, when in _places(counted, *prefixes):
        assert end_early(FaultPlan(name, number, when, Crash)) == plain, (name, number, when)


def test_deaths_one_after_the_other_change_nothing(
    new_bench: Callable[[], Bench], undisturbed: tuple[End, FaultPlan]
) -> None:
    expected, counted = undisturbed
    randomness = Random(20260101)
    places = list(_places(counted, "operations.", "index.", "store.", "destination", "step."))
    for _ in range(15):
        bench = new_bench()
        operation_id = bench.start(*_sources(bench.archive))
        deaths = [randomness.choice(places) for _ in range(6)]
        for name, number, when in deaths:
            with bench.process(FaultPlan(name, randomness.randint(1, number), when)) as process, suppress(Crash):
                process.engine.take_over()
                process.engine.run()
        bench.run()
        assert bench.end(operation_id) == expected, deaths


def test_a_late_commit_of_an_old_attempt_is_refused(
    new_bench: Callable[[], Bench], undisturbed: tuple[End, FaultPlan]
) -> None:
    bench = new_bench()
    operation_id = bench.start(*_sources(bench.archive))
    with bench.process() as late, bench.process() as process:
        process.engine.take_over()
        process.engine.run_one()
        number = _first_planned(process, operation_id)
        held = late.operations.claim_chunk(operation_id, 1, number)
        assert held is not None
        process.engine.run()
        assert not late.operations.commit_chunk(held, ChunkOutcome(exported=len(held.instance_ids)))
    assert bench.end(operation_id) == undisturbed[0]


def test_of_two_attempts_at_the_same_time_only_the_newer_one_counts(new_bench: Callable[[], Bench]) -> None:
    bench = new_bench()
    operation_id = bench.start(*bench.archive.identifiers[:3])
    with bench.process() as process:
        process.engine.take_over()
        process.engine.run_one()
        older, newer = (process.operations.claim_chunk(operation_id, 1, 0) for _ in range(2))
        assert older is not None
        assert newer is not None
        assert newer.attempt > older.attempt
        assert not process.operations.commit_chunk(older, ChunkOutcome(exported=3))
        assert process.operations.commit_chunk(newer, ChunkOutcome(exported=3, bytes_exported=30))
        assert not process.operations.commit_chunk(newer, ChunkOutcome(exported=3))
        assert process.operations.claim_chunk(operation_id, 1, 0) is None
        assert counters(process.operations.get(operation_id))[1:3] == (3, 0)


def test_processes_that_plan_the_same_operation_at_once_plan_everything_once(
    new_bench: Callable[[], Bench], undisturbed: tuple[End, FaultPlan]
) -> None:
    bench = new_bench()
    operation_id = bench.start(*_sources(bench.archive))
    with bench.process() as one, bench.process() as other:
        one.runner.begin(operation_id, 1)
        together = Barrier(2)

        def plan(process: Process) -> None:
            for _ in range(10):
                together.wait(10)
                process.runner.plan(operation_id, 1)

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(plan, (one, other)))
        assert one.operations.get(operation_id).is_planned
    bench.run()
    assert bench.end(operation_id) == undisturbed[0]


def test_canceling_between_any_two_workflows_leaves_a_true_state(
    new_bench: Callable[[], Bench], undisturbed: tuple[End, FaultPlan]
) -> None:
    expected, _ = undisturbed
    for count in range(20):
        bench = new_bench()
        operation_id = bench.start(*_sources(bench.archive))
        with bench.process() as process:
            process.engine.take_over()
            for _ in range(count):
                if bench.records.waiting:
                    process.engine.run_one()
            if not bench.records.waiting:
                break
            process.exports.cancel(operation_id)
            process.exports.cancel(operation_id)
            process.engine.run()
        end = bench.end(operation_id)
        assert end.status == "canceled"
        assert _is_sound(end, expected), (count, end)
        assert len(end.tree) == end.counters[1]
    else:
        raise AssertionError("the export was never at its end")


def test_a_start_that_dies_leaves_an_export_that_goes_on_or_none_at_all(
    new_bench: Callable[[], Bench], undisturbed: tuple[End, FaultPlan]
) -> None:
    expected, _ = undisturbed
    counted = FaultPlan()
    with new_bench().process(counted) as process:
        process.exports.start(specification(*_sources(process.archive)))
    ends = set()
    for name, number, when in _places(counted, "operations.", "index.", "destination"):
        bench = new_bench()
        with bench.process(FaultPlan(name, number, when)) as process, suppress(Crash):
            process.exports.start(specification(*_sources(process.archive)))
        bench.run()
        with bench.process() as process:
            found = process.operations.page(10, None, None)
        assert [bench.end(operation.id) for operation in found] == [expected] * len(found), (name, number, when)
        ends.add(len(found))
    assert ends == {0, 1}


def test_a_start_that_is_refused_leaves_nothing(new_bench: Callable[[], Bench]) -> None:
    counted = FaultPlan()
    with new_bench().process(counted) as process:
        process.exports.start(specification(*_sources(process.archive)))
    for name, number, _ in _places(counted, "operations.create", "index.", "destination.write_log"):
        bench = new_bench()
        busy = FaultPlan(name, number, error=partial(DestinationFault, "Busy", "busy", FaultKind.TRANSIENT))
        with bench.process(busy) as process:
            with pytest.raises((DestinationRefused, DestinationFault)):
                process.exports.start(specification(*_sources(process.archive)))
            assert process.operations.page(10, None, None) == []
        assert read_folder(bench.root) == {}


def _first_planned(process: Process, operation_id: OperationId) -> int:
    return process.operations.runnable(operation_id, WINDOW)[0]


def _is_sound(end: End, expected: End) -> bool:
    """What holds however an export ends: counters that add up, true copies only, a log of what was skipped."""
    total, exported, skipped, _, _ = end.counters
    return (
        end.status in {"succeeded", "failed", "canceled"}
        and (end.status == "failed") == (end.error is not None)
        and (exported + skipped == total if end.status == "succeeded" else exported + skipped <= total)
        and exported <= len(end.tree)
        and end.tree.items() <= expected.tree.items()
        and len(end.log) <= skipped
        and set(end.log) <= set(expected.log)
    )
