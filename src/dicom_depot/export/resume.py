"""Resuming an operation that failed or was canceled: what must hold before it may run again.

Nothing is changed before every check has passed, but for the error log: it is written once more, with the same lines,
as the proof that the destination can be written to.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import assert_never

from dicom_depot.domain.access import ANONYMOUS, Caller
from dicom_depot.domain.errors import (
    Conflict,
    DestinationDiffers,
    DestinationFault,
    DestinationRefused,
    FaultKind,
    InstancesSwept,
    SecretErased,
    ServiceUnavailable,
    SourceFault,
)
from dicom_depot.domain.export import DestinationSpec
from dicom_depot.domain.operation import Operation, OperationId, OperationStatus, OperationType, unknown_operation
from dicom_depot.export.error_log import ErrorLog
from dicom_depot.export.planner import Planner
from dicom_depot.export.service import begin
from dicom_depot.export.trail import NO_TRAIL, record_resume
from dicom_depot.ports import (
    AuditTrail,
    BlobStore,
    DestinationFactory,
    DurableEngine,
    InstanceIndex,
    OperationStore,
    SecretBox,
)

_log = logging.getLogger(__name__)

_CHUNKS_IN_PAGE = 16


@dataclass(slots=True)
class ResumeService:
    """Lets ended operations run again. One per process.

    hold_sweeps: keeps deleted instances from being swept, in a block that relies on those that are still there.
    """

    index: InstanceIndex
    store: BlobStore
    operations: OperationStore
    destinations: DestinationFactory
    secrets: SecretBox
    planner: Planner
    engine: DurableEngine
    hold_sweeps: Callable[[], AbstractContextManager[None]]
    audit: AuditTrail = NO_TRAIL
    _at_hand: set[OperationId] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def resume(
        self, operation_id: OperationId, given: DestinationSpec | None = None, caller: Caller = ANONYMOUS
    ) -> Operation:
        """Let a failed or canceled operation go on where it stopped. When this returns, it will run to its end.

        given: the operation's destination once more, needed where a secret was erased. Raises NotFound (also for an
        operation that the caller may not see), Conflict, DestinationDiffers, SecretErased, InstancesSwept,
        QueryTagGone, DestinationRefused, TooManyOperations; the operation then stays as it is.
        """
        operation = self.operations.get(operation_id)
        if not caller.may_see(operation.created_by):
            raise unknown_operation(operation_id)
        with self._alone_with(operation_id), self.hold_sweeps():
            operation = self.operations.get(operation_id)
            _require_ended_early(operation)
            self._require_instances(operation)
            if not operation.is_planned:
                self.planner.require_plannable(operation_id)
            self.operations.ensure_room(operation.created_by)
            sealed = self._signed_in(operation, given) if operation.type is OperationType.EXPORT else None
            resumed = self.operations.resume(operation_id, operation.generation, sealed)
            if resumed is None:  # another process was faster
                _require_ended_early(self.operations.get(operation_id))
                raise Conflict("Another request resumed the operation, and it has ended again.", target="operationId")
        record_resume(self.audit, resumed, caller)
        _log.info("operation %s resumed as generation %d", operation_id, resumed.generation)
        begin(self.engine, resumed)
        return resumed

    @contextmanager
    def _alone_with(self, operation_id: OperationId) -> Iterator[None]:
        """Two requests at once would write the log over each other's; the second one is turned away."""
        with self._lock:
            if operation_id in self._at_hand:
                raise Conflict("Another request is resuming this operation.", target="operationId")
            self._at_hand.add(operation_id)
        try:
            yield
        finally:
            with self._lock:
                self._at_hand.discard(operation_id)

    def _require_instances(self, operation: Operation) -> None:
        """What was planned is exported as planned, or not at all: rows and bytes may be gone since the end."""
        swept = InstancesSwept(
            "Instances that this operation has yet to copy were deleted and removed for good after it had ended. "
            "Start a new export for what is stored now.",
            target="operationId",
        )
        if not operation.is_planned and self.index.forgotten_up_to() > operation.cutoff:
            raise swept  # of what was not planned yet nobody knows whether it was among them
        after = -1
        while chunks := self.operations.unfinished(operation.id, after, _CHUNKS_IN_PAGE):
            for _, instance_ids in chunks:
                rows = self.index.remaining(instance_ids)
                # Sweeping takes the bytes first: a crash between the two leaves a row without them.
                if rows.row_count < len(instance_ids) or not all(map(self._has_bytes, rows.deleted_keys)):
                    raise swept
            after = chunks[-1][0]

    def _has_bytes(self, store_key: str) -> bool:
        try:
            next(iter(self.store.stream(store_key, 1)), None)
        except SourceFault as fault:
            if fault.kind is FaultKind.INSTANCE:
                return False
            raise ServiceUnavailable(f"The store cannot be read: {fault.message}") from fault
        return True

    def _signed_in(self, operation: Operation, given: DestinationSpec | None) -> str | None:
        """Prove that the destination can be written to, and return its secret, sealed."""
        spec = _destination(operation, given)
        self._prove_writable(operation.id, spec)
        return None if spec.secret is None else self.secrets.seal(spec.secret, operation.id)

    def _prove_writable(self, operation_id: OperationId, spec: DestinationSpec) -> None:
        destination = self.destinations.open(spec)
        try:
            ErrorLog(self.operations, operation_id, destination).rewrite()
        except DestinationFault as fault:
            raise DestinationRefused(fault.message, code=fault.code, target="destination.settings") from None
        finally:
            destination.close()


def _require_ended_early(operation: Operation) -> None:
    match operation.status:
        case OperationStatus.FAILED | OperationStatus.CANCELED:
            return
        case OperationStatus.NOT_STARTED | OperationStatus.RUNNING:
            reason = "The operation is running already."
        case OperationStatus.FAILING | OperationStatus.CANCELING:
            reason = "The operation is still stopping. Resume it when it has ended."
        case OperationStatus.SUCCEEDED:
            reason = "The operation succeeded: there is nothing to resume."
        case _:
            assert_never(operation.status)
    raise Conflict(reason, target="operationId")


def _destination(operation: Operation, given: DestinationSpec | None) -> DestinationSpec:
    """The operation's destination, signed in with what was given. Raises DestinationDiffers, SecretErased."""
    type_, public = str(operation.destination["type"]), operation.destination["public"]
    assert isinstance(public, dict)
    if given is None:
        if operation.destination.get("has_secret"):
            raise SecretErased(
                "The secret that signed this operation in to its destination was erased when it ended. Send "
                '{"destination": {"type", "settings"}} again, with a fresh one for the same account and container.',
                target="destination",
            )
        return DestinationSpec(type_, public)
    if (given.type, given.public) != (type_, public):
        raise DestinationDiffers(
            f"The operation exports to {_shown(type_, public)}; what was given is {_shown(given.type, given.public)}. "
            "A resumed operation goes on where it began; to export elsewhere, start a new one.",
            target="destination.settings",
        )
    return given


def _shown(type_: str, public: dict[str, str]) -> str:
    parts = (f"{name} '{value}'" for name, value in sorted(public.items()))
    return f"{type_} ({', '.join(parts)})"
