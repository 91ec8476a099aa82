"""The durable steps of an operation: plan a page, run a chunk, finish. Each may run twice, or stop anywhere and run
again, without changing how the operation ends. The engine decides when they run; this module what they do.

A step belongs to a generation of its operation. One that comes late, after the operation was resumed, does nothing.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass
from datetime import datetime
from typing import NamedTuple, TypeVar

from dicom_depot.domain.errors import (
    DepotError,
    Fault,
    FaultKind,
    NotFound,
    ServiceUnavailable,
    StorageFull,
)
from dicom_depot.domain.export import ClaimedChunk, DestinationSpec
from dicom_depot.domain.operation import Operation, OperationError, OperationId, OperationStatus, OperationType
from dicom_depot.export.copier import CopyPool, ExportWatch, copy_chunk
from dicom_depot.export.error_log import ErrorLog, is_untouched
from dicom_depot.export.planner import Planner
from dicom_depot.export.trail import NO_TRAIL, record_end
from dicom_depot.ports import (
    AuditTrail,
    BlobStore,
    Destination,
    DestinationFactory,
    InstanceIndex,
    OperationStore,
    Reindexer,
    SecretBox,
)

_log = logging.getLogger(__name__)

_T = TypeVar("_T")

WATCH_SECONDS = 0.5
LAST_LOG_SECONDS = {OperationStatus.CANCELING: 2.0, OperationStatus.FAILING: 30.0}
"""How long the last write of its log may hold up an operation that was canceled or failed."""
_OWN_TROUBLE_PAUSE_SECONDS = 5.0
_ENDS_REMEMBERED = 1000


class StepResult(NamedTuple):
    """What follows from a step: chunks to queue, and whether only the finish is missing."""

    queue: list[int]
    is_settled: bool


@dataclass(slots=True)
class _OpenExport:
    """What the steps of one running operation share in this process."""

    destination: Destination
    watch: ExportWatch
    log: ErrorLog


class ExportRunner:
    """Runs the steps of operations. One per process; safe for many threads."""

    def __init__(
        self,
        *,
        index: InstanceIndex,
        operations: OperationStore,
        store: BlobStore,
        destinations: DestinationFactory,
        secrets: SecretBox,
        planner: Planner,
        pool: CopyPool,
        reindexer: Reindexer,
        retry_seconds: float,
        window: int,
        audit: AuditTrail = NO_TRAIL,
    ) -> None:
        """window: chunks of one operation that may be queued or running at the same time."""
        self._index = index
        self._operations = operations
        self._store = store
        self._destinations = destinations
        self._secrets = secrets
        self._planner = planner
        self._pool = pool
        self._reindexer = reindexer
        self._retry_seconds = retry_seconds
        self._window = window
        self._audit = audit
        self._ends_recorded: deque[tuple[OperationId, datetime | None]] = deque(maxlen=_ENDS_REMEMBERED)
        self._open: dict[tuple[OperationId, int], _OpenExport] = {}
        self._opening = threading.Lock()
        self._turns: dict[OperationId, threading.Lock] = {}
        self._closed = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="export-watch", daemon=True)
        self._watcher.start()

    def generation(self, operation_id: OperationId) -> int:
        """The present generation of an operation; 0 when it was purged."""
        return self._insist(operation_id, None, lambda: self._operations.get(operation_id).generation, gone=0)

    def begin(self, operation_id: OperationId, generation: int) -> StepResult:
        """Set a new operation running, or find where one that was interrupted or resumed stands."""
        nothing: list[int] = []

        def begun() -> list[int]:
            self._operations.begin(operation_id)
            if not self._is_current(operation_id, generation):
                return nothing
            return self._operations.runnable(operation_id, self._window)

        queue = self._guarded(operation_id, generation, begun, failed=nothing, gone=nothing)
        return StepResult(queue, self.is_settled(operation_id, generation))

    def plan(self, operation_id: OperationId, generation: int) -> StepResult | None:
        """Plan one page; None when there is nothing more to plan."""

        def page() -> StepResult | None:
            first = self._planner.plan_page(operation_id, generation)
            if first is None:
                return None
            queue = self._operations.runnable(operation_id, self._window, first)
            return StepResult(queue, self._operations.is_settled(operation_id))

        return self._guarded(operation_id, generation, page, failed=None, gone=None)

    def run_chunk(self, operation_id: OperationId, generation: int, number: int) -> StepResult:
        """Copy one chunk and account for it."""
        nothing: list[int] = []
        queue = self._guarded(
            operation_id,
            generation,
            lambda: self._run_chunk(operation_id, generation, number),
            failed=None,
            gone=nothing,
        )
        if queue is None:
            # The chunk is still ours. Claiming it for an operation that fails gives it up, so that this one can end.
            self._insist(
                operation_id,
                generation,
                lambda: self._operations.claim_chunk(operation_id, generation, number) is None,
                gone=True,
            )
        return StepResult(queue or nothing, self.is_settled(operation_id, generation))

    def is_settled(self, operation_id: OperationId, generation: int) -> bool:
        """Whether only `finish` is missing."""
        return self._insist(
            operation_id,
            generation,
            lambda: self._is_current(operation_id, generation) and self._operations.is_settled(operation_id),
            gone=False,
        )

    def finish(self, operation_id: OperationId, generation: int) -> None:
        """Complete the log, then enter the terminal state and erase the secret."""
        ended: list[Operation] = []
        self._insist(operation_id, generation, lambda: self._finish(operation_id, generation, ended), gone=True)
        self._record_end(operation_id, generation, ended)

    def stop(self, operation_id: OperationId, generation: int) -> None:
        """Let the copies of an operation in this process stop now, instead of when the watch notices. A generation that
        began since is not meant.
        """
        for (of, number), opened in list(self._open.items()):
            if of == operation_id and number <= generation:
                opened.watch.stop.set()

    def close(self) -> None:
        """Stop all copies without ending their operations: they go on in the next process."""
        self._closed.set()
        for opened in list(self._open.values()):
            opened.watch.stop.set()
        self._pool.close()

    def _is_current(self, operation_id: OperationId, generation: int) -> bool:
        return self._operations.get(operation_id).generation == generation

    def _run_chunk(self, operation_id: OperationId, generation: int, number: int) -> list[int]:
        chunk = self._operations.claim_chunk(operation_id, generation, number)
        if chunk is not None:
            match self._operations.get(operation_id).type:
                case OperationType.EXPORT:
                    self._copy_chunk(chunk, generation)
                case OperationType.REINDEX:
                    self._index_chunk(chunk)
        if not self._is_current(operation_id, generation):
            return []
        following = number + self._window
        return self._operations.runnable(operation_id, self._window, following, following)

    def _copy_chunk(self, chunk: ClaimedChunk, generation: int) -> None:
        operation_id = chunk.operation_id
        opened = self._opened(operation_id, generation)
        objects = self._index.fetch(chunk.instance_ids)
        if len(objects) != len(chunk.instance_ids):
            raise RuntimeError("index rows of planned instances are missing")
        outcome, fault = copy_chunk(operation_id, objects, self._store, opened.destination, self._pool, opened.watch)
        if self._closed.is_set() and not outcome.is_complete:
            raise Interrupted
        if fault is not None:
            self._fail(operation_id, generation, OperationError(fault.code, fault.message))
        self._operations.commit_chunk(chunk, outcome)
        if outcome.failures and outcome.is_complete:
            opened.log.refresh()

    def _index_chunk(self, chunk: ClaimedChunk) -> None:
        def is_stopped() -> bool:
            if self._closed.is_set():
                raise Interrupted
            statuses = self._operations.statuses([chunk.operation_id])
            return statuses.get(chunk.operation_id) is not OperationStatus.RUNNING

        outcome = self._reindexer.index(chunk.operation_id, chunk.instance_ids, is_stopped)
        self._operations.commit_chunk(chunk, outcome)

    def _finish(self, operation_id: OperationId, generation: int, ended: list[Operation]) -> bool:
        """True when the operation has ended, which is then added to `ended`; false when it must not yet."""
        if not self._is_current(operation_id, generation) or not self._operations.is_settled(operation_id):
            return False
        before = self._operations.get(operation_id)
        if before.type is OperationType.REINDEX:
            if before.status is OperationStatus.RUNNING:
                self._reindexer.complete(operation_id)
        elif not is_untouched(self._operations.log_state(operation_id)):
            try:
                self._complete_log(operation_id, generation)
            except (NotFound, ServiceUnavailable, StorageFull):
                raise
            except Exception as error:
                # Without its log an operation has not succeeded; one that failed or was canceled ends all the same.
                self._fail(operation_id, generation, self._explained(operation_id, error))
        operation = self._operations.finish(operation_id)
        ended.append(operation)
        self._let_go(operation_id, generation)
        self._turns.pop(operation_id, None)
        _log.info(
            "operation %s ended: %s, %d exported, %d skipped of %d, %d bytes%s",
            operation_id,
            operation.status,
            operation.exported,
            operation.skipped,
            operation.total,
            operation.bytes_exported,
            f" ({operation.error.code})" if operation.error else "",
        )
        return True

    def _record_end(self, operation_id: OperationId, generation: int, ended: list[Operation]) -> None:
        """One audit line for an end. A process that dies between the end and its line runs this step again; one that
        dies right after the line writes it a second time: at least once, and nearly always once.
        """
        operation = (
            ended[0]
            if ended
            else self._guarded(
                operation_id, generation, lambda: self._operations.get(operation_id), failed=None, gone=None
            )
        )
        if operation is None or not operation.status.is_terminal:
            return
        end = (operation_id, operation.ended_at)
        if end not in self._ends_recorded:
            self._ends_recorded.append(end)
            record_end(self._audit, operation)

    def _complete_log(self, operation_id: OperationId, generation: int) -> None:
        """Write the log as it stays. A request that hangs holds up a success, but not a failure or a cancellation:
        the log of those is given a little time, and is written late or not at all when that is over.
        """
        opened = self._opened(operation_id, generation)
        written: Future[None] = Future()

        def write() -> None:
            try:
                self._write_last_log(operation_id, opened)
            except BaseException as error:
                written.set_exception(error)
            else:
                written.set_result(None)

        threading.Thread(target=write, name="last-log", daemon=True).start()
        stopped_at = None
        while not wait([written], timeout=0.1).done:
            if self._closed.is_set():
                raise Interrupted
            if opened.watch.stop.is_set():
                stopped_at = stopped_at or time.monotonic()
                seconds = LAST_LOG_SECONDS.get(self._operations.get(operation_id).status)
                if seconds is not None and time.monotonic() > stopped_at + seconds:
                    _log.warning("operation %s ends without its complete error log", operation_id)
                    return
        written.result()

    def _write_last_log(self, operation_id: OperationId, opened: _OpenExport) -> None:
        tries = 0
        while not opened.log.is_given_up:
            try:
                opened.log.complete()
            except Fault as fault:
                is_ending = self._operations.get(operation_id).status is not OperationStatus.RUNNING
                if fault.kind is not FaultKind.TRANSIENT or (is_ending and tries >= 3):
                    raise
                opened.watch.wait_before_retry(fault, tries)
                tries += 1
                if self._closed.is_set():
                    raise Interrupted from None
            else:
                return

    def _fail(self, operation_id: OperationId, generation: int | None, error: OperationError) -> None:
        operation = self._patiently(
            operation_id, lambda: self._operations.stop(operation_id, OperationStatus.FAILING, error, generation)
        )
        if generation in (None, operation.generation):
            self.stop(operation_id, operation.generation)

    def _opened(self, operation_id: OperationId, generation: int) -> _OpenExport:
        """What the steps of one generation share. The next one signs in anew and has its own order to stop."""
        key = (operation_id, generation)
        with self._opening:
            turn = self._turns.setdefault(operation_id, threading.Lock())
        with turn:  # opening may take seconds, and is no reason for other operations to wait
            opened = self._open.get(key)
            if opened is None:
                self._let_go(operation_id, generation - 1)
                destination = self._destinations.open(self._destination_spec(operation_id))
                log = ErrorLog(self._operations, operation_id, destination)
                watch = ExportWatch(self._retry_seconds, self._pool.share(), self._pool.pace())
                opened = _OpenExport(destination, watch, log)
                with self._opening:
                    self._open[key] = opened
            return opened

    def _let_go(self, operation_id: OperationId, generation: int) -> None:
        """Stop and close what this generation and earlier ones opened."""
        with self._opening:
            left = [key for key in self._open if key[0] == operation_id and key[1] <= generation]
            closing = [self._open.pop(key) for key in left]
        for opened in closing:
            opened.watch.stop.set()
            opened.log.give_up()
            opened.destination.close()

    def _destination_spec(self, operation_id: OperationId) -> DestinationSpec:
        recorded = self._operations.get(operation_id).destination
        sealed = self._operations.sealed_secret(operation_id)
        secret = None if sealed is None else self._secrets.open(sealed, operation_id)
        public = recorded["public"]
        assert isinstance(public, dict)
        return DestinationSpec(str(recorded["type"]), public, secret)

    def _guarded(
        self, operation_id: OperationId, generation: int | None, step: Callable[[], _T], *, failed: _T, gone: _T
    ) -> _T:
        """Run a step. An error that no rule covers fails the operation, with the whole story in the service's log,
        instead of leaving it hanging; the answer is then `failed`. It is `gone` when the operation was purged.
        """
        try:
            try:
                return self._patiently(operation_id, step)
            except NotFound:
                return gone
            except Exception as error:
                self._fail(operation_id, generation, self._explained(operation_id, error))
                return failed
        except NotFound:
            return gone

    def _insist(self, operation_id: OperationId, generation: int | None, step: Callable[[], _T], *, gone: _T) -> _T:
        """Run a step without which an operation would never end: after an error the operation fails, and the step is
        run again.
        """
        while True:
            answer = self._guarded(operation_id, generation, step, failed=None, gone=gone)
            if answer is not None:
                return answer
            if self._closed.wait(_OWN_TROUBLE_PAUSE_SECONDS):
                raise Interrupted

    def _patiently(self, operation_id: OperationId, step: Callable[[], _T]) -> _T:
        """Wait out trouble of ours that may pass: a busy or full database."""
        while True:
            try:
                return step()
            except (ServiceUnavailable, StorageFull) as error:
                _log.error("operation %s waits: %s", operation_id, error)
                if self._closed.wait(_OWN_TROUBLE_PAUSE_SECONDS):
                    raise Interrupted from error

    def _explained(self, operation_id: OperationId, error: Exception) -> OperationError:
        """The operation's error for an exception of ours. While the process is closing, none means anything."""
        if self._closed.is_set():
            raise Interrupted from error
        if isinstance(error, DepotError):
            return OperationError(error.code, error.message)
        _log.error("operation %s fails because of an error of the service", operation_id, exc_info=error)
        return OperationError("InternalError", "An error of the service; its log has the details.")

    def _watch(self) -> None:
        """Pass on the order to stop to the copies of operations that no longer run."""
        while not self._closed.wait(WATCH_SECONDS):
            try:
                self._stop_copies()
            except Exception:
                _log.exception("the watch over running operations could not look; it tries again")

    def _stop_copies(self) -> None:
        running = [(id_, opened) for (id_, _), opened in list(self._open.items()) if not opened.watch.stop.is_set()]
        if running:
            statuses = self._operations.statuses([operation_id for operation_id, _ in running])
            for operation_id, opened in running:
                if statuses.get(operation_id) is not OperationStatus.RUNNING:
                    opened.watch.stop.set()


class Interrupted(BaseException):
    """This process is shutting down in the middle of a step; the next one runs the step again.

    Not an Exception, so that nothing takes it for the step's failure.
    """
