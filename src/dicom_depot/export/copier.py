"""The hot loop: one chunk of instances from the store to the destination, many at once, within bounds.

`copy_chunk` is a plain function. A failed instance is a value in its outcome, never an exception. The threads and the
bytes in flight belong to a `CopyPool` that all chunks of a process share, so that one chunk's tail overlaps with the
next one's start.
"""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from datetime import UTC, datetime

from xxhash import xxh3_64, xxh3_64_intdigest

from dicom_depot.domain.errors import Fault, FaultKind, SourceFault
from dicom_depot.domain.export import ChunkOutcome, ExportFailure, instance_key
from dicom_depot.domain.instance import StoredObject
from dicom_depot.domain.operation import OperationId
from dicom_depot.export.pace import Pace, Slots
from dicom_depot.ports import BlobStore, Destination

STREAM_BLOCK_BYTES = 4 * 1024 * 1024

_BACK_OFF_FIRST_SECONDS = 0.2
_BACK_OFF_MAX_SECONDS = 15.0
_STOP_GRACE_SECONDS = 1.5
_TURN_SECONDS = 0.25
_LANES_SECONDS = 0.25


class CopyPool:
    """What a process may use for copying, shared by all its chunks.

    concurrency: instances copied at the same time. bytes_in_flight: bytes of instances held in memory at most;
    exports whose destination is in trouble may hold half as many again.
    stream_bytes: an instance larger than this is streamed, and counted with this many bytes.
    chunks: chunks that may run at the same time.

    There are `concurrency` slots, each good for its share of the bytes; a large instance takes several. A copy that
    waits for its destination to come back holds none. One whose request hangs does; therefore no export gets all of
    them: an eighth is left for the others. Exports in trouble find out with other slots, half as many again, whether it
    is over: however many hang, they cannot hold up those whose destinations are well.
    """

    def __init__(self, concurrency: int, bytes_in_flight: int, stream_bytes: int, chunks: int) -> None:
        self.concurrency = concurrency
        self.stream_bytes = stream_bytes
        self.slots = Slots(concurrency)
        self.scouts = Slots(max(1, concurrency // 2))
        self._slot_bytes = max(1, bytes_in_flight // concurrency)
        self._share = concurrency - (max(1, concurrency // 8) if concurrency >= 4 else 0)
        self._executor = ThreadPoolExecutor(concurrency * chunks, thread_name_prefix="copy")

    def submit(self, lane: Callable[[], None]) -> Future[None]:
        return self._executor.submit(lane)

    def share(self) -> Slots:
        """The slots that one export may take."""
        return Slots(self._share)

    def pace(self) -> Pace:
        """How many copies one export runs at once."""
        return Pace(self._share)

    def slots_for(self, size: int) -> int:
        """How many slots a copy of `size` bytes takes."""
        return min(self._share, max(1, -(-size // self._slot_bytes)))

    def close(self) -> None:
        self._executor.shutdown(wait=False, cancel_futures=True)


@dataclass(slots=True)
class ExportWatch:
    """What the chunks of one operation share in a process: the order to stop, its slots, and how its copies fare.

    `trouble_since` is the time of the first transient fault after the last success. Transient faults are retried until
    trouble has lasted for `retry_seconds`. While it lasts only one copy at a time finds out whether it is over: a
    destination in trouble is left alone, and its hanging requests hold one slot instead of all.
    """

    retry_seconds: float
    slots: Slots
    pace: Pace
    stop: threading.Event = field(default_factory=threading.Event)
    trouble_since: float | None = None
    finding_out: threading.Lock = field(default_factory=threading.Lock)

    def wait_before_retry(self, fault: Fault, tries: int, since: float | None = None) -> None:
        """Sleep with growing, jittered back-off, or as long as the other side asked; end early when stopped.

        since: when this trouble began, where that is not the watch's to know. Raises a permanent fault when it is time
        to give up.
        """
        now = time.monotonic()
        if self.trouble_since is None:
            self.trouble_since = now
        since = self.trouble_since if since is None else since
        quiet = now - since
        if quiet >= self.retry_seconds:
            raise type(fault)(
                f"{fault.side.capitalize()}Unavailable",
                f"Nothing could be copied for {quiet:.0f} seconds; the last fault was {fault.code}: {fault.message}",
                FaultKind.PERMANENT,
            )
        pause = min(_BACK_OFF_MAX_SECONDS, _BACK_OFF_FIRST_SECONDS * 2 ** min(tries, 16))
        pause = pause * random.uniform(0.5, 1.0)
        if fault.retry_after_seconds is not None:
            pause = max(pause, min(fault.retry_after_seconds, 300.0))
        self.stop.wait(max(0.0, min(pause, self.retry_seconds - quiet)))


class _Hold:
    """The slots that a lane holds. They are kept from one copy to the next: handing them to another lane after each
    wakes a thread each time, which costs as much as copying a small instance. When another export waits for slots,
    they are given back once the lane's turn is over.
    """

    def __init__(self, pool: CopyPool, watch: ExportWatch, shared: Slots | None = None) -> None:
        """shared: slots to take instead of the pool's."""
        self._places = watch.pace.places
        self._both = (watch.slots, shared or pool.slots)
        self._held = 0
        self._turn_ends = 0.0

    def take(self, count: int) -> None:
        own, shared = self._both
        must_yield = self._places.is_over or (shared.is_short and time.monotonic() >= self._turn_ends)
        if self._held == count and not must_yield:
            return
        self.give_back()
        self._places.take(1)
        own.take(count)
        shared.take(min(count, shared.count))
        self._held = count
        self._turn_ends = time.monotonic() + _TURN_SECONDS

    def give_back(self) -> None:
        held, self._held = self._held, 0
        if held:
            for slots in self._both:
                slots.give_back(min(held, slots.count))
            self._places.give_back(1)


@dataclass(slots=True)
class _Chunk:
    """One chunk while its lanes copy it. Lists are only appended to, which is atomic."""

    operation_id: OperationId
    objects: Sequence[StoredObject]
    store: BlobStore
    destination: Destination
    pool: CopyPool
    watch: ExportWatch
    next_position: Iterator[int] = field(default_factory=itertools.count)
    done: list[int] = field(default_factory=list)
    failures: list[ExportFailure] = field(default_factory=list)
    fatal: list[BaseException] = field(default_factory=list)


def copy_chunk(
    operation_id: OperationId,
    objects: Sequence[StoredObject],
    store: BlobStore,
    destination: Destination,
    pool: CopyPool,
    watch: ExportWatch,
) -> tuple[ChunkOutcome, Fault | None]:
    """Copy `objects`, and return what became of them and the permanent fault that ended it early, if one did.

    Everything that the outcome counts as exported is durable at the destination. When `watch.stop` is set, copies in
    flight get a moment to end; those that do not are not counted, although their object may still appear.
    Exceptions other than faults are errors of ours and are raised.
    """
    tries = 0
    flushing_fails_since: float | None = None
    while True:
        chunk = _Chunk(operation_id, objects, store, destination, pool, watch)
        _run_lanes(chunk)
        fault = next(iter(chunk.fatal), None)
        if fault is not None and not isinstance(fault, Fault):
            raise fault
        try:
            _flush(chunk)
        except Fault as flush_fault:
            # What was not flushed may be lost, and flushing again would not bring it back: all of it is written anew.
            chunk.done.clear()
            if flush_fault.kind is not FaultKind.TRANSIENT or watch.stop.is_set():
                fault = fault or flush_fault
                break
            try:
                # Copies that succeed in between say nothing: they are written anew because flushing fails.
                flushing_fails_since = flushing_fails_since or time.monotonic()
                watch.wait_before_retry(flush_fault, tries, flushing_fails_since)
            except Fault as final:
                fault = final
                break
            tries += 1
        else:
            break
    done = sorted(chunk.done)
    outcome = ChunkOutcome(
        exported=len(done),
        bytes_exported=sum(objects[position].size for position in done),
        failures=sorted(chunk.failures),
        is_complete=len(done) + len(chunk.failures) == len(objects),
    )
    return outcome, fault


def _run_lanes(chunk: _Chunk) -> None:
    """Copy until the chunk is used up or must stop; on a stop, hanging copies are left behind and not counted."""
    pending: set[Future[None]] = set()
    is_begun = False
    while not (is_begun and not pending) and not chunk.watch.stop.is_set():
        is_begun = True
        _add_lanes(chunk, pending)
        pending = wait(pending, timeout=_LANES_SECONDS).not_done
    if pending:
        for lane in pending:
            lane.cancel()
        wait(pending, timeout=_STOP_GRACE_SECONDS)
        chunk.done, chunk.failures = list(chunk.done), list(chunk.failures)


def _add_lanes(chunk: _Chunk, pending: set[Future[None]]) -> None:
    """As many lanes as the pace has places; it may have found more since the last time."""
    wanted = min(chunk.watch.pace.count, len(chunk.objects) - len(chunk.done) - len(chunk.failures))
    try:
        while len(pending) < wanted:
            pending.add(chunk.pool.submit(lambda: _lane(chunk)))
    except RuntimeError:  # no more threads on this machine, or the pool is closed
        if not pending:
            raise


def _lane(chunk: _Chunk) -> None:
    """Copy one instance after the other until the chunk is used up or must stop."""
    objects, stop = chunk.objects, chunk.watch.stop
    done, failures = chunk.done, chunk.failures  # a lane left behind goes on with these, which nobody reads then
    hold = _Hold(chunk.pool, chunk.watch)
    try:
        for position in chunk.next_position:
            if position >= len(objects) or stop.is_set() or chunk.fatal:
                return
            stored = objects[position]
            try:
                if _copy_with_retries(chunk, stored, hold):
                    done.append(position)
            except Fault as fault:
                if fault.kind is FaultKind.INSTANCE:
                    error = f"{fault.code}: {fault.message}"
                    failure = ExportFailure(position, stored.identifier, fault.code, error, datetime.now(UTC))
                    failures.append(failure)
                else:
                    chunk.fatal.append(fault)
            except BaseException as error:
                chunk.fatal.append(error)
    finally:
        hold.give_back()


def _copy_with_retries(chunk: _Chunk, stored: StoredObject, hold: _Hold) -> bool:
    """Copy one instance; false when it was stopped before it could be."""
    watch = chunk.watch
    tries = 0
    while not (watch.stop.is_set() or chunk.fatal):
        is_in_trouble = watch.trouble_since is not None
        if is_in_trouble:
            hold.give_back()
            if not watch.finding_out.acquire(timeout=_TURN_SECONDS):
                continue
        used = _Hold(chunk.pool, watch, chunk.pool.scouts) if is_in_trouble else hold
        try:
            _copy(chunk, stored, used)
        except Fault as fault:
            if fault.kind is not FaultKind.TRANSIENT:
                watch.trouble_since = None  # whoever refuses is there
                raise
            failed = fault
            if fault.side == "destination":
                watch.pace.failed()
        except _Stopped:
            return False
        else:
            watch.trouble_since = None
            watch.pace.copied(stored.size)
            return True
        finally:
            if is_in_trouble:
                used.give_back()
                watch.finding_out.release()
        hold.give_back()
        watch.wait_before_retry(failed, tries)
        tries += 1
    return False


def _copy(chunk: _Chunk, stored: StoredObject, hold: _Hold) -> None:
    key = instance_key(chunk.operation_id, stored.study_uid, stored.series_uid, stored.sop_instance_uid)
    pool = chunk.pool
    is_streamed = stored.size > pool.stream_bytes
    hold.take(pool.slots_for(pool.stream_bytes if is_streamed else stored.size))
    if chunk.watch.stop.is_set():
        raise _Stopped  # it may have been a long wait
    if is_streamed:
        chunk.destination.put_stream(key, _verified_blocks(chunk, stored), stored.size)
        return
    content = chunk.store.read(stored.store_key, stored.size)
    if xxh3_64_intdigest(content) != stored.xxh3 or len(content) != stored.size:
        raise _corrupt()
    chunk.destination.put(key, content)


class _Stopped(Exception):
    """Ends an upload from inside its own stream, so that nothing of it becomes visible."""


def _verified_blocks(chunk: _Chunk, stored: StoredObject) -> Iterator[bytes]:
    """The object in blocks. The last is handed on only when the whole has the checksum that the index promises, so
    that an upload of anything else is never committed.
    """
    digest, size, held = xxh3_64(), 0, b""
    for block in chunk.store.stream(stored.store_key, STREAM_BLOCK_BYTES):
        if chunk.watch.stop.is_set():
            raise _Stopped
        if held:
            yield held
        digest.update(block)
        size += len(block)
        held = block
    if size != stored.size or digest.intdigest() != stored.xxh3:
        raise _corrupt()
    yield held


def _corrupt() -> SourceFault:
    return SourceFault(
        "SourceCorrupt",
        "the stored bytes are not those that were stored (checksum differs); run `dicom-depot check`.",
        FaultKind.INSTANCE,
    )


def _flush(chunk: _Chunk) -> None:
    """Make what was copied durable."""
    stored = (chunk.objects[position] for position in chunk.done)
    chunk.destination.flush(
        instance_key(chunk.operation_id, each.study_uid, each.series_uid, each.sop_instance_uid) for each in stored
    )
