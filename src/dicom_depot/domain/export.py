"""An export: what to copy, how it is cut into chunks, what became of each instance, and where things land."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, NamedTuple

from dicom_depot.domain.identifiers import InstanceRef, Ref, SeriesRef, StudyRef, parent_refs
from dicom_depot.domain.operation import OperationId
from dicom_depot.domain.search import Level

LOG_NAME = "errors.log"


def instance_key(operation_id: OperationId, study_uid: str, series_uid: str, sop_instance_uid: str) -> str:
    """The key of one exported instance, below the destination."""
    return f"{operation_id}/results/{study_uid}/{series_uid}/{sop_instance_uid}.dcm"


def log_key(operation_id: OperationId) -> str:
    """The key of the operation's error log, below the destination."""
    return f"{operation_id}/{LOG_NAME}"


@dataclass(frozen=True, slots=True)
class DestinationSpec:
    """A destination as a caller gave it, checked for form.

    `public` is enough to name and reach it; `secret` is the part that is sealed (a SAS query, say) and is never shown.
    """

    type: str
    public: dict[str, str]
    secret: str | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Everything:
    """All that the service holds."""


@dataclass(frozen=True, slots=True)
class Listed:
    """What lies below any of these identifiers."""

    identifiers: tuple[Ref, ...]


@dataclass(frozen=True, slots=True)
class Matching:
    """All instances of the studies or series that meet a query, or the instances that do: by `level`.

    `filters` are as they were given, attribute to value as in QIDO-RS (PS3.18 section 8.3.4.1), and were understood.
    """

    level: Level
    filters: Mapping[str, str]
    is_fuzzy: bool = False


Source = Everything | Listed | Matching
"""What a caller wants exported."""


@dataclass(frozen=True, slots=True)
class Answered:
    """A query, answered as of the cut-off.

    `series_ids` are internal ids, rising: all that is exported lies in these series. `tag_ids` are those of the
    extended query tags that the query meant: a tag that is added again later is another one.
    """

    asked: Matching
    series_ids: Sequence[int]
    tag_ids: tuple[int, ...] = ()


DecidedSource = Everything | Listed | Answered
"""What an operation exports, as it was decided with the cut-off."""


@dataclass(frozen=True, slots=True)
class ExportSpecification:
    """What to export and where to."""

    source: Source
    destination: DestinationSpec

    def fingerprint(self) -> str:
        """SHA-256 (hex) that is equal for equal specifications, secrets included; used for idempotency keys."""
        canonical: dict[str, Any] = {
            "identifiers": None,
            "destination": [self.destination.type, self.destination.public, self.destination.secret],
        }
        match self.source:
            case Everything():
                pass
            case Listed(identifiers):
                canonical["identifiers"] = [str(ref) for ref in identifiers]
            case Matching(level, filters, is_fuzzy):
                canonical["query"] = [level, dict(filters), is_fuzzy]
        return hashlib.sha256(json.dumps(canonical, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Selection:
    """The identifiers of a specification, sorted out so that every instance is planned once.

    `planned` are copied; they do not overlap. `covered` lie below a planned one: they are only looked up, because
    each listed identifier that matches nothing is one skip, also below a listed parent.
    """

    planned: tuple[Ref, ...]
    covered: tuple[Ref, ...]


def select(identifiers: Iterable[Ref]) -> Selection:
    """Drop repetitions and sort by kind (studies, series, instances), keeping the order of first mention."""
    distinct = dict.fromkeys(identifiers)
    planned: list[Ref] = []
    covered: list[Ref] = []
    for kind in (StudyRef, SeriesRef, InstanceRef):
        for ref in distinct:
            if type(ref) is kind:
                is_covered = any(parent in distinct for parent in parent_refs(ref))
                (covered if is_covered else planned).append(ref)
    return Selection(tuple(planned), tuple(covered))


class PlannedInstance(NamedTuple):
    """An instance that an export will copy: internal id and size in bytes."""

    instance_id: int
    size: int


@dataclass(frozen=True, slots=True)
class PlannedChunk:
    """A piece of work of bounded size: internal ids of instances, in copying order, and their bytes in all.

    An instance chunk has `instance_ids`; a chunk of unmatched identifiers has `unmatched` and nothing to copy.
    """

    instance_ids: Sequence[int] = ()
    bytes_total: int = 0
    unmatched: tuple[Ref, ...] = ()

    @property
    def count(self) -> int:
        return len(self.instance_ids) + len(self.unmatched)


@dataclass(frozen=True, slots=True)
class ClaimedChunk:
    """A chunk that this process may now copy. Only a commit with the same `attempt` will count."""

    operation_id: OperationId
    number: int
    attempt: int
    instance_ids: Sequence[int]


class ExportFailure(NamedTuple):
    """One instance or identifier that was skipped: a line of the error log.

    `position` orders the lines within a chunk; `error` is "code: message" and free of secrets and header values.
    """

    position: int
    identifier: str
    code: str
    error: str
    occurred_at: datetime


@dataclass(slots=True)
class ChunkOutcome:
    """What became of a chunk. `is_complete` is false when it was stopped early; the counts are true either way."""

    exported: int = 0
    bytes_exported: int = 0
    failures: list[ExportFailure] = field(default_factory=list)
    is_complete: bool = True


def pack_ids(ids: Sequence[int]) -> bytes:
    """Ids as little-endian 64-bit integers."""
    return array("q", ids).tobytes()


def unpack_ids(packed: bytes) -> array[int]:
    ids = array("q")
    ids.frombytes(packed)
    return ids
