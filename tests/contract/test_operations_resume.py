"""What `OperationStore.resume` promises, on the real database: counters, chunks, generations, and races."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Barrier

import pytest

from dicom_depot.adapters.database import Database
from dicom_depot.adapters.operations_sql import SqlOperations
from dicom_depot.domain.errors import NotFound, TooManyOperations
from dicom_depot.domain.export import ChunkOutcome, ClaimedChunk, Everything, ExportFailure, PlannedChunk
from dicom_depot.domain.identifiers import parse_identifier
from dicom_depot.domain.operation import (
    RESUMABLE_STATUSES,
    TERMINAL_STATUSES,
    Operation,
    OperationError,
    OperationId,
    OperationStatus,
)
from dicom_depot.ports import ChunkPosition, NewOperation, OperationLimits

_ID = OperationId("0" * 31 + "1")
_CUTOFF = 7
_NOW = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)
_GONE = OperationError("Gone", "gone")
_ENDS = {OperationStatus.FAILED: OperationStatus.FAILING, OperationStatus.CANCELED: OperationStatus.CANCELING}


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = Database(tmp_path / "depot.sqlite")
    database.migrate()
    yield database
    database.close()


@pytest.fixture
def operations(database: Database) -> SqlOperations:
    return SqlOperations(database)


def _create(operations: SqlOperations, operation_id: OperationId = _ID, created_by: str = "") -> None:
    operations.create(
        NewOperation(
            id=operation_id,
            cutoff=_CUTOFF,
            source=Everything(),
            destination={"type": "file", "public": {"folder": ""}},
            sealed_secret="sealed before",
            log_href="errors.log",
            log_etag=None,
            fingerprint="",
            idempotency_key=None,
            created_by=created_by,
        )
    )


def _plan(operations: SqlOperations, *chunks: PlannedChunk, is_last: bool = True) -> bool:
    at = operations.plan_position(_ID)
    following = ChunkPosition(at.next_number + len(chunks), None if is_last else "[]", is_last, at.generation)
    failures = [[_failure(n, str(ref)) for n, ref in enumerate(chunk.unmatched)] for chunk in chunks]
    return operations.save_plan(_ID, at, chunks, failures, following)


def _failure(position: int, identifier: str = "1.2/3.4/5.6") -> ExportFailure:
    return ExportFailure(position, identifier, "NotFound", "NotFound: gone", _NOW)


def _claim(operations: SqlOperations, number: int) -> ClaimedChunk:
    chunk = operations.claim_chunk(_ID, operations.get(_ID).generation, number)
    assert chunk is not None
    return chunk


def _four_chunks_of_ten(operations: SqlOperations) -> None:
    """One done with a skip, one stopped half way with a skip, one never begun, and one of an unmatched identifier."""
    _create(operations)
    operations.begin(_ID)
    tens = [PlannedChunk(range(start, start + 10), 100) for start in (1, 11, 21)]
    assert _plan(operations, *tens, PlannedChunk(unmatched=(parse_identifier("1.2.3"),)))
    assert operations.commit_chunk(_claim(operations, 0), ChunkOutcome(9, 90, [_failure(4)]))
    stopped = _claim(operations, 1)
    operations.stop(_ID, OperationStatus.FAILING, _GONE)
    assert operations.commit_chunk(stopped, ChunkOutcome(3, 30, [_failure(0), _failure(7)], is_complete=False))


def _counters(operation: Operation) -> tuple[int, int, int, int, int]:
    return (
        operation.total,
        operation.exported,
        operation.skipped,
        operation.bytes_total,
        operation.bytes_exported,
    )


def _failures(operations: SqlOperations) -> list[tuple[int, int]]:
    return [(number, failure.position) for number, failure in operations.failures(_ID, (-1, -1), 100)]


def test_only_what_ended_early_can_be_resumed() -> None:
    assert {OperationStatus.FAILED, OperationStatus.CANCELED} == RESUMABLE_STATUSES
    assert {status for status in OperationStatus if status.is_terminal} == TERMINAL_STATUSES
    assert RESUMABLE_STATUSES | {OperationStatus.SUCCEEDED} == TERMINAL_STATUSES


def test_a_resumed_operation_counts_its_done_chunks_only_and_runs_the_rest_again(operations: SqlOperations) -> None:
    _four_chunks_of_ten(operations)
    ended = operations.finish(_ID)
    assert (ended.status, _counters(ended)) == (OperationStatus.FAILED, (31, 12, 4, 300, 120))
    assert operations.sealed_secret(_ID) is None
    resumed = operations.resume(_ID, 1, "sealed anew")
    assert resumed == operations.get(_ID)
    assert resumed is not None
    assert resumed.status is OperationStatus.RUNNING
    assert resumed.generation == 2
    assert resumed.ended_at is None
    assert resumed.error is None
    assert resumed.updated_at >= ended.updated_at
    assert _counters(resumed) == (31, 9, 2, 300, 90)
    assert operations.sealed_secret(_ID) == "sealed anew"
    assert _failures(operations) == [(0, 4), (3, 0)]
    assert operations.log_state(_ID).failures == 2
    assert operations.runnable(_ID, 4) == [1, 2]
    assert operations.active() == [_ID]
    assert operations.oldest_active_cutoff() == _CUTOFF

    assert operations.commit_chunk(_claim(operations, 1), ChunkOutcome(9, 90, [_failure(7)]))
    assert not operations.is_settled(_ID)
    assert operations.commit_chunk(_claim(operations, 2), ChunkOutcome(10, 100))
    assert operations.is_settled(_ID)
    finished = operations.finish(_ID)
    assert (finished.status, _counters(finished)) == (OperationStatus.SUCCEEDED, (31, 28, 3, 300, 280))
    assert _failures(operations) == [(0, 4), (1, 7), (3, 0)]


@pytest.mark.parametrize("end", _ENDS)
def test_one_that_was_stopped_before_it_planned_anything_plans_from_the_beginning(
    operations: SqlOperations, end: OperationStatus
) -> None:
    _create(operations)
    operations.stop(_ID, _ENDS[end], None)
    assert operations.finish(_ID).status is end
    assert operations.resume(_ID, 1, None) is not None
    assert operations.plan_position(_ID) == ChunkPosition(0, None, is_planned=False, generation=2)
    assert not operations.is_settled(_ID)
    assert _plan(operations)
    assert operations.is_settled(_ID)


def test_planning_goes_on_where_it_stopped(operations: SqlOperations) -> None:
    _create(operations)
    operations.begin(_ID)
    assert _plan(operations, PlannedChunk(range(3), 30), is_last=False)
    operations.stop(_ID, OperationStatus.CANCELING, None)
    assert not _plan(operations, PlannedChunk(range(3, 6), 30))
    operations.finish(_ID)
    assert operations.resume(_ID, 1, None) is not None
    assert operations.plan_position(_ID) == ChunkPosition(1, "[]", is_planned=False, generation=2)
    assert _plan(operations, PlannedChunk(range(3, 6), 30))
    assert operations.get(_ID).total == 6


@pytest.mark.parametrize(
    "come_there",
    [
        lambda operations: None,
        lambda operations: operations.begin(_ID),
        lambda operations: (operations.begin(_ID), operations.stop(_ID, OperationStatus.FAILING, _GONE)),
        lambda operations: operations.stop(_ID, OperationStatus.CANCELING, None),
        lambda operations: (operations.begin(_ID), operations.finish(_ID)),
    ],
    ids=["not started", "running", "failing", "canceling", "succeeded"],
)
def test_one_in_another_state_is_left_as_it_is(
    operations: SqlOperations, come_there: Callable[[SqlOperations], object]
) -> None:
    _create(operations)
    come_there(operations)
    before = operations.get(_ID), operations.sealed_secret(_ID)
    assert operations.resume(_ID, 1, "other") is None
    assert (operations.get(_ID), operations.sealed_secret(_ID)) == before


def test_an_unknown_operation_is_not_found(operations: SqlOperations) -> None:
    with pytest.raises(NotFound):
        operations.resume(_ID, 1, None)


def test_of_many_that_resume_it_at_once_exactly_one_does(operations: SqlOperations) -> None:
    _four_chunks_of_ten(operations)
    operations.finish(_ID)
    together = Barrier(8)

    def resume(number: int) -> bool:
        together.wait(10)
        return operations.resume(_ID, 1, f"sealed by {number}") is not None

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(resume, range(8)))
    assert won.count(True) == 1
    assert operations.sealed_secret(_ID) == f"sealed by {won.index(True)}"
    assert operations.get(_ID).generation == 2
    assert _counters(operations.get(_ID)) == (31, 9, 2, 300, 90)


def test_one_that_was_resumed_and_ended_again_is_not_the_one_that_was_looked_at(operations: SqlOperations) -> None:
    _four_chunks_of_ten(operations)
    operations.finish(_ID)
    assert operations.resume(_ID, 1, None) is not None
    operations.stop(_ID, OperationStatus.CANCELING, None)
    assert operations.finish(_ID).status is OperationStatus.CANCELED
    assert operations.resume(_ID, 1, None) is None
    assert operations.resume(_ID, 2, None) is not None


def test_an_earlier_generation_can_neither_claim_nor_commit_nor_plan_nor_fail(operations: SqlOperations) -> None:
    _create(operations)
    operations.begin(_ID)
    assert _plan(operations, PlannedChunk(range(3), 30), PlannedChunk(range(3, 6), 30), is_last=False)
    late_position = operations.plan_position(_ID)
    late = _claim(operations, 0)
    operations.stop(_ID, OperationStatus.FAILING, _GONE)
    assert (
        operations.claim_chunk(_ID, 1, 0) is None
    )  # from a process that is taken for dead: the chunk counts as stopped
    operations.finish(_ID)
    resumed = operations.resume(_ID, 1, None)

    assert operations.claim_chunk(_ID, 1, 0) is None
    assert not operations.commit_chunk(late, ChunkOutcome(3, 30))
    following = ChunkPosition(3, None, is_planned=True, generation=1)
    assert not operations.save_plan(_ID, late_position, [PlannedChunk(range(6, 9), 30)], [[]], following)
    assert operations.stop(_ID, OperationStatus.FAILING, _GONE, generation=1) == resumed
    assert operations.get(_ID) == resumed

    present = _claim(operations, 0)
    assert present.attempt > late.attempt
    assert not operations.commit_chunk(late, ChunkOutcome(3, 30))
    assert operations.commit_chunk(present, ChunkOutcome(3, 30))
    assert operations.stop(_ID, OperationStatus.FAILING, _GONE, generation=2).status is OperationStatus.FAILING


def test_a_chunk_that_was_in_flight_when_its_operation_ended_is_planned_again(operations: SqlOperations) -> None:
    """It cannot happen while `finish` waits for what is in flight; if it did, nothing must be lost or count twice."""
    _create(operations)
    operations.begin(_ID)
    assert _plan(operations, PlannedChunk(range(3), 30))
    late = _claim(operations, 0)
    operations.stop(_ID, OperationStatus.CANCELING, None)
    operations.finish(_ID)
    assert operations.resume(_ID, 1, None) is not None
    assert not operations.commit_chunk(late, ChunkOutcome(3, 30))
    assert operations.runnable(_ID, 4) == [0]


def test_unfinished_chunks_are_listed_page_by_page_with_their_instances(operations: SqlOperations) -> None:
    _four_chunks_of_ten(operations)
    operations.finish(_ID)
    [(number, instance_ids)] = operations.unfinished(_ID, -1, 1)
    assert (number, list(instance_ids)) == (1, list(range(11, 21)))
    [(number, instance_ids)] = operations.unfinished(_ID, 1, 10)
    assert (number, list(instance_ids)) == (2, list(range(21, 31)))
    assert operations.unfinished(_ID, 2, 10) == []


def test_a_resumed_operation_is_kept_whatever_its_age_and_purged_after_its_next_end(operations: SqlOperations) -> None:
    _four_chunks_of_ten(operations)
    operations.finish(_ID)
    assert operations.resume(_ID, 1, None) is not None
    later = datetime.now(UTC) + timedelta(days=1)
    assert operations.purge(later) == []
    operations.stop(_ID, OperationStatus.CANCELING, None)
    operations.finish(_ID)
    assert operations.purge(later) == [_ID]


def test_a_resume_takes_one_of_the_places_for_active_operations(database: Database) -> None:
    operations = SqlOperations(database, OperationLimits(in_all=2, per_caller=1))
    _create(operations, created_by="somebody")
    operations.stop(_ID, OperationStatus.CANCELING, None)
    ended = operations.finish(_ID)
    other = OperationId("0" * 31 + "2")
    _create(operations, other, created_by="somebody")
    with pytest.raises(TooManyOperations):
        operations.resume(_ID, 1, None)
    assert operations.get(_ID) == ended
    operations.stop(other, OperationStatus.CANCELING, None)
    operations.finish(other)
    assert operations.resume(_ID, 1, None) is not None
