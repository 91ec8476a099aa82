"""Doubles of the index and the store that live in memory: every promise of the port but durability. Thread-safe."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from dicom_depot.domain.errors import FaultKind, SourceFault
from dicom_depot.domain.export import PlannedInstance
from dicom_depot.domain.identifiers import InstanceRef, Ref, SeriesRef, parent_refs
from dicom_depot.domain.instance import InstanceRecord, StoredObject
from dicom_depot.domain.matching import column_form
from dicom_depot.domain.search import INSTANCE_UID, SOP_CLASS, Condition, Exactly
from dicom_depot.ports import AddOutcome, Cursor, IndexEntry, KnownInstance, Remaining, SelectionPage, StoreEntry


class MemoryBlobStore:
    """`ports.BlobStore` in a dictionary. `durable` holds the keys that were made durable."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.durable: set[str] = set()
        self._modified_at: dict[str, float] = {}

    def new_keys(self, count: int) -> list[str]:
        folder = uuid.uuid4().hex
        return [f"{folder}/{number}" for number in range(count)]

    def writer(self, key: str) -> _MemoryWriter:
        return _MemoryWriter(self, key)

    def put(self, key: str, blocks: Iterable[bytes]) -> None:
        content = b"".join(blocks)
        self.objects[key] = content
        self._modified_at[key] = time.time()

    def make_durable(self, keys: Sequence[str]) -> None:
        self.durable.update(key for key in keys if key in self.objects)

    def read(self, key: str, size: int | None = None) -> bytes:
        try:
            return self.objects[key]
        except KeyError:
            raise SourceFault("BlobNotFound", "the stored object is gone", FaultKind.INSTANCE) from None

    def stream(self, key: str, block_bytes: int) -> Iterator[bytes]:
        content = self.read(key)
        return (content[start : start + block_bytes] for start in range(0, len(content), block_bytes))

    def read_range(self, key: str, offset: int, length: int) -> bytes:
        return self.read(key)[offset : offset + length]

    def delete(self, key: str) -> None:
        self.objects.pop(key, None)
        self.durable.discard(key)
        self._modified_at.pop(key, None)

    def entries(self) -> Iterator[StoreEntry]:
        for key, content in list(self.objects.items()):
            yield StoreEntry(key, len(content), self._modified_at[key])

    def free_bytes(self) -> int | None:
        return None


class _MemoryWriter:
    def __init__(self, store: MemoryBlobStore, key: str) -> None:
        self._store = store
        self._key = key
        self._blocks: list[bytes] = []

    def write(self, block: bytes) -> None:
        self._blocks.append(bytes(block))

    def close(self) -> None:
        self._store.put(self._key, self._blocks)

    def abandon(self) -> None:
        self._blocks.clear()


@dataclass(slots=True)
class _Row:
    instance_id: int
    record: InstanceRecord
    created: int
    deleted: int | None = None
    deleted_at: datetime | None = None

    def is_visible(self, cutoff: int) -> bool:
        return self.created <= cutoff and (self.deleted is None or self.deleted > cutoff)

    def is_below(self, ref: Ref) -> bool:
        own = self.record.ref
        return own == ref or ref in parent_refs(own)


def _meets(record: InstanceRecord, condition: Condition) -> bool:
    """Of attributes with one value, exact matching only."""
    attribute, match = condition.attribute, condition.match
    if attribute is INSTANCE_UID or attribute is SOP_CLASS:
        value: str | int | None = (
            record.ref.sop_instance_uid if attribute is INSTANCE_UID else record.header.sop_class_uid
        )
    else:
        value = column_form(attribute, record.header.attributes.get(attribute.column))
    return isinstance(match, Exactly) and value in match.values


class MemoryIndex:
    """`ports.InstanceIndex` in dictionaries; everything but `find` and `add` walks all rows."""

    def __init__(self) -> None:
        self._rows: dict[int, _Row] = {}
        self._live: dict[InstanceRef, _Row] = {}
        self._sequence = 0
        self._last_id = 0
        self._series_ids: dict[tuple[str, str], int] = {}
        self._forgotten_up_to = 0
        self._lock = threading.RLock()

    def find(self, refs: Sequence[InstanceRef]) -> dict[InstanceRef, KnownInstance]:
        with self._lock:
            rows = {ref: self._live[ref] for ref in refs if ref in self._live}
        return {ref: KnownInstance(row.record.sha256, row.record.size) for ref, row in rows.items()}

    def add(self, records: Sequence[InstanceRecord]) -> list[AddOutcome]:
        with self._lock:
            return [self._add(record) for record in records]

    def _add(self, record: InstanceRecord) -> AddOutcome:
        present = self._live.get(record.ref)
        if present is not None and present.record.sha256 == record.sha256:
            return AddOutcome.ALREADY_THERE
        if present is not None and not record.may_replace:
            return AddOutcome.CONFLICTING
        self._last_id += 1
        self._sequence += 1
        if present is not None:
            present.deleted, present.deleted_at = self._sequence, datetime.now(UTC)
        row = _Row(self._last_id, record, self._sequence)
        self._rows[row.instance_id] = self._live[record.ref] = row
        return AddOutcome.STORED if present is None else AddOutcome.REPLACED

    def delete(self, ref: Ref) -> int:
        with self._lock:
            rows = [row for row in self._live.values() if row.is_below(ref)]
            for row in rows:
                self._sequence += 1
                row.deleted, row.deleted_at = self._sequence, datetime.now(UTC)
                del self._live[row.record.ref]
            return len(rows)

    def sequence(self) -> int:
        return self._sequence

    def unmatched(self, refs: Sequence[Ref], cutoff: int) -> list[Ref]:
        matched: set[Ref] = set()
        for row in self._all(cutoff):
            matched.update((row.record.ref, *parent_refs(row.record.ref)))
        return [ref for ref in refs if ref not in matched]

    def select(self, refs: Sequence[Ref] | None, cutoff: int, after: Cursor | None, limit: int) -> SelectionPage:
        wanted = None if refs is None else set(refs)
        start = 0 if after is None else after[0]
        chosen: list[PlannedInstance] = []
        for row in self._all(cutoff):
            own = row.record.ref
            if row.instance_id <= start:
                continue
            if wanted is not None and own not in wanted and wanted.isdisjoint(parent_refs(own)):
                continue
            if len(chosen) == limit:
                return SelectionPage(chosen, (chosen[-1].instance_id, ""))
            chosen.append(PlannedInstance(row.instance_id, row.record.size))
        return SelectionPage(chosen, None)

    def select_in_series(
        self,
        series_ids: Sequence[int],
        conditions: Sequence[Condition],
        cutoff: int,
        after: Cursor | None,
        limit: int,
    ) -> SelectionPage:
        wanted = set(series_ids)
        found = {
            (self.series_id(row.record.ref), row.record.ref.sop_instance_uid): row
            for row in self._all(cutoff)
            if self.series_id(row.record.ref) in wanted and all(_meets(row.record, each) for each in conditions)
        }
        places = [place for place in sorted(found) if after is None or place > after][:limit]
        chosen = [PlannedInstance(found[place].instance_id, found[place].record.size) for place in places]
        return SelectionPage(chosen, places[-1] if len(chosen) == limit else None)

    def series_id(self, ref: SeriesRef | InstanceRef) -> int:
        """The internal id of a series."""
        with self._lock:
            return self._series_ids.setdefault((ref.study_uid, ref.series_uid), len(self._series_ids) + 1)

    def totals(self, cutoff: int) -> tuple[int, int]:
        sizes = [row.record.size for row in self._all(cutoff)]
        return len(sizes), sum(sizes)

    def fetch(self, instance_ids: Sequence[int]) -> list[StoredObject]:
        with self._lock:
            rows = [self._rows[id_] for id_ in instance_ids if id_ in self._rows]
        return [
            StoredObject(
                row.instance_id,
                row.record.ref.study_uid,
                row.record.ref.series_uid,
                row.record.ref.sop_instance_uid,
                row.record.store_key,
                row.record.size,
                row.record.xxh3,
            )
            for row in rows
        ]

    def remaining(self, instance_ids: Sequence[int]) -> Remaining:
        with self._lock:
            rows = [self._rows[id_] for id_ in instance_ids if id_ in self._rows]
        return Remaining(len(rows), [row.record.store_key for row in rows if row.deleted is not None])

    def scan(self, after: int, limit: int) -> list[IndexEntry]:
        with self._lock:
            rows = [row for row in self._rows.values() if row.instance_id > after][:limit]
        return [
            IndexEntry(
                row.instance_id,
                str(row.record.ref),
                row.record.store_key,
                row.record.size,
                row.record.sha256,
                row.deleted is not None,
            )
            for row in rows
        ]

    def sweepable(self, deleted_before: datetime, oldest_cutoff: int | None, limit: int) -> list[tuple[int, str]]:
        with self._lock:
            rows = [
                row
                for row in self._rows.values()
                if row.deleted is not None
                and row.deleted_at is not None
                and row.deleted_at < deleted_before
                and (oldest_cutoff is None or row.deleted <= oldest_cutoff)
            ]
        return [(row.instance_id, row.record.store_key) for row in rows[:limit]]

    def forget(self, instance_ids: Sequence[int]) -> None:
        with self._lock:
            for id_ in instance_ids:
                row = self._rows.pop(id_, None)
                if row is not None and row.deleted is None:
                    del self._live[row.record.ref]
                elif row is not None:
                    self._forgotten_up_to = max(self._forgotten_up_to, row.deleted or 0)

    def forgotten_up_to(self) -> int:
        return self._forgotten_up_to

    def _all(self, cutoff: int) -> list[_Row]:
        with self._lock:
            return [row for row in self._rows.values() if row.is_visible(cutoff)]
