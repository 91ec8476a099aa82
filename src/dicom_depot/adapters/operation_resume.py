"""What resuming an operation changes in its rows, inside the transaction that decides it."""

from __future__ import annotations

from datetime import UTC, datetime

import sqlalchemy as sa

from dicom_depot.adapters.schema import CHUNK_STATUSES, operation_failures, operations
from dicom_depot.adapters.schema import operation_chunks as chunks
from dicom_depot.domain.operation import OperationId, OperationStatus

_PLANNED, _RUNNING, _STOPPED, _DONE = CHUNK_STATUSES


def begin_next_generation(connection: sa.Connection, operation_id: OperationId, sealed_secret: str | None) -> None:
    """Set the operation running again and plan its unfinished chunks anew. Afterwards its counters are those of the
    chunks that are done: a stopped chunk will count all of its instances again.

    A chunk keeps its attempt number, so that whoever still holds an old one can never commit.
    """
    is_again = (chunks.c.operation_id == operation_id) & (chunks.c.status != _DONE)
    exported, skipped, bytes_exported = connection.execute(
        sa.select(
            sa.func.coalesce(sa.func.sum(chunks.c.exported), 0),
            sa.func.coalesce(sa.func.sum(chunks.c.skipped), 0),
            sa.func.coalesce(sa.func.sum(chunks.c.bytes_exported), 0),
        ).where(is_again)
    ).one()
    connection.execute(
        sa.delete(operation_failures).where(
            operation_failures.c.operation_id == operation_id,
            operation_failures.c.chunk.in_(sa.select(chunks.c.number).where(is_again)),
        )
    )
    connection.execute(
        sa.update(chunks).where(is_again).values(status=_PLANNED, exported=0, skipped=0, bytes_exported=0)
    )
    connection.execute(
        sa.update(operations)
        .where(operations.c.id == operation_id)
        .values(
            status=OperationStatus.RUNNING,
            generation=operations.c.generation + 1,
            sealed_secret=sealed_secret,
            error_code=None,
            error_message=None,
            ended_at=None,
            updated_at=datetime.now(UTC).replace(tzinfo=None),
            exported=operations.c.exported - exported,
            skipped=operations.c.skipped - skipped,
            bytes_exported=operations.c.bytes_exported - bytes_exported,
        )
    )
