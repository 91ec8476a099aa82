"""errors.log: one JSON object a line for each skipped instance or identifier, made from committed chunks only.

The log is rewritten as a whole, ordered by chunk and position, so that it holds each failure once however often a
chunk ran. While the operation runs it is rewritten when the failures grew by a quarter or 30 seconds passed, as long as
it is small; in any case once at the end, before the terminal status becomes visible.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime

from dicom_depot.domain.errors import DestinationFault
from dicom_depot.domain.export import ExportFailure, log_key
from dicom_depot.domain.operation import OperationId
from dicom_depot.ports import Destination, LogOutdated, LogState, OperationStore

_log = logging.getLogger(__name__)

REFRESH_SECONDS = 30.0
REFRESH_GROWTH = 1.25
REFRESH_BYTES_MAX = 16 * 1024 * 1024
_LINES_IN_PAGE = 5000


def log_line(failure: ExportFailure) -> bytes:
    """One line, with the keys and their order as the DICOM service writes them."""
    content = {
        "timestamp": failure.occurred_at.isoformat(timespec="microseconds"),
        "identifier": failure.identifier,
        "error": failure.error,
    }
    return json.dumps(content, ensure_ascii=False).encode() + b"\n"


def is_untouched(state: LogState) -> bool:
    """Whether the log is still empty, as it was created when the operation started, and shall be. One that an earlier
    generation wrote lines to may have to be emptied again.
    """
    return state.failures == 0 and state.lines_written == 0


@dataclass(slots=True)
class _Counted:
    """The log's blocks, counted as they pass."""

    operations: OperationStore
    operation_id: OperationId
    lines: int = 0
    size: int = 0

    def __iter__(self) -> Iterator[bytes]:
        after = (-1, -1)
        while page := self.operations.failures(self.operation_id, after, _LINES_IN_PAGE):
            block = b"".join(log_line(failure) for _, failure in page)
            self.lines += len(page)
            self.size += len(block)
            yield block
            after = (page[-1][0], page[-1][1].position)


@dataclass(slots=True)
class ErrorLog:
    """The log of one operation."""

    operations: OperationStore
    operation_id: OperationId
    destination: Destination
    _is_outdated: bool = False
    _one_at_a_time: threading.Lock = field(default_factory=threading.Lock)
    _is_given_up: threading.Event = field(default_factory=threading.Event)

    def refresh(self) -> None:
        """Rewrite the log if that is due and nobody is at it. A fault only delays it."""
        if not self._one_at_a_time.acquire(blocking=False):
            return
        try:
            state = self.operations.log_state(self.operation_id)
            age = (datetime.now(UTC) - state.written_at).total_seconds()
            has_grown = state.failures >= REFRESH_GROWTH * state.lines_written
            if (
                self._is_outdated
                or state.failures == state.lines_written
                or state.bytes_written > REFRESH_BYTES_MAX
                or not (has_grown or age >= REFRESH_SECONDS)
            ):
                return
            try:
                self._write(state.etag)
            except DestinationFault as error:
                _log.warning("errors.log of %s could not be refreshed: %s", self.operation_id, error)
            except LogOutdated:
                self._is_outdated = True  # its ETag was lost with a process; the last write puts that right
                _log.warning("errors.log of %s is not refreshed any more before its end", self.operation_id)
        finally:
            self._one_at_a_time.release()

    def complete(self) -> None:
        """Write the log as it stays. Raises DestinationFault."""
        with self._one_at_a_time:
            state = self.operations.log_state(self.operation_id)
            if not is_untouched(state):
                self._write_whatever_is_there(state.etag)

    def rewrite(self) -> None:
        """Write the log of an operation that does not run, also an empty one: the proof that its destination can be
        written to. Raises DestinationFault.
        """
        with self._one_at_a_time:
            self._write_whatever_is_there(self.operations.log_state(self.operation_id).etag)

    @property
    def is_given_up(self) -> bool:
        return self._is_given_up.is_set()

    def give_up(self) -> None:
        """Whoever still writes for this generation must not replace what a later one writes."""
        self._is_given_up.set()

    def _write_whatever_is_there(self, etag: str | None) -> None:
        try:
            self._write(etag)
        except LogOutdated:
            # A write whose ETag was lost with its process, or a stranger's. Nobody else may write the log now.
            if not self._is_given_up.is_set():
                self._write(None)

    def _write(self, etag: str | None) -> None:
        blocks = _Counted(self.operations, self.operation_id)
        new_etag = self.destination.write_log(log_key(self.operation_id), blocks, if_match=etag)
        self.operations.save_log_state(self.operation_id, new_etag, blocks.lines, blocks.size)
