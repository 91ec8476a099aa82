"""What callers can do with exports: start, dry-run, look up, list, cancel."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from datetime import datetime

from dicom_depot.domain.access import ANONYMOUS, Action, Caller
from dicom_depot.domain.errors import (
    Conflict,
    DestinationFault,
    DestinationRefused,
    FaultKind,
    InvalidRequest,
)
from dicom_depot.domain.export import ExportSpecification, Listed, log_key
from dicom_depot.domain.operation import (
    Operation,
    OperationId,
    OperationStatus,
    new_operation_id,
    unknown_operation,
)
from dicom_depot.export.planner import DryRun, Planner
from dicom_depot.export.runner import ExportRunner
from dicom_depot.export.trail import NO_TRAIL, record_start
from dicom_depot.ports import (
    AuditTrail,
    Destination,
    DestinationFactory,
    DurableEngine,
    LogOutdated,
    NewOperation,
    OperationStore,
    SecretBox,
)

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class ExportService:
    """The export API without HTTP.

    Who asks is ANONYMOUS unless said otherwise: who runs a command on the data folder may do everything.
    """

    operations: OperationStore
    destinations: DestinationFactory
    secrets: SecretBox
    planner: Planner
    runner: ExportRunner
    engine: DurableEngine
    identifiers_max: int
    audit: AuditTrail = NO_TRAIL

    def start(
        self, specification: ExportSpecification, idempotency_key: str | None = None, caller: Caller = ANONYMOUS
    ) -> Operation:
        """Record and begin an export. When this returns, the operation will run to its end, whatever dies.

        Raises InvalidRequest, DestinationRefused, TooManyOperations, QueryTagGone (all before anything remains
        anywhere), IdempotencyKeyReused.
        """
        self._check(specification)
        fingerprint = specification.fingerprint()
        key_of_caller = None if idempotency_key is None else _scoped(idempotency_key, caller)
        if key_of_caller is not None:
            earlier = self.operations.find_by_key(key_of_caller, fingerprint)
            if earlier is not None:
                return earlier
        self.operations.ensure_room(caller.key)
        operation_id = new_operation_id()
        spec = specification.destination
        key = log_key(operation_id)
        destination = self.destinations.open(spec)
        try:
            etag = _prove_writable(destination, key)
            try:
                decision = self.planner.decide(specification.source)
                operation = self.operations.create(
                    NewOperation(
                        id=operation_id,
                        cutoff=decision.cutoff,
                        source=decision.source,
                        destination={
                            "type": spec.type,
                            "public": dict(spec.public),
                            "has_secret": spec.secret is not None,
                        },
                        sealed_secret=None if spec.secret is None else self.secrets.seal(spec.secret, operation_id),
                        log_href=self.destinations.log_href(spec, key),
                        log_etag=etag,
                        fingerprint=fingerprint,
                        idempotency_key=key_of_caller,
                        created_by=caller.key,
                    )
                )
            except BaseException:
                destination.remove_log(key)
                raise
            if operation.id == operation_id:
                record_start(self.audit, operation, specification.source)
            else:  # two requests with one key at once: the other one won
                destination.remove_log(key)
        finally:
            destination.close()
        _log.info("operation %s recorded: export to %s", operation.id, spec.type)
        begin(self.engine, operation)
        return operation

    def dry_run(self, specification: ExportSpecification) -> DryRun:
        """Count what an export would copy now; starts and writes nothing."""
        self._check(specification)
        return self.planner.dry_run(specification.source)

    def get(self, operation_id: OperationId, caller: Caller = ANONYMOUS) -> Operation:
        """Raises NotFound, also for an operation that the caller may not see."""
        operation = self.operations.get(operation_id)
        if not caller.may_see(operation.created_by):
            raise unknown_operation(operation_id)
        return operation

    def page(
        self,
        limit: int,
        before: tuple[datetime, str] | None,
        status: frozenset[OperationStatus] | None,
        caller: Caller = ANONYMOUS,
    ) -> list[Operation]:
        """The operations that the caller may see, newest first."""
        created_by = None if Action.MANAGE in caller.actions else caller.key
        return self.operations.page(limit, before, status, created_by)

    def cancel(self, operation_id: OperationId, caller: Caller = ANONYMOUS) -> Operation:
        """Order an operation to stop. Idempotent; raises Conflict when it ended otherwise, NotFound as `get`."""
        self.get(operation_id, caller)
        operation = self.operations.stop(operation_id, OperationStatus.CANCELING, None)
        match operation.status:
            case OperationStatus.CANCELING:
                self.runner.stop(operation_id, operation.generation)
                self.engine.settle(operation_id, operation.generation)
            case OperationStatus.CANCELED:
                pass
            case OperationStatus.FAILING:
                raise Conflict("The operation is failing already and will end as failed.", target="operationId")
            case _:
                raise Conflict(
                    f"The operation ended already as {operation.status}; only a running one can be canceled.",
                    target="operationId",
                )
        return operation

    def _check(self, specification: ExportSpecification) -> None:
        match specification.source:
            case Listed(identifiers) if len(identifiers) > self.identifiers_max:
                raise InvalidRequest(
                    f"{len(identifiers)} identifiers were given; at most {self.identifiers_max} are allowed in one "
                    "export. Split the list, or name studies instead of their instances.",
                    target="source.settings.values",
                )


def _scoped(idempotency_key: str, caller: Caller) -> str:
    """The key as it is stored: callers do not meet in one another's keys, nor read them in the database."""
    return hashlib.sha256(f"{caller.key}\0{idempotency_key}".encode()).hexdigest()


def begin(engine: DurableEngine, operation: Operation) -> None:
    """Hand a recorded operation to the engine. What goes wrong is not the caller's: the record alone makes it run."""
    try:
        engine.start(operation.id, operation.generation)
    except Exception:
        _log.exception("operation %s is recorded and begins later", operation.id)


def _prove_writable(destination: Destination, key: str) -> str | None:
    """Create the error log and overwrite it: this needs exactly the rights that the export will need.

    Returns the log's ETag. Raises DestinationRefused, having removed the log where that was allowed.
    """
    etag = None
    try:
        etag = destination.create_log(key)
        return destination.write_log(key, (), if_match=etag)
    except LogOutdated:
        destination.remove_log(key)
        raise DestinationRefused(
            "The destination changed the error log by itself right after it was created; it cannot be used.",
            target="destination",
        ) from None
    except DestinationFault as fault:
        if etag is not None or fault.kind is FaultKind.TRANSIENT:
            destination.remove_log(key)  # a request that failed without an answer may have been carried out
        raise DestinationRefused(fault.message, code=fault.code, target="destination.settings") from None
