"""The promises of `ports.OperationStore` about planning, claiming and committing chunks, as tests to inherit."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Generic

from dicom_depot.domain.export import PlannedChunk
from dicom_depot.domain.identifiers import parse_identifier
from dicom_depot.domain.operation import OperationError, OperationStatus
from dicom_depot.ports import ChunkPosition
from dicom_depot.testing.operations_contract import (
    OperationsT,
    claimed,
    failure,
    new_operation,
    outcome,
    planned,
)

_S = OperationStatus
_START = ChunkPosition(0, None, False, generation=1)
_THREADS = 8


class ChunkContract(Generic[OperationsT]):
    """What every OperationStore keeps of the chunks of its operations."""

    def make_operations(self) -> OperationsT:
        """An empty store of its own for the test that asks."""
        raise NotImplementedError

    def test_a_page_of_a_plan_is_appended_once(self) -> None:
        operations = self.make_operations()
        id_ = operations.create(new_operation()).id
        chunks = [PlannedChunk([1, 2, 3], 300), PlannedChunk([2**62], 2**50)]
        middle, end = ChunkPosition(2, "[7, null]", False, generation=1), ChunkPosition(3, None, True, generation=1)
        assert not operations.save_plan(id_, _START, chunks, [[], []], middle), "it does not run yet"
        operations.begin(id_)
        assert operations.save_plan(id_, _START, chunks, [[], []], middle)
        assert operations.plan_position(id_) == middle
        assert not operations.save_plan(id_, _START, chunks, [[], []], middle), "somebody else was faster"
        assert operations.get(id_).total == 4
        assert operations.save_plan(id_, middle, [PlannedChunk([9], 1)], [[]], end)
        operation = operations.get(id_)
        assert (operation.total, operation.bytes_total, operation.is_planned) == (5, 301 + 2**50, True)
        assert operations.plan_position(id_) == end
        assert [list(claimed(operations, id_, n).instance_ids) for n in range(3)] == [[1, 2, 3], [2**62], [9]]

    def test_of_planners_at_once_one_saves(self) -> None:
        operations = self.make_operations()
        id_ = planned(operations, is_planned=False)
        at = operations.plan_position(id_)
        together = threading.Barrier(_THREADS)

        def save(number: int) -> bool:
            together.wait()
            return operations.save_plan(
                id_, at, [PlannedChunk([number], 1)], [[]], ChunkPosition(1, f"{number}", False, generation=1)
            )

        with ThreadPoolExecutor(_THREADS) as pool:
            saved = list(pool.map(save, range(_THREADS)))
        assert saved.count(True) == 1
        assert operations.plan_position(id_).resume == f"{saved.index(True)}"
        assert list(claimed(operations, id_, 0).instance_ids) == [saved.index(True)]
        assert operations.get(id_).total == 1

    def test_an_empty_plan_is_a_plan(self) -> None:
        operations = self.make_operations()
        id_ = planned(operations)
        assert operations.get(id_).is_planned
        assert operations.is_settled(id_)
        assert operations.runnable(id_, 4) == []

    def test_unmatched_identifiers_are_done_at_once_each_with_its_line(self) -> None:
        operations = self.make_operations()
        id_ = planned(operations, 1, is_planned=False)
        unmatched = tuple(parse_identifier(each) for each in ("8", "9/9", "9/9/9"))
        lines = [failure(n, str(ref)) for n, ref in enumerate(unmatched)]
        chunks = [PlannedChunk([5], 10), PlannedChunk(unmatched=unmatched)]
        at = operations.plan_position(id_)
        assert operations.save_plan(id_, at, chunks, [[], lines], ChunkPosition(3, None, True, generation=1))
        operation = operations.get(id_)
        assert (operation.total, operation.skipped, operation.exported) == (5, 3, 0)
        assert operations.failures(id_, (-1, -1), 10) == [(2, line) for line in lines]
        assert operations.claim_chunk(id_, 1, 2) is None
        assert operations.runnable(id_, 10) == [0, 1]
        for number in (0, 1):
            assert operations.commit_chunk(claimed(operations, id_, number), outcome(1))
        operation = operations.finish(id_)
        assert operation.exported + operation.skipped == operation.total

    def test_a_chunk_may_be_queued_once_the_one_a_window_before_it_is_done(self) -> None:
        operations = self.make_operations()
        id_ = planned(operations, 1, 1, 1, 1, 1, 1)
        assert operations.runnable(id_, 2) == [0, 1]
        assert operations.runnable(id_, 10) == [0, 1, 2, 3, 4, 5]
        first, second = claimed(operations, id_, 0), claimed(operations, id_, 1)
        assert operations.runnable(id_, 2) == [0, 1], "a claimed one may have lost its process"
        operations.commit_chunk(second, outcome(1))
        assert operations.runnable(id_, 2) == [0, 3]
        operations.commit_chunk(first, outcome(1))
        assert operations.runnable(id_, 2) == [2, 3]
        assert operations.runnable(id_, 2, 3) == [3]
        assert operations.runnable(id_, 2, 2, 2) == [2]
        assert operations.runnable(id_, 2, 4, 4) == []
        assert operations.runnable(id_, 4, 4) == [4, 5]

    def test_counters_failures_and_the_state_move_together(self) -> None:
        operations = self.make_operations()
        id_ = planned(operations, 3, 2)
        assert operations.commit_chunk(claimed(operations, id_, 1), outcome(1, [failure(0)]))
        assert operations.commit_chunk(claimed(operations, id_, 0), outcome(1, [failure(0), failure(2)]))
        operation = operations.get(id_)
        assert (operation.exported, operation.skipped, operation.bytes_exported) == (2, 3, 20)
        assert operations.log_state(id_).failures == 3
        places = [(0, 0), (0, 2), (1, 0)]
        for limit in range(1, 5):
            found: list[tuple[int, int]] = []
            while page := operations.failures(id_, found[-1] if found else (-1, -1), limit):
                assert len(page) <= limit
                found += [(chunk, line.position) for chunk, line in page]
            assert found == places, "ordered by chunk and position, whatever was committed first"
        assert operations.failures(id_, (0, 1), 10) == [(0, failure(2)), (1, failure(0))]

    def test_a_commit_counts_once(self) -> None:
        operations = self.make_operations()
        id_ = planned(operations, 3)
        chunk = claimed(operations, id_, 0)
        assert operations.commit_chunk(chunk, outcome(2, [failure(1)]))
        assert not operations.commit_chunk(chunk, outcome(2, [failure(1)]))
        assert not operations.commit_chunk(chunk, outcome(3))
        assert operations.claim_chunk(id_, 1, 0) is None
        assert operations.claim_chunk(id_, 1, 1) is None
        assert (operations.get(id_).exported, operations.get(id_).skipped) == (2, 1)
        assert len(operations.failures(id_, (-1, -1), 10)) == 1

    def test_a_late_attempt_cannot_commit(self) -> None:
        operations = self.make_operations()
        id_ = planned(operations, 2)
        late, current = claimed(operations, id_, 0), claimed(operations, id_, 0)
        assert current.attempt > late.attempt
        assert not operations.commit_chunk(late, outcome(2, [failure(0)]))
        assert operations.get(id_).exported == 0
        assert operations.failures(id_, (-1, -1), 10) == []
        assert operations.commit_chunk(current, outcome(2))
        assert operations.get(id_).exported == 2

    def test_of_all_that_claimed_a_chunk_only_the_last_one_commits(self) -> None:
        operations = self.make_operations()
        id_ = planned(operations, 1)

        def claim_and_commit(_: int) -> tuple[int, bool]:
            chunk = operations.claim_chunk(id_, 1, 0)
            return (0, False) if chunk is None else (chunk.attempt, operations.commit_chunk(chunk, outcome(1)))

        with ThreadPoolExecutor(_THREADS) as pool:
            results = list(pool.map(claim_and_commit, range(_THREADS)))
        assert [is_committed for _, is_committed in results].count(True) == 1
        attempts = [attempt for attempt, _ in results if attempt]
        assert len(attempts) == len(set(attempts)), "two had the same attempt"
        assert max(results)[1], "another one than the last committed"
        assert operations.get(id_).exported == 1

    def test_what_was_stopped_although_the_operation_runs_is_planned_again(self) -> None:
        operations = self.make_operations()
        id_ = planned(operations, 2)
        chunk = claimed(operations, id_, 0)
        assert not operations.commit_chunk(chunk, outcome(1, is_complete=False))
        assert operations.get(id_).exported == 0
        assert operations.runnable(id_, 2) == [0]
        again = claimed(operations, id_, 0)
        assert not operations.commit_chunk(chunk, outcome(2))
        assert operations.commit_chunk(again, outcome(2))
        assert operations.get(id_).exported == 2

    def test_many_chunks_committed_at_once_add_up(self) -> None:
        operations = self.make_operations()
        id_ = planned(operations, *[3] * 40)

        def run(number: int) -> bool:
            chunk = claimed(operations, id_, number)
            return operations.commit_chunk(chunk, outcome(2, [failure(number % 3)]))

        with ThreadPoolExecutor(_THREADS) as pool:
            assert all(pool.map(run, range(40)))
        operation = operations.get(id_)
        assert (operation.exported, operation.skipped, operation.bytes_exported) == (80, 40, 800)
        assert operations.is_settled(id_)

    def test_what_is_settled(self) -> None:
        operations = self.make_operations()
        waiting = operations.create(new_operation()).id
        assert not operations.is_settled(waiting)
        assert not operations.is_settled(planned(operations, is_planned=False))
        id_ = planned(operations, 1, 1)
        first = claimed(operations, id_, 0)
        assert not operations.is_settled(id_)
        operations.commit_chunk(first, outcome(1))
        assert not operations.is_settled(id_)
        operations.commit_chunk(claimed(operations, id_, 1), outcome(1))
        assert operations.is_settled(id_)
        operations.finish(id_)
        assert not operations.is_settled(id_)

    def test_what_was_stopped_is_settled_when_nothing_is_in_flight(self) -> None:
        operations = self.make_operations()
        for into in (_S.CANCELING, _S.FAILING):
            error = OperationError("Code", "message") if into is _S.FAILING else None
            waiting = operations.create(new_operation()).id
            operations.stop(waiting, into, error)
            assert operations.is_settled(waiting)
            id_ = planned(operations, 3, 1, 1, is_planned=False)
            in_flight, lost = claimed(operations, id_, 0), claimed(operations, id_, 1)
            operations.stop(id_, into, error)
            assert operations.claim_chunk(id_, 1, 2) is None
            assert not operations.is_settled(id_)
            assert operations.commit_chunk(in_flight, outcome(1, [failure(2)], is_complete=False))
            assert not operations.is_settled(id_)
            assert operations.claim_chunk(id_, 1, 1) is None, "whoever takes it over finds that it stopped"
            assert operations.is_settled(id_)
            assert not operations.commit_chunk(lost, outcome(1))
            at = operations.plan_position(id_)
            assert not operations.save_plan(
                id_, at, [PlannedChunk([1], 1)], [[]], ChunkPosition(4, None, True, generation=1)
            )
            operation = operations.finish(id_)
            assert operation.status is (_S.FAILED if error else _S.CANCELED)
            assert (operation.exported, operation.skipped, operation.total) == (1, 1, 5)
            assert operations.claim_chunk(id_, 1, 0) is None
            assert operations.claim_chunk(id_, 1, 2) is None

    def test_a_chunk_that_ended_early_is_not_done(self) -> None:
        operations = self.make_operations()
        id_ = planned(operations, 2, 1)
        operations.commit_chunk(claimed(operations, id_, 1), outcome(1))
        stopped = claimed(operations, id_, 0)
        operations.stop(id_, _S.CANCELING, None)
        assert operations.commit_chunk(stopped, outcome(1, is_complete=False))
        assert operations.runnable(id_, 2) == []
        assert operations.get(id_).exported == 2
