"""Storing instances that arrive over the wire (PS3.18 section 10.5), whatever the wire is.

A session takes the instances of one request, one after the other, block by block. A small one is kept in memory until
it is whole, a large one goes to the store as it arrives. Each is read, checked and written as soon as it has ended;
rows are added when the request has ended well, together with those of other requests. A crash before that leaves at
most objects without rows, which `check --repair` removes; a request that fails removes its own.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from enum import IntEnum

import xxhash

from dicom_depot.codec.checks import Check, Violation
from dicom_depot.codec.dicom_json import ReadInstance, read_instance
from dicom_depot.codec.search_values import loads, tag_values
from dicom_depot.domain.errors import BrokenInstance, DepotError, NotDicom, PayloadTooLarge, StorageFull
from dicom_depot.domain.identifiers import InstanceRef, Uid
from dicom_depot.domain.instance import InstanceRecord
from dicom_depot.domain.query_tags import QueryTag, TagStatus
from dicom_depot.domain.search import TOP_ATTRIBUTES
from dicom_depot.ports import AddOutcome, BlobStore, BlobWriter, InstanceIndex
from dicom_depot.services.group_commit import GroupCommit
from dicom_depot.services.hashes import Hashes
from dicom_depot.services.store_stream import open_stored

_log = logging.getLogger(__name__)

IN_MEMORY_BYTES_MAX = 1 << 20
"""A larger instance goes to the store while it arrives."""
_KEYS_AT_ONCE = 64

_IMPLICIT_VR = "1.2.840.10008.1.2"


class FailureReason(IntEnum):
    """Why an instance was not stored: values of Failure Reason (0008,1197), as the service whose API we keep."""

    PROCESSING = 272
    VALIDATION = 43264
    ALREADY_EXISTS = 45070


class WarningReason(IntEnum):
    """What is odd about a stored instance: values of Warning Reason (0008,1196)."""

    INVALID_VALUES = 1
    DATA_SET = 45063


@dataclass(slots=True)
class StoreOutcome:
    """What became of one instance of a request. UIDs are None where they could not be read.

    `comments` name attributes and what is wrong with them, without their values. `has_many_values`: an attribute that
    the index holds one value of has several.
    """

    sop_class_uid: str | None = None
    sop_instance_uid: str | None = None
    ref: InstanceRef | None = None
    failure: FailureReason | None = None
    warning: WarningReason | None = None
    comments: list[str] = field(default_factory=list)
    has_many_values: bool = False


@dataclass(frozen=True, slots=True)
class StoreRules:
    """How a request's instances are judged. `study_uid`: the study that each must belong to."""

    check: Check = Check.ALL
    study_uid: Uid | None = None
    may_replace: bool = False


class StoreService:
    """Takes instances in. Safe for many threads, each with a session of its own."""

    def __init__(
        self,
        store: BlobStore,
        index: InstanceIndex,
        query_tags: Callable[[], Sequence[QueryTag]],
        *,
        instance_bytes_max: int,
        instances_max: int,
        min_free_bytes: int,
    ) -> None:
        self.store = store
        self._query_tags = query_tags
        self.commits = GroupCommit(store, index)
        self.instance_bytes_max = instance_bytes_max
        self.instances_max = instances_max
        self._min_free_bytes = min_free_bytes
        self._keys: list[str] = []
        self._keys_lock = threading.Lock()

    def begin(self, rules: StoreRules) -> StoreSession:
        """Begin a request. Raises StorageFull while too little space is left."""
        free = self.store.free_bytes()
        if free is not None and free < self._min_free_bytes:
            raise StorageFull(
                f"Only {free >> 20} MiB are left for instances; nothing is stored below DICOM_DEPOT_MIN_FREE_BYTES "
                f"({self._min_free_bytes >> 20} MiB)."
            )
        return StoreSession(self, rules, self._indexed_tags() if rules.check is Check.INDEXED else ())

    def _indexed_tags(self) -> list[QueryTag]:
        return [tag for tag in self._query_tags() if tag.status is TagStatus.READY]

    def new_key(self) -> str:
        """Keys of neighbouring requests lie near each other, so that making them durable together is cheap."""
        with self._keys_lock:
            if not self._keys:
                self._keys = self.store.new_keys(_KEYS_AT_ONCE)
            return self._keys.pop()


@dataclass(slots=True)
class _Written:
    record: InstanceRecord
    outcome: StoreOutcome


class StoreSession:
    """The instances of one request. For one thread at a time; must be ended by `commit` or `abandon`."""

    def __init__(self, service: StoreService, rules: StoreRules, tags: Sequence[QueryTag] = ()) -> None:
        """tags: the extended query tags whose values must be sound."""
        self._service = service
        self._rules = rules
        self._tags = tags
        self._outcomes: list[StoreOutcome] = []
        self._written: list[_Written] = []
        self._blocks: list[bytes] = []
        self._size = 0
        self._writer: BlobWriter | None = None
        self._key = ""
        self._hashes = Hashes()

    def begin_instance(self) -> None:
        """The next instance. Raises PayloadTooLarge when the request has too many."""
        if len(self._outcomes) >= self._service.instances_max:
            raise PayloadTooLarge(
                f"The request has more than {self._service.instances_max} instances "
                "(DICOM_DEPOT_STORE_INSTANCES_MAX). Nothing of it was stored; send them in several requests.",
                target="body",
            )
        self._blocks, self._size = [], 0

    def write(self, block: bytes) -> None:
        """The next bytes of the instance. Raises PayloadTooLarge, StorageFull, SourceFault."""
        self._size += len(block)
        if self._size > self._service.instance_bytes_max:
            raise PayloadTooLarge(
                f"An instance is larger than {self._service.instance_bytes_max} bytes "
                "(DICOM_DEPOT_STORE_INSTANCE_BYTES_MAX). Nothing of the request was stored.",
                target="body",
            )
        if self._writer is not None:
            self._hashes.update(block)
            self._writer.write(block)
            return
        self._blocks.append(block)
        if self._size > IN_MEMORY_BYTES_MAX:
            self._spill()

    def end_instance(self) -> None:
        """The instance is complete: read it, judge it, write it. Raises StorageFull, SourceFault."""
        outcome = StoreOutcome()
        self._outcomes.append(outcome)
        try:
            read, sha256, xxh3 = self._read()
        except NotDicom:
            outcome.failure = FailureReason.VALIDATION
            self._drop()
            return
        except BrokenInstance as error:
            outcome.sop_class_uid, outcome.sop_instance_uid = error.sop_class_uid, error.sop_instance_uid
            outcome.failure = FailureReason.VALIDATION
            outcome.comments.append(error.message)
            self._drop()
            return
        self._judge(read, outcome)
        if outcome.failure is not None:
            self._drop()
            return
        if self._writer is None:
            self._key = self._service.new_key()
            self._service.store.put(self._key, self._blocks)
        record = InstanceRecord(
            read.header, self._key, self._size, sha256, xxh3, read.metadata, may_replace=self._rules.may_replace
        )
        self._written.append(_Written(record, outcome))
        self._writer, self._key, self._blocks = None, "", []

    def commit(self) -> list[StoreOutcome]:
        """Make what was written durable; one outcome for each instance, in order.

        Raises StorageFull (nothing is stored), SourceFault, ServiceUnavailable (then some may have been stored); the
        session must then be abandoned.
        """
        return self._service.commits.submit(lambda: self).result()

    @property
    def records(self) -> list[InstanceRecord]:
        """What was written, for `GroupCommit`, as are the next two."""
        return [each.record for each in self._written]

    def settled(self, outcomes: Sequence[AddOutcome]) -> list[StoreOutcome]:
        written, self._written = self._written, []
        for each, added in zip(written, outcomes, strict=True):
            if added is AddOutcome.CONFLICTING or (added is AddOutcome.ALREADY_THERE and not self._rules.may_replace):
                each.outcome.failure = FailureReason.ALREADY_EXISTS
                each.outcome.warning = None
                each.outcome.comments = ["an instance with these UIDs is stored already"]
            if added not in (AddOutcome.STORED, AddOutcome.REPLACED):
                self._delete(each.record.store_key)
        return self._outcomes

    def failed(self, error: BaseException) -> None:
        if not isinstance(error, StorageFull):
            # Whether the rows are there is not known. An object without a row is harmless, a row without one is not.
            self._written = []

    def abandon(self) -> None:
        """Leave nothing behind. Never raises."""
        self._drop()
        for each in self._written:
            self._delete(each.record.store_key)
        self._written = []

    def _spill(self) -> None:
        self._key = self._service.new_key()
        self._writer = self._service.store.writer(self._key)
        self._hashes = Hashes()
        for block in self._hashes.through(self._blocks):
            self._writer.write(block)
        self._blocks = []

    def _read(self) -> tuple[ReadInstance, bytes, int]:
        """What the instance is, and both hashes. Raises NotDicom, BrokenInstance."""
        check = self._rules.check
        if self._writer is None:
            content = b"".join(self._blocks)
            self._blocks = [content]
            read = read_instance(content, len(content), check)
            return read, hashlib.sha256(content).digest(), xxhash.xxh3_64_intdigest(content)
        self._writer.close()
        with open_stored(self._service.store, self._key, self._size) as stream:
            read = read_instance(stream, self._size, check)
        return read, self._hashes.sha256(), self._hashes.xxh3()

    def _judge(self, read: ReadInstance, outcome: StoreOutcome) -> None:
        ref = read.header.ref
        outcome.ref, outcome.sop_class_uid, outcome.sop_instance_uid = (
            ref,
            read.header.sop_class_uid,
            ref.sop_instance_uid,
        )
        fatal = [violation for violation in read.violations if violation.is_fatal]
        if self._tags:
            content = loads(read.metadata.dicom_json)
            found = [(tag, tag_values(tag, content)[1]) for tag in self._tags]
            fatal += [Violation(tag.tag, error, is_fatal=True) for tag, error in found if error is not None]
        if self._rules.study_uid is not None and ref.study_uid != self._rules.study_uid:
            fatal.append(Violation(0x0020000D, "StudyInstanceUID differs from the study in the request's path", True))
        if fatal:
            outcome.failure = FailureReason.VALIDATION
            outcome.comments = [str(violation) for violation in fatal]
            return
        outcome.comments = [str(violation) for violation in read.violations]
        if outcome.comments:
            outcome.warning = WarningReason.INVALID_VALUES
        if read.header.transfer_syntax_uid == _IMPLICIT_VR:
            outcome.warning = WarningReason.DATA_SET
        outcome.has_many_values = any(
            isinstance(value := read.header.attributes[each.column], str) and "\\" in value for each in TOP_ATTRIBUTES
        )

    def _drop(self) -> None:
        """Forget the instance that is at work."""
        if self._writer is not None:
            self._writer.abandon()
            self._delete(self._key)
        self._writer, self._key, self._blocks = None, "", []

    def _delete(self, key: str) -> None:
        with suppress(DepotError, OSError):
            self._service.store.delete(key)


def stored_refs(outcomes: Sequence[StoreOutcome]) -> list[InstanceRef]:
    """The instances that were stored."""
    return [outcome.ref for outcome in outcomes if outcome.failure is None and outcome.ref is not None]
