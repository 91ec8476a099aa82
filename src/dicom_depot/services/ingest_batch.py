"""One batch of an import, from files to durable rows: everything or nothing. The outline is in `services.ingest`."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from enum import StrEnum
from typing import BinaryIO, NamedTuple, Protocol

import xxhash

from dicom_depot.codec.dicom_json import read_instance
from dicom_depot.domain.errors import BrokenInstance, DepotError, NotDicom, StorageFull
from dicom_depot.domain.instance import InstanceHeader, InstanceRecord, Metadata
from dicom_depot.ports import AddOutcome, BlobStore, InstanceIndex
from dicom_depot.services.hashes import Hashes
from dicom_depot.services.import_sources import Candidate, Opener, UnreadableError, read_blocks, reason_of

BATCH_FILES_MAX = 64
IN_MEMORY_BYTES_MAX = 32 << 20
"""Larger files are streamed: twice, once for the hashes and once into the store."""
BLOCK_BYTES = 1 << 20

OpenStores = Callable[[], tuple[BlobStore, InstanceIndex]]


class ProblemKind(StrEnum):
    """Why a file was not stored. Spellings stand in error files: only ever added to."""

    CONFLICTING = "conflicting"
    NOT_DICOM = "not_dicom"
    BROKEN = "broken"


class IngestProblem(NamedTuple):
    """One file that was not stored. `identifier` is known for conflicts."""

    path: str
    kind: ProblemKind
    reason: str
    identifier: str | None = None


class StopSignal(Protocol):
    """The part of `threading.Event` that is needed here."""

    def is_set(self) -> bool: ...


class Stopped(NamedTuple):
    """Why a batch was given up, as plain text: exceptions of ours do not all survive the way between processes."""

    is_storage_full: bool
    message: str


@dataclass(slots=True)
class BatchReport:
    """What became of one batch. A batch that was given up counts nothing and left nothing behind."""

    files: int = 0
    bytes_seen: int = 0
    stored: int = 0
    bytes_stored: int = 0
    already_there: int = 0
    problems: list[IngestProblem] = field(default_factory=list)
    stopped: Stopped | None = None
    is_abandoned: bool = False


class _AbandonedError(Exception):
    """The import was told to stop while a batch was at work."""


@dataclass(slots=True)
class _Prepared:
    """An instance that was read and hashed. `content` is None when it is too large to be kept."""

    position: int
    candidate: Candidate
    header: InstanceHeader
    metadata: Metadata
    size: int
    sha256: bytes
    xxh3: int
    content: bytes | None


@dataclass(slots=True)
class _Pending:
    """A batch between its first object and its commit. `problems` carry the file's position in the batch."""

    keys: list[str] = field(default_factory=list)
    records: list[InstanceRecord] = field(default_factory=list)
    sources: list[_Prepared] = field(default_factory=list)
    problems: list[tuple[int, IngestProblem]] = field(default_factory=list)
    already_there: int = 0
    may_be_committed: bool = False

    def note(self, position: int, candidate: Candidate, kind: ProblemKind, reason: str) -> None:
        self.problems.append((position, IngestProblem(candidate.path, kind, reason)))

    def conflict(self, instance: _Prepared) -> None:
        reason = "other bytes are stored under the same identifiers"
        problem = IngestProblem(instance.candidate.path, ProblemKind.CONFLICTING, reason, str(instance.header.ref))
        self.problems.append((instance.position, problem))


class BatchWorker:
    """Imports batches, one after the other, with its own connections.

    `commit_turn` is held while rows are added: workers that wait for each other are woken at once, where a database
    with one writer would have them ask again and again.
    """

    def __init__(
        self,
        open_stores: OpenStores,
        stop: StopSignal | None,
        commit_turn: AbstractContextManager[object] | None = None,
    ) -> None:
        self._open_stores = open_stores
        self._stop = stop
        self._commit_turn = commit_turn or nullcontext()
        self._stores: tuple[BlobStore, InstanceIndex] | None = None
        self._opener = Opener()

    def run(self, batch: list[Candidate]) -> BatchReport:
        """Import one batch; never raises. The batch is durable when this returns, or was given up as a whole."""
        pending = _Pending()
        try:
            if self._stores is None:
                self._stores = self._open_stores()
            return self._run(batch, pending)
        except (_AbandonedError, KeyboardInterrupt):
            self._undo(pending)
            return BatchReport(is_abandoned=True)
        except DepotError as error:
            self._undo(pending)
            return BatchReport(stopped=Stopped(isinstance(error, StorageFull), error.message))
        except Exception as error:
            self._undo(pending)
            return BatchReport(stopped=Stopped(False, f"unexpected {reason_of(error)}"))

    def close(self) -> None:
        self._opener.close()

    def _run(self, batch: list[Candidate], pending: _Pending) -> BatchReport:
        assert self._stores is not None
        _, index = self._stores
        prepared = list(self._prepare(batch, pending))
        known = index.find(list({instance.header.ref for instance in prepared})) if prepared else {}
        claimed = {ref: instance.sha256 for ref, instance in known.items()}
        for instance in prepared:
            self._check_stop()
            earlier = claimed.get(instance.header.ref)
            if earlier is not None:
                self._skip(instance, earlier, pending)
            elif self._write(instance, pending):
                claimed[instance.header.ref] = instance.sha256
        stored = self._commit(pending)
        pending.problems.sort(key=lambda numbered: numbered[0])
        return BatchReport(
            files=len(batch),
            bytes_seen=sum(candidate.size for candidate in batch),
            stored=len(stored),
            bytes_stored=sum(record.size for record in stored),
            already_there=pending.already_there,
            problems=[problem for _, problem in pending.problems],
        )

    @staticmethod
    def _skip(instance: _Prepared, earlier: bytes, pending: _Pending) -> None:
        if earlier == instance.sha256:
            pending.already_there += 1
        else:
            pending.conflict(instance)

    def _prepare(self, batch: list[Candidate], pending: _Pending) -> Iterator[_Prepared]:
        for position, candidate in enumerate(batch):
            self._check_stop()
            try:
                if candidate.problem is not None:
                    raise UnreadableError(candidate.problem)
                with self._opener.open(candidate) as stream:
                    yield self._read(position, candidate, stream)
            except NotDicom as error:
                pending.note(position, candidate, ProblemKind.NOT_DICOM, error.message)
            except BrokenInstance as error:
                pending.note(position, candidate, ProblemKind.BROKEN, error.message)
            except UnreadableError as error:
                pending.note(position, candidate, ProblemKind.BROKEN, str(error))

    def _read(self, position: int, candidate: Candidate, stream: BinaryIO) -> _Prepared:
        """Header and hashes of one file. Raises NotDicom, BrokenInstance, UnreadableError."""
        size = candidate.size if candidate.archive else os.fstat(stream.fileno()).st_size
        if size <= IN_MEMORY_BYTES_MAX:
            content = next(read_blocks(stream, size + 1), b"")
            if len(content) != size:
                raise UnreadableError("the file changed while it was read")
            read = read_instance(content, size)
            return _Prepared(
                position,
                candidate,
                read.header,
                read.metadata,
                size,
                hashlib.sha256(content).digest(),
                xxhash.xxh3_64_intdigest(content),
                content,
            )
        read = read_instance(stream, size)
        hashes = Hashes()
        for block in self._blocks(stream):
            hashes.update(block)
        if hashes.size != size:
            raise UnreadableError("the file changed while it was read")
        return _Prepared(position, candidate, read.header, read.metadata, size, hashes.sha256(), hashes.xxh3(), None)

    def _write(self, instance: _Prepared, pending: _Pending) -> bool:
        """Write the object and note its record. False, with a problem noted, when the file cannot be read again."""
        assert self._stores is not None
        store, _ = self._stores
        if not pending.keys:
            # All at once: keys of one call lie near each other. A key that is never written costs nothing.
            pending.keys = store.new_keys(BATCH_FILES_MAX)
        key = pending.keys.pop()
        if instance.content is not None:
            store.put(key, [instance.content])
            instance.content = None
        else:
            hashes = Hashes()
            try:
                with self._opener.open(instance.candidate) as stream:
                    _put_from(store, key, hashes.through(self._blocks(stream)))
            except UnreadableError as error:
                pending.note(instance.position, instance.candidate, ProblemKind.BROKEN, str(error))
                return False
            if hashes.sha256() != instance.sha256:
                store.delete(key)
                reason = "the file changed while it was read"
                pending.note(instance.position, instance.candidate, ProblemKind.BROKEN, reason)
                return False
        pending.records.append(
            InstanceRecord(instance.header, key, instance.size, instance.sha256, instance.xxh3, instance.metadata)
        )
        pending.sources.append(instance)
        return True

    def _commit(self, pending: _Pending) -> list[InstanceRecord]:
        """Objects, then rows. Returns the records that were taken."""
        assert self._stores is not None
        store, index = self._stores
        if not pending.records:
            return []
        store.make_durable([record.store_key for record in pending.records])
        pending.may_be_committed = True
        try:
            with self._commit_turn:
                outcomes = index.add(pending.records)
        except StorageFull:
            pending.may_be_committed = False  # The port's promise: no space means no transaction.
            raise
        taken: list[InstanceRecord] = []
        for record, source, outcome in zip(pending.records, pending.sources, outcomes, strict=True):
            if outcome is AddOutcome.STORED:
                taken.append(record)
                continue
            if outcome is AddOutcome.ALREADY_THERE:
                pending.already_there += 1
            else:
                pending.conflict(source)
            store.delete(record.store_key)
        return taken

    def _undo(self, pending: _Pending) -> None:
        """Delete the objects of a batch that was not committed.

        When the commit's outcome is not known (a lost connection), they stay: an object without a row is harmless, a
        row without its object is not.
        """
        if self._stores is None or pending.may_be_committed:
            return
        for record in pending.records:
            with suppress(DepotError, OSError):
                self._stores[0].delete(record.store_key)

    def _blocks(self, stream: BinaryIO) -> Iterator[bytes]:
        """The whole stream, from its beginning, giving up once the import is told to stop."""
        try:
            stream.seek(0)
        except (OSError, ValueError) as error:
            raise UnreadableError(reason_of(error)) from None
        for block in read_blocks(stream, BLOCK_BYTES):
            self._check_stop()
            yield block

    def _check_stop(self) -> None:
        if self._stop is not None and self._stop.is_set():
            raise _AbandonedError


def _put_from(store: BlobStore, key: str, blocks: Iterator[bytes]) -> None:
    """As `store.put`; what the blocks raise comes out as it went in, however the store wraps it."""
    raised: list[Exception] = []

    def watched() -> Iterator[bytes]:
        try:
            yield from blocks
        except (UnreadableError, _AbandonedError) as error:
            raised.append(error)
            raise

    try:
        store.put(key, watched())
    except Exception:
        if raised:
            raise raised[0] from None
        raise
