"""What the index holds of an instance's data set, and the back-fill for instances that were stored without it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence

from dicom_depot.codec.dicom_json import bare_metadata, read_instance, unpack_json
from dicom_depot.domain.errors import BrokenInstance, DepotError, FaultKind, NotDicom, SourceFault
from dicom_depot.domain.instance import Metadata
from dicom_depot.ports import BlobStore, InstanceCatalog, StoredInstance
from dicom_depot.services.store_stream import open_stored

_log = logging.getLogger(__name__)

_BATCH = 200
_BLOCK_BYTES = 256 << 10
_PAUSE_SECONDS = 0.05


class MetadataReader:
    """Metadata of stored instances: from the index, and from the file where the index has none yet."""

    def __init__(self, catalog: InstanceCatalog, store: BlobStore) -> None:
        self._catalog = catalog
        self._store = store

    def of(self, instance: StoredInstance) -> Metadata:
        """Raises SourceFault where the file must be read and cannot be."""
        return self._catalog.metadata([instance.instance_id]).get(instance.instance_id) or self._read(instance)

    def by_ids(self, instance_ids: Sequence[int]) -> dict[int, Metadata]:
        """Of those of these instances that are live."""
        known = self._catalog.metadata(instance_ids) if instance_ids else {}
        missing = [id_ for id_ in instance_ids if id_ not in known]
        if missing:
            known |= {each.instance_id: self._read_or_bare(each) for each in self._catalog.by_ids(missing)}
        return known

    def json_array(self, instances: Iterator[StoredInstance], url_of: InstanceUrl) -> Iterator[bytes]:
        """The DICOM JSON of all instances as one array (PS3.18 section 10.4.1), in blocks."""
        block: list[bytes] = [b"["]
        size = 0
        is_first = True
        for batch in _batches(instances):
            known = self._catalog.metadata([instance.instance_id for instance in batch])
            for instance in batch:
                metadata = known.get(instance.instance_id) or self._read_or_bare(instance)
                content = unpack_json(metadata.dicom_json, url_of(instance))
                block += [content] if is_first else [b",", content]
                is_first = False
                size += len(content)
                if size >= _BLOCK_BYTES:
                    yield b"".join(block)
                    block, size = [], 0
        yield b"".join([*block, b"]"])

    def fill(self, stop: threading.Event) -> int:
        """Read the files of instances that lack metadata, until none is left or `stop` is set; returns how many.

        How far this has come is in the index: a process that dies is followed by one that goes on there. An instance
        whose file is missing or damaged is passed over. Raises SourceFault (TRANSIENT) while the store is away.
        """
        count = 0
        while not stop.is_set():
            lacking, done_up_to = self._catalog.without_metadata(_BATCH)
            if done_up_to is None:
                break
            found = {}
            for instance in lacking:
                if stop.is_set():
                    return count
                try:
                    found[instance.instance_id] = self._read(instance)
                except SourceFault as fault:
                    if fault.kind is FaultKind.TRANSIENT:
                        raise
                    _log.warning("no metadata of instance %d: %s", instance.instance_id, fault.message)
            self._catalog.add_metadata(found, done_up_to)
            count += len(found)
            if found:
                stop.wait(_PAUSE_SECONDS)  # what callers wait for comes first
        return count

    def _read(self, instance: StoredInstance) -> Metadata:
        with open_stored(self._store, instance.store_key, instance.size) as stream:
            try:
                return read_instance(stream, instance.size).metadata
            except (NotDicom, BrokenInstance):  # it was stored by an earlier reader
                return bare_metadata(instance.ref)

    def _read_or_bare(self, instance: StoredInstance) -> Metadata:
        """One file that cannot be read must not take the metadata of a whole study with it."""
        try:
            return self._read(instance)
        except DepotError as error:
            _log.warning("no metadata of instance %d: %s", instance.instance_id, error.message)
            return bare_metadata(instance.ref)


class InstanceUrl:
    """Makes the URLs that links in metadata begin with, below `studies_url` (no slash at its end)."""

    def __init__(self, studies_url: str) -> None:
        self._studies_url = studies_url

    def __call__(self, instance: StoredInstance) -> str:
        ref = instance.ref
        return f"{self._studies_url}/{ref.study_uid}/series/{ref.series_uid}/instances/{ref.sop_instance_uid}"


def _batches(instances: Iterator[StoredInstance]) -> Iterator[Sequence[StoredInstance]]:
    batch: list[StoredInstance] = []
    for instance in instances:
        batch.append(instance)
        if len(batch) == _BATCH:
            yield batch
            batch = []
    if batch:
        yield batch
