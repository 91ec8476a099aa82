"""Makes instances durable, those of many requests together: a disk syncs many as fast as one."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from dicom_depot.domain.instance import InstanceRecord
from dicom_depot.ports import AddOutcome, BlobStore, InstanceIndex

RECORDS_MAX = 2000
"""How many records one commit takes; a single request's are never split."""


class _Request:
    def __init__(self, records: Sequence[InstanceRecord]) -> None:
        self.records = records
        self.outcomes: list[AddOutcome] | None = None
        self.error: BaseException | None = None

    @property
    def is_done(self) -> bool:
        return self.outcomes is not None or self.error is not None


class GroupCommit:
    """While one commit runs, whoever comes next waits, and goes with the one that follows."""

    def __init__(self, store: BlobStore, index: InstanceIndex) -> None:
        self._store = store
        self._index = index
        self._waiting: list[_Request] = []
        self._waiting_lock = threading.Lock()
        self._turn = threading.Lock()

    def add(self, records: Sequence[InstanceRecord]) -> list[AddOutcome]:
        """Objects that are written already, then rows: durable on return, one outcome a record in order.

        Raises what `BlobStore.make_durable` and `InstanceIndex.add` raise; then nothing of the whole group is known
        to be stored.
        """
        request = _Request(records)
        with self._waiting_lock:
            self._waiting.append(request)
        while not request.is_done:
            with self._turn:
                if not request.is_done:
                    self._commit()
        if request.error is not None:
            raise request.error
        assert request.outcomes is not None
        return request.outcomes

    def _commit(self) -> None:
        group = self._take()
        records = [record for request in group for record in request.records]
        try:
            self._store.make_durable([record.store_key for record in records])
            outcomes = self._index.add(records)
        except BaseException as error:
            for request in group:
                request.error = error
            return
        start = 0
        for request in group:
            request.outcomes = outcomes[start : start + len(request.records)]
            start += len(request.records)

    def _take(self) -> list[_Request]:
        """From the front, so that nobody waits for ever; the caller's own request is in it or behind it."""
        with self._waiting_lock:
            count, size = 0, 0
            for request in self._waiting:
                size += len(request.records)
                if count and size > RECORDS_MAX:
                    break
                count += 1
            group, self._waiting = self._waiting[:count], self._waiting[count:]
        return group
