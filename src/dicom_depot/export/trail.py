"""What the audit trail says of an export: one line when it is recorded, one when it has ended.

Neither names an instance: identifiers are counted, a query is told by its attributes without their values, and a
folder's name, which callers choose freely, is left out.
"""

from __future__ import annotations

from typing import assert_never
from urllib.parse import urlsplit

from dicom_depot.domain.access import Caller
from dicom_depot.domain.export import Everything, Listed, Matching, Source
from dicom_depot.domain.operation import Operation
from dicom_depot.ports import AuditTrail

EXPORT_STARTED = "export.started"
EXPORT_RESUMED = "export.resumed"
EXPORT_ENDED = "export.ended"


class NoTrail:
    """`ports.AuditTrail` for processes that keep none."""

    def record(self, event: str, **fields: object) -> None:
        """Do nothing."""


NO_TRAIL = NoTrail()


def record_start(audit: AuditTrail, operation: Operation, source: Source) -> None:
    """The operation is recorded."""
    audit.record(
        EXPORT_STARTED,
        caller=operation.created_by,
        operation_id=operation.id,
        **_where_to(operation),
        **what_of(source),
        outcome="accepted",
    )


def record_resume(audit: AuditTrail, operation: Operation, caller: Caller) -> None:
    """The operation runs again, by order of `caller`, who need not be its creator."""
    audit.record(
        EXPORT_RESUMED,
        caller=caller.key,
        operation_id=operation.id,
        **_where_to(operation),
        generation=operation.generation,
        outcome="accepted",
    )


def record_end(audit: AuditTrail, operation: Operation) -> None:
    """The operation is in a terminal state."""
    audit.record(
        EXPORT_ENDED,
        caller=operation.created_by,
        operation_id=operation.id,
        **_where_to(operation),
        counts={
            "total": operation.total,
            "exported": operation.exported,
            "skipped": operation.skipped,
            "bytes": operation.bytes_exported,
        },
        outcome=operation.status.value,
        error_code=None if operation.error is None else operation.error.code,
    )


def what_of(source: Source) -> dict[str, object]:
    """The fields that say what is exported. Of a query they name the attributes: their values are patients' data."""
    match source:
        case Everything():
            return {}
        case Listed(identifiers):
            return {"identifier_count": len(identifiers)}
        case Matching(level, filters):
            return {"query_level": level.value, "query_attributes": sorted(filters)}
        case _:
            assert_never(source)


def where_to(type_: str, public: object) -> dict[str, object]:
    """The fields that name a destination, from its type and its public part."""
    public = public if isinstance(public, dict) else {}
    endpoint = public.get("endpoint")
    return {
        "destination_type": type_,
        "destination_host": None if endpoint is None else urlsplit(str(endpoint)).netloc,
        "container": public.get("container"),
    }


def _where_to(operation: Operation) -> dict[str, object]:
    return where_to(str(operation.destination.get("type")), operation.destination.get("public"))
