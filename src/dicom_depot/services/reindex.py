"""The work of an operation that makes stored instances searchable by new extended query tags."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dicom_depot.domain.export import ChunkOutcome
from dicom_depot.domain.operation import OperationId
from dicom_depot.ports import QueryTags
from dicom_depot.services.metadata import MetadataReader

_BATCH = 200


@dataclass(frozen=True, slots=True)
class ReindexService:
    """`ports.Reindexer`: reads the metadata of instances, from their files where the index has none."""

    tags: QueryTags
    metadata: MetadataReader

    def index(
        self, operation_id: OperationId, instance_ids: Sequence[int], is_stopped: Callable[[], bool]
    ) -> ChunkOutcome:
        outcome = ChunkOutcome()
        for start in range(0, len(instance_ids), _BATCH):
            if is_stopped():
                outcome.is_complete = False
                break
            batch = list(instance_ids[start : start + _BATCH])
            contents = {id_: each.dicom_json for id_, each in self.metadata.by_ids(batch).items()}
            self.tags.index(operation_id, contents)
            outcome.exported += len(batch)  # one that was deleted meanwhile needs no indexing
        return outcome

    def complete(self, operation_id: OperationId) -> None:
        self.tags.complete(operation_id)
