"""Makes instances durable, those of many requests together: a disk syncs many as fast as one.

One thread does it, and for small requests all the work before it too. Threads that take turns at the interpreter cost
more than they bring here: each of them would parse for a quarter of a millisecond, then wait for the disk.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from dicom_depot.domain.errors import ServiceUnavailable
from dicom_depot.domain.instance import InstanceRecord
from dicom_depot.ports import AddOutcome, BlobStore, InstanceIndex

RECORDS_MAX = 2000
"""From how many records on a commit waits for no more of them; a single request's are never split."""

_T_co = TypeVar("_T_co", covariant=True)
_T = TypeVar("_T")


class Prepared(Protocol[_T_co]):
    """A request whose objects are written: what is still missing are its rows."""

    @property
    def records(self) -> Sequence[InstanceRecord]:
        """What is to be added."""
        ...

    def settled(self, outcomes: Sequence[AddOutcome]) -> _T_co:
        """Called once the rows are durable, with an outcome for each record. Returns the request's result."""
        ...

    def failed(self, error: BaseException) -> None:
        """Called instead when the commit failed."""
        ...


@dataclass(frozen=True, slots=True)
class _Request(Generic[_T]):
    prepare: Callable[[], Prepared[_T]]
    future: Future[_T] = field(default_factory=Future)


class GroupCommit:
    """While one commit runs, whoever comes next waits, and goes with the one that follows."""

    def __init__(self, store: BlobStore, index: InstanceIndex) -> None:
        self._store = store
        self._index = index
        self._waiting: queue.SimpleQueue[_Request[Any] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._is_closed = False

    def submit(self, prepare: Callable[[], Prepared[_T]]) -> Future[_T]:
        """Have a request prepared, committed and settled. Its future raises what `prepare` raised, or what
        `BlobStore.make_durable` and `InstanceIndex.add` raise for the whole group: nothing of that is known to be
        stored. It can be cancelled until the request's turn comes.
        """
        request = _Request(prepare)
        with self._lock:
            if self._is_closed:
                raise ServiceUnavailable("The service is stopping.")
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="commit", daemon=True)
                self._thread.start()
            self._waiting.put(request)
        return request.future

    def close(self) -> None:
        """Return when what was submitted is done; nothing can be submitted any more."""
        with self._lock:
            self._is_closed = True
            thread = self._thread
        if thread is not None:
            self._waiting.put(None)
            thread.join()

    def _work(self) -> None:
        is_ending = False
        while not is_ending:
            request = self._waiting.get()
            group: list[tuple[_Request[Any], Prepared[Any]]] = []
            count = 0
            while request is not None:
                prepared = _prepared(request)
                if prepared is not None:
                    group.append((request, prepared))
                    count += len(prepared.records)
                if count >= RECORDS_MAX:
                    break
                try:
                    request = self._waiting.get_nowait()
                except queue.Empty:
                    break
            is_ending = request is None
            if group:
                self._commit(group)

    def _commit(self, group: Sequence[tuple[_Request[Any], Prepared[Any]]]) -> None:
        records = [record for _, prepared in group for record in prepared.records]
        try:
            if records:
                self._store.make_durable([record.store_key for record in records])
            outcomes = self._index.add(records) if records else []
        except BaseException as error:
            for request, prepared in group:
                prepared.failed(error)
                request.future.set_exception(error)
            return
        start = 0
        for request, prepared in group:
            end = start + len(prepared.records)
            try:
                request.future.set_result(prepared.settled(outcomes[start:end]))
            except Exception as error:
                request.future.set_exception(error)
            start = end


def _prepared(request: _Request[_T]) -> Prepared[_T] | None:
    """None when it was cancelled, or could not be prepared and has been told so."""
    if not request.future.set_running_or_notify_cancel():
        return None
    try:
        return request.prepare()
    except BaseException as error:
        request.future.set_exception(error)
        return None
