"""The life of an operation: its states as one table, and the record that callers see.

An operation is created NOT_STARTED, runs, and ends in exactly one terminal state. FAILING and CANCELING are the way
there: no new chunk is begun, those in flight stop and commit what they did, the log is completed, and only then does
the terminal state become visible. Callers see both as "running", because it still is.

One that failed or was canceled can be resumed. It runs again as its next *generation*, going on with what it planned
and did so far; whatever still belongs to an earlier generation has no effect any more.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Literal, NewType

from dicom_depot.domain.errors import NotFound

OperationId = NewType("OperationId", str)
"""32 lower-case hexadecimal digits: the first segment of every key that the operation writes."""


class OperationType(StrEnum):
    """What an operation does. Stored spellings, and the wire's: only ever added to."""

    EXPORT = "export"
    REINDEX = "reindex"
    """Makes instances that are stored already searchable by new extended query tags."""


class OperationStatus(StrEnum):
    """Stored spellings: only ever added to."""

    NOT_STARTED = "notStarted"
    RUNNING = "running"
    FAILING = "failing"
    CANCELING = "canceling"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELED = "canceled"

    @property
    def is_terminal(self) -> bool:
        return self in TERMINAL_STATUSES


_S = OperationStatus
TRANSITIONS: dict[OperationStatus, frozenset[OperationStatus]] = {
    _S.NOT_STARTED: frozenset({_S.RUNNING, _S.FAILING, _S.CANCELING}),
    _S.RUNNING: frozenset({_S.SUCCEEDED, _S.FAILING, _S.CANCELING}),
    _S.FAILING: frozenset({_S.FAILED}),
    _S.CANCELING: frozenset({_S.CANCELED}),
    _S.SUCCEEDED: frozenset(),
    _S.FAILED: frozenset({_S.RUNNING}),
    _S.CANCELED: frozenset({_S.RUNNING}),
}

TERMINAL_STATUSES = frozenset({_S.SUCCEEDED, _S.FAILED, _S.CANCELED})
RESUMABLE_STATUSES = frozenset(status for status in TERMINAL_STATUSES if TRANSITIONS[status])
ACTIVE_STATUSES = frozenset(_S) - TERMINAL_STATUSES
STOPPED_AS = {_S.RUNNING: _S.SUCCEEDED, _S.FAILING: _S.FAILED, _S.CANCELING: _S.CANCELED}
"""The terminal state in which each state ends once nothing is in flight."""

WireVersion = Literal[1, 2]


def wire_status(status: OperationStatus, version: WireVersion) -> str:
    """The word that the API's version uses: v1 says `completed` where v2 says `succeeded`."""
    match status:
        case OperationStatus.FAILING | OperationStatus.CANCELING:
            return OperationStatus.RUNNING.value
        case OperationStatus.SUCCEEDED if version == 1:
            return "completed"
        case _:
            return status.value


@dataclass(frozen=True, slots=True)
class OperationError:
    """Why an operation failed: a stable code and a message with the remedy."""

    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation as the store holds it, without its secret.

    `total` counts the instances and the unmatched identifiers planned so far; it is final once `is_planned`.
    `exported` counts the instances that were copied, or indexed. `bytes_exported` and `bytes_total` are bytes of
    instances. Times are UTC. Of an operation that indexes, destination and log are empty.
    """

    id: OperationId
    status: OperationStatus
    created_at: datetime
    updated_at: datetime
    ended_at: datetime | None
    cutoff: int
    is_planned: bool
    total: int
    exported: int
    skipped: int
    bytes_total: int
    bytes_exported: int
    log_href: str
    destination: dict[str, object]
    """The destination's public part: what is needed to reach it, except secrets."""
    error: OperationError | None
    created_by: str = ""
    """The creator's `Caller.key`."""
    generation: int = 1
    """1 at first, and one more for each resume."""
    type: OperationType = OperationType.EXPORT
    tag_paths: tuple[str, ...] = ()
    """The extended query tags that it indexes."""

    @property
    def percent_complete(self) -> int:
        """0 to 100; 100 only at success, and 0 until the total is known."""
        if self.status is OperationStatus.SUCCEEDED:
            return 100
        if not self.is_planned or self.total == 0:
            return 0
        return min(99, 100 * (self.exported + self.skipped) // self.total)


def unknown_operation(operation_id: OperationId) -> NotFound:
    """The one answer for operations that do not exist and for those that a caller may not see."""
    return NotFound(f"There is no operation {operation_id}; ended operations are removed after their retention time.")


def new_operation_id() -> OperationId:
    return OperationId(uuid.uuid4().hex)


def parse_operation_id(text: str) -> OperationId | None:
    """Read any usual text form of a GUID; None when it is none."""
    try:
        return OperationId(uuid.UUID(text.strip("()")).hex)
    except ValueError:
        return None
