"""The operation store in SQL: the records of operations, their chunks and their failures."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa

from dicom_depot.adapters.database import Database
from dicom_depot.adapters.operation_limits import refuse_too_many
from dicom_depot.adapters.operation_resume import begin_next_generation
from dicom_depot.adapters.operation_sources import source_columns, source_of
from dicom_depot.adapters.schema import CHUNK_STATUSES, operation_failures, operations
from dicom_depot.adapters.schema import operation_chunks as chunks
from dicom_depot.domain.errors import IdempotencyKeyReused
from dicom_depot.domain.export import (
    ChunkOutcome,
    ClaimedChunk,
    DecidedSource,
    ExportFailure,
    PlannedChunk,
    pack_ids,
    unpack_ids,
)
from dicom_depot.domain.operation import (
    ACTIVE_STATUSES,
    RESUMABLE_STATUSES,
    STOPPED_AS,
    TRANSITIONS,
    Operation,
    OperationError,
    OperationId,
    OperationStatus,
    OperationType,
    unknown_operation,
)
from dicom_depot.ports import ChunkPosition, LogState, NewOperation, OperationLimits

_PLANNED, _RUNNING, _STOPPED, _DONE = CHUNK_STATUSES
_NUMBER_MAX = (1 << 63) - 1


class SqlOperations:
    """`ports.OperationStore` on a Database."""

    def __init__(self, database: Database, limits: OperationLimits | None = None) -> None:
        self._database = database
        self._limits = limits

    def create(self, operation: NewOperation) -> Operation:
        with self._database.write() as connection:
            if operation.idempotency_key is not None:
                earlier = _by_key(connection, operation.idempotency_key, operation.fingerprint)
                if earlier is not None:
                    return earlier
            refuse_too_many(connection, self._limits, operation.created_by)
            insert_operation(connection, operation)
            return _get(connection, operation.id)

    def ensure_room(self, created_by: str) -> None:
        with self._database.read() as connection:
            refuse_too_many(connection, self._limits, created_by)

    def find_by_key(self, idempotency_key: str, fingerprint: str) -> Operation | None:
        with self._database.read() as connection:
            return _by_key(connection, idempotency_key, fingerprint)

    def get(self, operation_id: OperationId) -> Operation:
        with self._database.read() as connection:
            return _get(connection, operation_id)

    def page(
        self,
        limit: int,
        before: tuple[datetime, str] | None,
        status: frozenset[OperationStatus] | None,
        created_by: str | None = None,
    ) -> list[Operation]:
        statement = (
            sa.select(*_OPERATION_COLUMNS).order_by(operations.c.created_at.desc(), operations.c.id.desc()).limit(limit)
        )
        if before is not None:
            statement = statement.where(
                sa.tuple_(operations.c.created_at, operations.c.id) < sa.tuple_(_naive(before[0]), before[1])
            )
        if status is not None:
            statement = statement.where(operations.c.status.in_(sorted(status)))
        if created_by is not None:
            statement = statement.where(operations.c.created_by == created_by)
        with self._database.read() as connection:
            return [_operation(row) for row in connection.execute(statement)]

    def active(self) -> list[OperationId]:
        statement = (
            sa.select(operations.c.id)
            .where(operations.c.status.in_(sorted(ACTIVE_STATUSES)))
            .order_by(operations.c.created_at)
        )
        with self._database.read() as connection:
            return [OperationId(id_) for id_ in connection.execute(statement).scalars()]

    def oldest_active_cutoff(self) -> int | None:
        statement = sa.select(sa.func.min(operations.c.cutoff)).where(operations.c.status.in_(sorted(ACTIVE_STATUSES)))
        with self._database.read() as connection:
            oldest: int | None = connection.execute(statement).scalar_one()
        return oldest

    def source(self, operation_id: OperationId) -> DecidedSource:
        columns = (operations.c.identifiers, operations.c.query, operations.c.series_ids)
        with self._database.read() as connection:
            row = connection.execute(sa.select(*columns).where(operations.c.id == operation_id)).one_or_none()
        if row is None:
            raise unknown_operation(operation_id)
        return source_of(*row)

    def sealed_secret(self, operation_id: OperationId) -> str | None:
        sealed: str | None = self._column(operation_id, operations.c.sealed_secret)
        return sealed

    def begin(self, operation_id: OperationId) -> OperationStatus:
        with self._database.write() as connection:
            connection.execute(
                sa.update(operations)
                .where(operations.c.id == operation_id, operations.c.status == OperationStatus.NOT_STARTED)
                .values(status=OperationStatus.RUNNING, updated_at=_now())
            )
            return _get(connection, operation_id).status

    def plan_position(self, operation_id: OperationId) -> ChunkPosition:
        with self._database.read() as connection:
            return _position(connection, operation_id)

    def save_plan(
        self,
        operation_id: OperationId,
        position: ChunkPosition,
        chunks_: Sequence[PlannedChunk],
        failures: Sequence[Sequence[ExportFailure]],
        following: ChunkPosition,
    ) -> bool:
        with self._database.write() as connection:
            if (
                _position(connection, operation_id) != position
                or _get(connection, operation_id).status is not OperationStatus.RUNNING
            ):
                return False
            rows = [
                {
                    "operation_id": operation_id,
                    "number": position.next_number + n,
                    "status": _DONE if chunk.unmatched else _PLANNED,
                    "instance_ids": pack_ids(chunk.instance_ids),
                    "count": chunk.count,
                    "bytes_total": chunk.bytes_total,
                    "skipped": len(chunk.unmatched),
                }
                for n, chunk in enumerate(chunks_)
            ]
            if rows:
                connection.execute(sa.insert(chunks), rows)
            for number, lines in enumerate(failures, position.next_number):
                _insert_failures(connection, operation_id, number, lines)
            connection.execute(
                sa.update(operations)
                .where(operations.c.id == operation_id)
                .values(
                    next_chunk=following.next_number,
                    plan_resume=following.resume,
                    is_planned=following.is_planned,
                    total=operations.c.total + sum(chunk.count for chunk in chunks_),
                    bytes_total=operations.c.bytes_total + sum(chunk.bytes_total for chunk in chunks_),
                    skipped=operations.c.skipped + sum(len(chunk.unmatched) for chunk in chunks_),
                    updated_at=_now(),
                )
            )
            return True

    def runnable(self, operation_id: OperationId, window: int, first: int = 0, last: int | None = None) -> list[int]:
        values = {"id": operation_id, "window": window, "first": first, "last": _NUMBER_MAX if last is None else last}
        with self._database.read() as connection:
            return list(connection.execute(_RUNNABLE, values).scalars())

    def claim_chunk(self, operation_id: OperationId, generation: int, number: int) -> ClaimedChunk | None:
        this = (chunks.c.operation_id == operation_id) & (chunks.c.number == number)
        with self._database.write() as connection:
            row = connection.execute(
                _CLAIMABLE, {"id": operation_id, "generation": generation, "number": number}
            ).one_or_none()
            if row is None or row[0] in (_DONE, _STOPPED):
                return None
            status, attempt, packed, operation_status = row
            runs = operation_status == OperationStatus.RUNNING
            if not runs and status == _PLANNED:
                return None
            # Raising the attempt also where the operation stops: whoever had the chunk must not commit it any more.
            connection.execute(
                sa.update(chunks).where(this).values(status=_RUNNING if runs else _STOPPED, attempt=attempt + 1)
            )
            return ClaimedChunk(operation_id, number, attempt + 1, unpack_ids(packed)) if runs else None

    def commit_chunk(self, chunk: ClaimedChunk, outcome: ChunkOutcome) -> bool:
        skipped = len(outcome.failures)
        with self._database.write() as connection:
            if not outcome.is_complete and _runs(connection, chunk.operation_id):
                # Stopped by an order that was not, or no longer, meant for it: somebody takes it up again.
                connection.execute(_PUT_BACK, {"id": chunk.operation_id, "of": chunk.number, "by": chunk.attempt})
                return False
            taken = connection.execute(
                sa.update(chunks)
                .where(
                    chunks.c.operation_id == chunk.operation_id,
                    chunks.c.number == chunk.number,
                    chunks.c.attempt == chunk.attempt,
                    chunks.c.status == _RUNNING,
                )
                .values(
                    status=_DONE if outcome.is_complete else _STOPPED,
                    exported=outcome.exported,
                    skipped=skipped,
                    bytes_exported=outcome.bytes_exported,
                )
            )
            if taken.rowcount != 1:
                return False
            _insert_failures(connection, chunk.operation_id, chunk.number, outcome.failures)
            connection.execute(
                sa.update(operations)
                .where(operations.c.id == chunk.operation_id)
                .values(
                    exported=operations.c.exported + outcome.exported,
                    skipped=operations.c.skipped + skipped,
                    bytes_exported=operations.c.bytes_exported + outcome.bytes_exported,
                    updated_at=_now(),
                )
            )
            return True

    def stop(
        self,
        operation_id: OperationId,
        into: OperationStatus,
        error: OperationError | None,
        generation: int | None = None,
    ) -> Operation:
        with self._database.write() as connection:
            operation = _get(connection, operation_id)
            if into in TRANSITIONS[operation.status] and generation in (None, operation.generation):
                connection.execute(
                    sa.update(operations)
                    .where(operations.c.id == operation_id)
                    .values(
                        status=into,
                        updated_at=_now(),
                        error_code=error.code if error else None,
                        error_message=error.message if error else None,
                    )
                )
            return _get(connection, operation_id)

    def statuses(self, operation_ids: Sequence[OperationId]) -> dict[OperationId, OperationStatus]:
        with self._database.read() as connection:
            rows = connection.execute(_STATUSES, {"ids": operation_ids})
            return {OperationId(id_): OperationStatus(status) for id_, status in rows}

    def is_settled(self, operation_id: OperationId) -> bool:
        with self._database.read() as connection:
            row = connection.execute(_STATUS_AND_PLAN, {"id": operation_id}).one_or_none()
            if row is None:
                raise unknown_operation(operation_id)
            status, is_planned = row
            match OperationStatus(status):
                case OperationStatus.RUNNING if is_planned:
                    open_states: tuple[str, ...] = (_PLANNED, _RUNNING, _STOPPED)
                case OperationStatus.FAILING | OperationStatus.CANCELING:
                    open_states = (_RUNNING,)
                case _:
                    return False
            return not connection.execute(_IN_FLIGHT, {"id": operation_id, "states": open_states}).scalar_one()

    def failures(
        self, operation_id: OperationId, after: tuple[int, int], limit: int
    ) -> list[tuple[int, ExportFailure]]:
        columns = operation_failures.c
        statement = (
            sa.select(
                columns.chunk,
                columns.position,
                columns.identifier,
                columns.code,
                columns.error,
                columns.occurred_at,
            )
            .where(
                columns.operation_id == operation_id,
                sa.tuple_(columns.chunk, columns.position) > sa.tuple_(*after),
            )
            .order_by(columns.chunk, columns.position)
            .limit(limit)
        )
        with self._database.read() as connection:
            return [
                (chunk, ExportFailure(position, identifier, code, error, occurred.replace(tzinfo=UTC)))
                for chunk, position, identifier, code, error, occurred in connection.execute(statement)
            ]

    def log_state(self, operation_id: OperationId) -> LogState:
        columns = operations.c
        with self._database.read() as connection:
            row = connection.execute(
                sa.select(
                    columns.log_etag,
                    columns.log_lines,
                    columns.log_bytes,
                    columns.log_written_at,
                    columns.skipped,
                ).where(columns.id == operation_id)
            ).one_or_none()
        if row is None:
            raise unknown_operation(operation_id)
        etag, lines, size, written_at, failures = row
        return LogState(etag, lines, size, written_at.replace(tzinfo=UTC), failures)

    def save_log_state(self, operation_id: OperationId, etag: str | None, lines: int, size: int) -> None:
        with self._database.write() as connection:
            connection.execute(
                sa.update(operations)
                .where(operations.c.id == operation_id)
                .values(log_etag=etag, log_lines=lines, log_bytes=size, log_written_at=_now())
            )

    def finish(self, operation_id: OperationId) -> Operation:
        now = _now()
        with self._database.write() as connection:
            terminal = STOPPED_AS.get(_get(connection, operation_id).status)
            if terminal is not None:
                connection.execute(
                    sa.update(operations)
                    .where(operations.c.id == operation_id)
                    .values(status=terminal, sealed_secret=None, updated_at=now, ended_at=now)
                )
            return _get(connection, operation_id)

    def unfinished(self, operation_id: OperationId, after: int, limit: int) -> list[tuple[int, Sequence[int]]]:
        statement = (
            sa.select(chunks.c.number, chunks.c.instance_ids)
            .where(chunks.c.operation_id == operation_id, chunks.c.number > after, chunks.c.status != _DONE)
            .order_by(chunks.c.number)
            .limit(limit)
        )
        with self._database.read() as connection:
            return [(number, unpack_ids(packed)) for number, packed in connection.execute(statement)]

    def resume(self, operation_id: OperationId, generation: int, sealed_secret: str | None) -> Operation | None:
        with self._database.write() as connection:
            operation = _get(connection, operation_id)
            if operation.generation != generation or operation.status not in RESUMABLE_STATUSES:
                return None
            refuse_too_many(connection, self._limits, operation.created_by)
            begin_next_generation(connection, operation_id, sealed_secret)
            return _get(connection, operation_id)

    def purge(self, ended_before: datetime) -> list[OperationId]:
        with self._database.write() as connection:
            ids = list(
                connection.execute(
                    sa.select(operations.c.id).where(operations.c.ended_at < _naive(ended_before)).limit(100)
                ).scalars()
            )
            for table in (operation_failures, chunks):
                connection.execute(sa.delete(table).where(table.c.operation_id.in_(ids)))
            connection.execute(sa.delete(operations).where(operations.c.id.in_(ids)))
            return [OperationId(id_) for id_ in ids]

    def _column(self, operation_id: OperationId, column: sa.Column[Any]) -> Any:
        with self._database.read() as connection:
            row = connection.execute(sa.select(column).where(operations.c.id == operation_id)).one_or_none()
        if row is None:
            raise unknown_operation(operation_id)
        return row[0]


def insert_operation(connection: sa.Connection, operation: NewOperation) -> None:
    """Within a transaction of the caller's."""
    now = _now()
    connection.execute(
        sa.insert(operations).values(
            id=operation.id,
            type=operation.type,
            status=OperationStatus.NOT_STARTED,
            created_at=now,
            updated_at=now,
            cutoff=operation.cutoff,
            destination=operation.destination,
            sealed_secret=operation.sealed_secret,
            fingerprint=operation.fingerprint,
            idempotency_key=operation.idempotency_key,
            is_planned=False,
            log_href=operation.log_href,
            log_etag=operation.log_etag,
            log_written_at=now,
            created_by=operation.created_by,
            **({} if operation.query is None else {"query": dict(operation.query)}),
            **source_columns(operation.source),
        )
    )


_OPERATION_COLUMNS = (
    operations.c.id,
    operations.c.type,
    operations.c.query,
    operations.c.status,
    operations.c.created_at,
    operations.c.updated_at,
    operations.c.ended_at,
    operations.c.cutoff,
    operations.c.is_planned,
    operations.c.total,
    operations.c.exported,
    operations.c.skipped,
    operations.c.bytes_total,
    operations.c.bytes_exported,
    operations.c.log_href,
    operations.c.destination,
    operations.c.error_code,
    operations.c.error_message,
    operations.c.created_by,
    operations.c.generation,
)


def _runs(connection: sa.Connection, operation_id: OperationId) -> bool:
    status = connection.execute(sa.select(operations.c.status).where(operations.c.id == operation_id)).scalar()
    return status == OperationStatus.RUNNING


_PUT_BACK = (
    sa.update(chunks)
    .where(
        chunks.c.operation_id == sa.bindparam("id"),
        chunks.c.number == sa.bindparam("of"),
        chunks.c.attempt == sa.bindparam("by"),
        chunks.c.status == _RUNNING,
    )
    .values(status=_PLANNED)
)
_earlier = chunks.alias("earlier")
_id: sa.BindParameter[str] = sa.bindparam("id", type_=sa.String)

# The statements of every chunk and of every look at an operation are built once: SQLAlchemy needs longer to build one
# than SQLite to answer it, and meanwhile the interpreter copies nothing.
_OPERATION = sa.select(*_OPERATION_COLUMNS).where(operations.c.id == _id)
_STATUS_AND_PLAN = sa.select(operations.c.status, operations.c.is_planned).where(operations.c.id == _id)
_STATUSES = sa.select(operations.c.id, operations.c.status).where(
    operations.c.id.in_(sa.bindparam("ids", expanding=True))
)
_IN_FLIGHT = sa.select(
    sa.exists().where(chunks.c.operation_id == _id, chunks.c.status.in_(sa.bindparam("states", expanding=True)))
)
_CLAIMABLE = (
    sa.select(chunks.c.status, chunks.c.attempt, chunks.c.instance_ids, operations.c.status)
    .join(operations, operations.c.id == chunks.c.operation_id)
    .where(
        chunks.c.operation_id == _id,
        chunks.c.number == sa.bindparam("number"),
        operations.c.generation == sa.bindparam("generation"),
    )
)
_RUNNABLE = (
    sa.select(chunks.c.number)
    .outerjoin(
        _earlier,
        (_earlier.c.operation_id == chunks.c.operation_id)
        & (_earlier.c.number == chunks.c.number - sa.bindparam("window")),
    )
    .where(
        chunks.c.operation_id == _id,
        chunks.c.status.in_((_PLANNED, _RUNNING)),
        chunks.c.number.between(sa.bindparam("first"), sa.bindparam("last")),
        (chunks.c.number < sa.bindparam("window")) | (_earlier.c.status == _DONE),
    )
    .order_by(chunks.c.number)
)


def _operation(row: Any) -> Operation:
    type_ = OperationType(row.type)
    return Operation(
        id=OperationId(row.id),
        status=OperationStatus(row.status),
        created_at=row.created_at.replace(tzinfo=UTC),
        updated_at=row.updated_at.replace(tzinfo=UTC),
        ended_at=None if row.ended_at is None else row.ended_at.replace(tzinfo=UTC),
        cutoff=row.cutoff,
        is_planned=row.is_planned,
        total=row.total,
        exported=row.exported,
        skipped=row.skipped,
        bytes_total=row.bytes_total,
        bytes_exported=row.bytes_exported,
        log_href=row.log_href,
        destination=row.destination,
        error=None if row.error_code is None else OperationError(row.error_code, row.error_message),
        created_by=row.created_by,
        generation=row.generation,
        type=type_,
        tag_paths=tuple(row.query["tags"]) if type_ is OperationType.REINDEX else (),
    )


def _get(connection: sa.Connection, operation_id: OperationId) -> Operation:
    row = connection.execute(_OPERATION, {"id": operation_id}).one_or_none()
    if row is None:
        raise unknown_operation(operation_id)
    return _operation(row)


def _by_key(connection: sa.Connection, key: str, fingerprint: str) -> Operation | None:
    row = connection.execute(
        sa.select(operations.c.fingerprint, *_OPERATION_COLUMNS).where(operations.c.idempotency_key == key)
    ).one_or_none()
    if row is None:
        return None
    if row.fingerprint != fingerprint:
        raise IdempotencyKeyReused(
            "This Idempotency-Key was used for another specification. Send a new key, or the same body.",
            target="Idempotency-Key",
        )
    return _operation(row)


def _position(connection: sa.Connection, operation_id: OperationId) -> ChunkPosition:
    row = connection.execute(
        sa.select(
            operations.c.next_chunk, operations.c.plan_resume, operations.c.is_planned, operations.c.generation
        ).where(operations.c.id == operation_id)
    ).one_or_none()
    if row is None:
        raise unknown_operation(operation_id)
    return ChunkPosition(*row)


def _insert_failures(
    connection: sa.Connection, operation_id: OperationId, chunk: int, failures: Sequence[ExportFailure]
) -> None:
    if failures:
        connection.execute(
            sa.insert(operation_failures),
            [
                {
                    "operation_id": operation_id,
                    "chunk": chunk,
                    "position": failure.position,
                    "identifier": failure.identifier,
                    "code": failure.code,
                    "error": failure.error,
                    "occurred_at": _naive(failure.occurred_at),
                }
                for failure in failures
            ],
        )


def _now() -> datetime:
    return datetime.now(UTC).replace(tzinfo=None)


def _naive(moment: datetime) -> datetime:
    return moment.astimezone(UTC).replace(tzinfo=None)
