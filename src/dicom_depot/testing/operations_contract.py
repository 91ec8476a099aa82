"""The promises of `ports.OperationStore`, as tests that every store inherits. See `testing.contracts` for how."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Generic, TypeVar

from dicom_depot.domain.errors import DepotError, IdempotencyKeyReused, NotFound
from dicom_depot.domain.export import (
    Answered,
    ChunkOutcome,
    ClaimedChunk,
    Everything,
    ExportFailure,
    Listed,
    Matching,
    PlannedChunk,
)
from dicom_depot.domain.identifiers import parse_identifier
from dicom_depot.domain.operation import OperationError, OperationId, OperationStatus, new_operation_id
from dicom_depot.domain.search import Level
from dicom_depot.ports import ChunkPosition, NewOperation, OperationStore

OperationsT = TypeVar("OperationsT", bound=OperationStore)

_S = OperationStatus
_START = ChunkPosition(0, None, False, generation=1)
_WHEN = datetime(2024, 5, 1, 10, 0, 0, 123456, tzinfo=UTC)
_ERROR = OperationError("AuthorizationFailure", "The destination refused the write.")
_LATER = timedelta(hours=1)
_THREADS = 8


def new_operation(**changes: object) -> NewOperation:
    """A new operation, of which a test may change what it is about."""
    content: dict[str, object] = {
        "id": new_operation_id(),
        "cutoff": 7,
        "source": listed("1.2.3"),
        "destination": {"type": "azureBlob", "public": {"container": "out"}},
        "sealed_secret": "sealed",
        "log_href": "http://host/out/errors.log",
        "log_etag": '"1"',
        "fingerprint": "fingerprint",
        "idempotency_key": None,
    }
    return NewOperation(**(content | changes))  # type: ignore[arg-type]  # the fields' types are the caller's care


def listed(*identifiers: str) -> Listed:
    return Listed(tuple(map(parse_identifier, identifiers)))


def failure(position: int, identifier: str = "1/2/3") -> ExportFailure:
    return ExportFailure(position, identifier, "Conflict", f"Conflict: ü line {position}", _WHEN)


class OperationStoreContract(Generic[OperationsT]):
    """What every OperationStore keeps. `ChunkContract` has the rest."""

    def make_operations(self) -> OperationsT:
        """An empty store of its own for the test that asks."""
        raise NotImplementedError

    def test_what_was_created_is_there_as_given(self) -> None:
        operations = self.make_operations()
        before = datetime.now(UTC)
        new = new_operation(source=listed("2", "1", "2", "1/2/3"), idempotency_key="key")
        created = operations.create(new)
        assert created == operations.get(new.id)
        assert (created.id, created.status, created.cutoff) == (new.id, _S.NOT_STARTED, 7)
        assert before <= created.created_at == created.updated_at <= datetime.now(UTC)
        assert (created.ended_at, created.error, created.is_planned) == (None, None, False)
        counts = (created.total, created.exported, created.skipped, created.bytes_total, created.bytes_exported)
        assert counts == (0, 0, 0, 0, 0)
        assert (created.log_href, created.destination) == (new.log_href, new.destination)
        assert operations.source(new.id) == new.source
        assert operations.sealed_secret(new.id) == "sealed"
        assert operations.plan_position(new.id) == _START
        state = operations.log_state(new.id)
        assert (state.etag, state.lines_written, state.bytes_written, state.failures) == ('"1"', 0, 0, 0)

    def test_the_source_may_be_everything_or_very_many_identifiers(self) -> None:
        operations = self.make_operations()
        for source in (Everything(), listed(*(f"1.2.{n}/3" for n in range(100_000)))):
            id_ = operations.create(new_operation(source=source)).id
            assert operations.source(id_) == source

    def test_a_query_is_kept_with_its_answer(self) -> None:
        operations = self.make_operations()
        asked = Matching(Level.INSTANCE, {"PatientName": "Dö*", "00091001": 'a"b'}, is_fuzzy=True)
        for series_ids, tag_ids in (((), ()), ((1, 7, 1 << 40), (3,)), (range(1, 300_000, 2), (3, 70))):
            id_ = operations.create(new_operation(source=Answered(asked, series_ids, tag_ids))).id
            kept = operations.source(id_)
            assert isinstance(kept, Answered)
            assert kept.asked == asked
            assert (list(kept.series_ids), kept.tag_ids) == (list(series_ids), tag_ids)

    def test_an_unknown_operation_is_not_found(self) -> None:
        operations = self.make_operations()
        unknown = new_operation_id()
        asked: list[Callable[[], object]] = [
            lambda: operations.get(unknown),
            lambda: operations.source(unknown),
            lambda: operations.sealed_secret(unknown),
            lambda: operations.begin(unknown),
            lambda: operations.plan_position(unknown),
            lambda: operations.save_plan(unknown, _START, [], [], _START),
            lambda: operations.stop(unknown, _S.CANCELING, None),
            lambda: operations.is_settled(unknown),
            lambda: operations.log_state(unknown),
            lambda: operations.finish(unknown),
        ]
        for ask in asked:
            _refusal(NotFound, ask)
        assert operations.claim_chunk(unknown, 1, 0) is None
        assert operations.statuses([unknown]) == {}
        assert operations.failures(unknown, (-1, -1), 10) == []
        assert operations.runnable(unknown, 4) == []

    def test_a_key_names_the_operation_that_was_created_first(self) -> None:
        operations = self.make_operations()
        first = operations.create(new_operation(idempotency_key="key", fingerprint="one"))
        assert operations.create(new_operation(idempotency_key="key", fingerprint="one")) == first
        assert operations.find_by_key("key", "one") == first
        for ask in (
            lambda: operations.create(new_operation(idempotency_key="key", fingerprint="two")),
            lambda: operations.find_by_key("key", "two"),
        ):
            assert _refusal(IdempotencyKeyReused, ask).target == "Idempotency-Key"
        assert operations.find_by_key("other", "one") is None
        assert operations.page(10, None, None) == [first]
        operations.stop(first.id, _S.CANCELING, None)
        operations.finish(first.id)
        assert operations.create(new_operation(idempotency_key="key", fingerprint="one")).status is _S.CANCELED

    def test_without_a_key_equal_specifications_are_different_operations(self) -> None:
        operations = self.make_operations()
        assert len({operations.create(new_operation()).id for _ in range(3)}) == 3
        assert len(operations.page(10, None, None)) == 3

    def test_of_equal_requests_at_once_one_is_recorded(self) -> None:
        operations = self.make_operations()
        together = threading.Barrier(_THREADS)

        def create(_: int) -> OperationId:
            new = new_operation(idempotency_key="key")
            together.wait()
            return operations.create(new).id

        with ThreadPoolExecutor(_THREADS) as pool:
            assert len(set(pool.map(create, range(_THREADS)))) == 1
        assert len(operations.page(10, None, None)) == 1

    def test_begin_starts_once_and_revives_nothing(self) -> None:
        operations = self.make_operations()
        id_ = operations.create(new_operation()).id
        assert operations.begin(id_) is operations.begin(id_) is operations.get(id_).status is _S.RUNNING
        operations.stop(id_, _S.CANCELING, None)
        assert operations.begin(id_) is _S.CANCELING
        operations.finish(id_)
        assert operations.begin(id_) is _S.CANCELED

    def test_stop_moves_only_what_runs_and_the_first_order_stays(self) -> None:
        operations = self.make_operations()
        new = operations.create(new_operation()).id
        assert operations.stop(new, _S.CANCELING, None).status is _S.CANCELING
        assert operations.stop(new, _S.FAILING, _ERROR) == operations.get(new)
        assert (operations.get(new).status, operations.get(new).error) == (_S.CANCELING, None)
        running = _running(operations)
        stopped = operations.stop(running, _S.FAILING, _ERROR)
        assert (stopped.status, stopped.error) == (_S.FAILING, _ERROR)
        assert operations.stop(running, _S.CANCELING, None).status is _S.FAILING
        assert operations.finish(running).status is _S.FAILED
        assert operations.stop(running, _S.CANCELING, None).status is _S.FAILED
        assert operations.get(running).error == _ERROR

    def test_finish_enters_the_state_that_belongs_and_erases_the_secret(self) -> None:
        operations = self.make_operations()
        for into, terminal in ((None, _S.SUCCEEDED), (_S.FAILING, _S.FAILED), (_S.CANCELING, _S.CANCELED)):
            id_ = _running(operations)
            if into is not None:
                operations.stop(id_, into, _ERROR if into is _S.FAILING else None)
            assert operations.sealed_secret(id_) == "sealed"
            ended = operations.finish(id_)
            assert ended.status is terminal
            assert ended.ended_at is not None
            assert operations.sealed_secret(id_) is None
            assert operations.finish(id_) == ended, "finishing again changes nothing"
        waiting = operations.create(new_operation()).id
        assert operations.finish(waiting).status is _S.NOT_STARTED
        assert operations.sealed_secret(waiting) == "sealed"

    def test_pages_are_newest_first_and_hold_each_operation_once(self) -> None:
        operations = self.make_operations()
        ids = [operations.create(new_operation()).id for _ in range(9)]
        running, canceled = ids[::2], ids[1::2]
        for id_ in running:
            operations.begin(id_)
        for id_ in canceled:
            operations.stop(id_, _S.CANCELING, None)
        whole = operations.page(100, None, None)
        assert {each.id for each in whole} == set(ids)
        assert whole == sorted(whole, key=lambda each: (each.created_at, each.id), reverse=True)
        for status, expected in (
            (None, ids),
            (frozenset({_S.RUNNING}), running),
            (frozenset({_S.CANCELING, _S.FAILED}), canceled),
            (frozenset({_S.FAILED}), []),
            (frozenset(_S), ids),
        ):
            for limit in range(1, 11):
                found: list[OperationId] = []
                before = None
                while page := operations.page(limit, before, status):
                    assert len(page) <= limit
                    found += [each.id for each in page]
                    before = (page[-1].created_at, page[-1].id)
                assert found == [each.id for each in whole if each.id in expected]

    def test_active_operations_and_the_oldest_cutoff_that_they_need(self) -> None:
        operations = self.make_operations()
        assert (operations.active(), operations.oldest_active_cutoff()) == ([], None)
        waiting = operations.create(new_operation(cutoff=30)).id
        running = _running(operations, cutoff=20)
        failing = _running(operations, cutoff=10)
        operations.stop(failing, _S.FAILING, _ERROR)
        assert (operations.active(), operations.oldest_active_cutoff()) == ([waiting, running, failing], 10)
        operations.finish(failing)
        assert (operations.active(), operations.oldest_active_cutoff()) == ([waiting, running], 20)
        assert operations.statuses([failing, waiting]) == {failing: _S.FAILED, waiting: _S.NOT_STARTED}

    def test_what_was_written_to_the_log_is_remembered(self) -> None:
        operations = self.make_operations()
        id_ = _running(operations)
        before = datetime.now(UTC)
        for etag, lines, size in (('"2"', 5, 500), (None, 6, 1 << 40)):
            operations.save_log_state(id_, etag, lines, size)
            state = operations.log_state(id_)
            assert (state.etag, state.lines_written, state.bytes_written) == (etag, lines, size)
            assert before <= state.written_at <= datetime.now(UTC)

    def test_purge_removes_what_ended_before_a_time_with_all_that_belongs_to_it(self) -> None:
        operations = self.make_operations()
        ended, running = _running(operations, idempotency_key="key"), _running(operations)
        for id_ in (ended, running):
            unmatched = PlannedChunk(unmatched=(parse_identifier("9"),))
            operations.save_plan(id_, _START, [unmatched], [[failure(0)]], ChunkPosition(1, None, True, generation=1))
        operations.finish(ended)
        assert operations.purge(datetime.now(UTC) - _LATER) == []
        assert operations.purge(datetime.now(UTC) + _LATER) == [ended]
        assert operations.purge(datetime.now(UTC) + _LATER) == []
        _refusal(NotFound, lambda: operations.get(ended))
        assert operations.failures(ended, (-1, -1), 10) == []
        assert len(operations.failures(running, (-1, -1), 10)) == 1
        assert operations.find_by_key("key", "fingerprint") is None


ErrorT = TypeVar("ErrorT", bound=DepotError)


def _refusal(kind: type[ErrorT], call: Callable[[], object]) -> ErrorT:
    try:
        call()
    except kind as error:
        return error
    raise AssertionError(f"{kind.__name__} was not raised")


def _running(operations: OperationStore, **changes: object) -> OperationId:
    id_ = operations.create(new_operation(**changes)).id
    operations.begin(id_)
    return id_


def planned(operations: OperationStore, *sizes: int, is_planned: bool = True) -> OperationId:
    """A running operation with a chunk of that many instances for each size."""
    id_ = _running(operations)
    chunks = [PlannedChunk(range(1, size + 1), 10 * size) for size in sizes]
    assert operations.save_plan(
        id_, _START, chunks, [[]] * len(sizes), ChunkPosition(len(sizes), "more", is_planned, generation=1)
    )
    return id_


def claimed(operations: OperationStore, id_: OperationId, number: int) -> ClaimedChunk:
    chunk = operations.claim_chunk(id_, 1, number)
    assert chunk is not None
    return chunk


def outcome(exported: int, failures: Sequence[ExportFailure] = (), *, is_complete: bool = True) -> ChunkOutcome:
    return ChunkOutcome(exported, 10 * exported, list(failures), is_complete)
