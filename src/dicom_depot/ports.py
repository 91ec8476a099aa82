"""The promises between the domain and the outside world. Each docstring states effect, idempotence and errors once;
the adapters that keep them stay silent. `testing.contracts` checks every promise against every adapter.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import NamedTuple, Protocol

from dicom_depot.domain.access import Caller
from dicom_depot.domain.export import (
    ChunkOutcome,
    ClaimedChunk,
    DecidedSource,
    DestinationSpec,
    ExportFailure,
    PlannedChunk,
    PlannedInstance,
)
from dicom_depot.domain.identifiers import InstanceRef, Ref
from dicom_depot.domain.identity import AccessToken, IdentityDescription
from dicom_depot.domain.instance import InstanceRecord, Metadata, StoredObject
from dicom_depot.domain.operation import Operation, OperationError, OperationId, OperationStatus, OperationType
from dicom_depot.domain.query_tags import NewQueryTag, QueryTag
from dicom_depot.domain.search import Condition, Found, Level, SearchQuery, StudyCounts


class StoreEntry(NamedTuple):
    """One object found in the store: key, size in bytes, time of last change (seconds since the epoch)."""

    key: str
    size: int
    modified_at: float


class BlobWriter(Protocol):
    """One object on its way into the store; absent until it is closed. For one thread at a time."""

    def write(self, block: bytes) -> None:
        """Append. Raises StorageFull, SourceFault; nothing of the object remains then."""
        ...

    def close(self) -> None:
        """Make the object appear, whole and not yet durable."""
        ...

    def abandon(self) -> None:
        """Leave nothing behind. Idempotent, also after an error or `close`, which it does not undo; never raises."""
        ...


class BlobStore(Protocol):
    """The service's own store: immutable objects under random keys that are never reused."""

    def new_keys(self, count: int) -> list[str]:
        """Return fresh random keys that lie near each other, so that making them durable together is cheap."""
        ...

    def writer(self, key: str) -> BlobWriter:
        """Begin one object whose bytes arrive bit by bit. Raises StorageFull, SourceFault, as its methods do."""
        ...

    def put(self, key: str, blocks: Iterable[bytes]) -> None:
        """Write one object. Whole or absent, never partial; not yet durable.

        Raises StorageFull (nothing remains), SourceFault.
        """
        ...

    def make_durable(self, keys: Sequence[str]) -> None:
        """Return once these objects would survive a power cut. Idempotent; after an error they must be put again."""
        ...

    def read(self, key: str, size: int | None = None) -> bytes:
        """The object's bytes, all of them. `size` is how many the caller expects: a hint that may be wrong.

        Raises SourceFault: INSTANCE when the object is gone, TRANSIENT when the store is.
        """
        ...

    def stream(self, key: str, block_bytes: int) -> Iterator[bytes]:
        """The object's bytes in blocks of at most `block_bytes`. Errors as `read`."""
        ...

    def read_range(self, key: str, offset: int, length: int) -> bytes:
        """The object's bytes from `offset` on: `length` of them, or fewer where it ends. Errors as `read`."""
        ...

    def delete(self, key: str) -> None:
        """Remove the object. Idempotent."""
        ...

    def entries(self) -> Iterator[StoreEntry]:
        """Every object in the store, and every leftover of an interrupted write."""
        ...

    def free_bytes(self) -> int | None:
        """Space left for objects; None where there is no such bound."""
        ...


class KnownInstance(NamedTuple):
    """What the index already holds under some identifiers."""

    sha256: bytes
    size: int


class AddOutcome(StrEnum):
    """What `InstanceIndex.add` did with one record."""

    STORED = "stored"
    REPLACED = "replaced"
    ALREADY_THERE = "alreadyThere"
    CONFLICTING = "conflicting"


Cursor = tuple[int, str]
"""Where a page of a selection ended; opaque outside the index."""


class SelectionPage(NamedTuple):
    """A page of planned instances. `resume_after` is passed to the next call; None after the last page."""

    instances: list[PlannedInstance]
    resume_after: Cursor | None


class Remaining(NamedTuple):
    """Of some index rows: how many there still are, and the store keys of those among them that are deleted."""

    row_count: int
    deleted_keys: list[str]


class IndexEntry(NamedTuple):
    """One index row for checking it against the store."""

    instance_id: int
    identifier: str
    store_key: str
    size: int
    sha256: bytes
    is_deleted: bool


class InstanceIndex(Protocol):
    """Which instances exist. Unique on study/series/instance among the live ones.

    Every stored or deleted instance takes the next number of one sequence, in commit order without a gap that a
    reader could miss: what has a number up to a cut-off that was read is all that will ever have one.
    """

    def find(self, refs: Sequence[InstanceRef]) -> dict[InstanceRef, KnownInstance]:
        """The live instances among `refs`."""
        ...

    def add(self, records: Sequence[InstanceRecord]) -> list[AddOutcome]:
        """Store index rows in one transaction, durable on return, one outcome a record in order.

        Of several records with the same identifiers the first wins, unless a later one may replace it: then the one
        that is there is marked deleted, by the number that the new one takes. The same bytes never replace themselves.
        Raises StorageFull, ServiceUnavailable.
        """
        ...

    def delete(self, ref: Ref) -> int:
        """Mark live instances deleted and return how many. Rows and bytes stay until swept. Idempotent."""
        ...

    def sequence(self) -> int:
        """The highest number taken: the cut-off for an export that begins now."""
        ...

    def unmatched(self, refs: Sequence[Ref], cutoff: int) -> list[Ref]:
        """Those of `refs` (in order) below which no instance was visible at `cutoff`."""
        ...

    def select(self, refs: Sequence[Ref] | None, cutoff: int, after: Cursor | None, limit: int) -> SelectionPage:
        """The instances at `cutoff` below any of `refs` (None: all), a page at a time, each exactly once.

        `refs` are of one kind and do not overlap. The order is stable for a cut-off, whatever is stored or deleted
        meanwhile.
        """
        ...

    def select_in_series(
        self,
        series_ids: Sequence[int],
        conditions: Sequence[Condition],
        cutoff: int,
        after: Cursor | None,
        limit: int,
    ) -> SelectionPage:
        """As `select`, of these series, given by internal id and rising: the instances that meet all `conditions`,
        which are on instances.
        """
        ...

    def totals(self, cutoff: int) -> tuple[int, int]:
        """How many instances were visible at `cutoff`, and their bytes in all."""
        ...

    def fetch(self, instance_ids: Sequence[int]) -> list[StoredObject]:
        """The rows of `instance_ids` in that order, deleted ones included until they are swept."""
        ...

    def remaining(self, instance_ids: Sequence[int]) -> Remaining:
        """What has not been swept of these rows."""
        ...

    def scan(self, after: int, limit: int) -> list[IndexEntry]:
        """Index rows by internal id, for checking."""
        ...

    def sweepable(self, deleted_before: datetime, oldest_cutoff: int | None, limit: int) -> list[tuple[int, str]]:
        """(internal id, store key) of rows deleted before a time that no export with a cut-off from `oldest_cutoff`
        on can still need.
        """
        ...

    def forget(self, instance_ids: Sequence[int]) -> None:
        """Remove rows for good. Idempotent."""
        ...

    def forgotten_up_to(self) -> int:
        """The highest number of a deletion whose row is gone: a cut-off from there on still sees all of its instances.
        0 when nothing was ever forgotten.
        """
        ...


class StoredInstance(NamedTuple):
    """A live instance, as retrieval needs it. `sequence` is the number that storing it took."""

    instance_id: int
    ref: InstanceRef
    store_key: str
    size: int
    transfer_syntax_uid: str
    sequence: int


class ResourceVersion(NamedTuple):
    """What changes whenever something below a study, series or instance is stored, replaced or deleted."""

    last_sequence: int
    instance_count: int


class InstanceCatalog(Protocol):
    """What is stored now, for retrieval. Pages are in a stable order: by series, then by SOP instance UID."""

    def version_of(self, ref: Ref) -> ResourceVersion:
        """Raises NotFound when nothing live lies below `ref`."""
        ...

    def instances(self, ref: Ref, after: Cursor | None, limit: int) -> tuple[list[StoredInstance], Cursor | None]:
        """A page of the live instances below `ref`, and where the next one begins; None after the last."""
        ...

    def transfer_syntaxes(self, ref: Ref) -> frozenset[str]:
        """The transfer syntax UIDs of all live instances below `ref`."""
        ...

    def metadata(self, instance_ids: Sequence[int]) -> dict[int, Metadata]:
        """What the index holds; instances whose files were not read for it yet are left out."""
        ...

    def by_ids(self, instance_ids: Sequence[int]) -> list[StoredInstance]:
        """Those of these instances that are live."""
        ...

    def without_metadata(self, limit: int) -> tuple[list[StoredInstance], int | None]:
        """Of the next `limit` live instances that the back-fill has not come to, those that lack metadata; and the
        internal id that it has come to with them, None where there are no more.
        """
        ...

    def add_metadata(self, found: Mapping[int, Metadata], done_up_to: int) -> None:
        """Keep these, and that the back-fill has come to the internal id `done_up_to`. Idempotent."""
        ...


class SearchPage(NamedTuple):
    """A page of what a search finds. `remaining`: how many follow; None where they are too many to be counted."""

    found: list[Found]
    remaining: int | None


class SearchIndex(Protocol):
    """What is stored now, for searching. Only what has live instances is found."""

    def page(self, query: SearchQuery, limit: int, offset: int, newest: int | None = None) -> SearchPage:
        """At most `limit` of what meets the query, newest first, without the first `offset`.

        newest: what `newest` answered when the first page was read; what came later is then left out, so that pages do
        not move while instances are stored.
        """
        ...

    def newest(self, level: Level) -> int:
        """A number that rises with every new study, series or instance."""
        ...

    def study_counts(self, study_ids: Sequence[int]) -> dict[int, StudyCounts]:
        """What lives below studies, given as `Found.study_id`."""
        ...

    def snapshot(self, query: SearchQuery) -> tuple[int, array[int]]:
        """The highest number taken, and the internal ids, rising, of the series that meet the query's conditions on
        studies and series at that moment and have an instance that meets the others.
        """
        ...


class QueryTags(Protocol):
    """The extended query tags."""

    def all(self) -> list[QueryTag]:
        """In the order in which they were added."""
        ...

    def add(self, wanted: Sequence[NewQueryTag], operation: NewOperation) -> OperationId:
        """Record the tags and, in the same transaction, the operation that indexes what is stored already; its cut-off
        is taken then. What is stored from then on is indexed as it is stored. Returns the operation's id.

        Raises TagExists, ReindexRunning while another operation indexes, ServiceUnavailable when there would be more
        than TAGS_MAX. Nothing is recorded then.
        """
        ...

    def enable(self, path: str, *, is_enabled: bool) -> QueryTag:
        """Let searches name a tag, or not. Idempotent. Raises NotFound."""
        ...

    def remove(self, path: str) -> None:
        """Remove a tag, at once for searches. Raises NotFound, TagBusy while its operation runs."""
        ...

    def errors(self, path: str, limit: int, offset: int) -> list[TagError]:
        """Instances whose value could not be indexed, in the order of their storing. Raises NotFound."""
        ...

    def index(self, operation_id: OperationId, contents: Mapping[int, bytes]) -> int:
        """Index, by the tags of an operation, live instances given as internal id and packed JSON; returns how many.
        What is no longer live is passed over. Idempotent.
        """
        ...

    def complete(self, operation_id: OperationId) -> None:
        """The tags of an operation are ready. Idempotent."""
        ...

    def sweep(self) -> int:
        """Remove what is left of tags that were removed; returns how many rows. May be interrupted anywhere."""
        ...


class TagError(NamedTuple):
    """An instance whose value of an extended query tag could not be indexed. `message` holds no value."""

    ref: InstanceRef
    occurred_at: datetime
    message: str


class Reindexer(Protocol):
    """What the steps of an operation that indexes do."""

    def index(
        self, operation_id: OperationId, instance_ids: Sequence[int], is_stopped: Callable[[], bool]
    ) -> ChunkOutcome:
        """Index a chunk of instances by the operation's tags. Idempotent; may stop early when told to."""
        ...

    def complete(self, operation_id: OperationId) -> None:
        """All is indexed. Idempotent."""
        ...


class ChangeAction(StrEnum):
    """What happened to an instance. Spellings are the wire's."""

    CREATE = "Create"
    DELETE = "Delete"
    UPDATE = "Update"


class ChangeState(StrEnum):
    """What has become of the instance version that a change is about. Spellings are the wire's."""

    CURRENT = "Current"
    REPLACED = "Replaced"
    DELETED = "Deleted"


class Change(NamedTuple):
    """One entry of the change feed. `instance_id`: of the live instance, where this change made it."""

    sequence: int
    ref: InstanceRef
    action: ChangeAction
    state: ChangeState
    occurred_at: datetime
    instance_id: int | None


class ChangeFeed(Protocol):
    """Every store, replacement and deletion, in commit order: the numbers of `InstanceIndex`, one entry each. What a
    reader has seen up to a number is all that there will ever be up to it.
    """

    def changes(
        self, after: int, limit: int, since: datetime | None = None, before: datetime | None = None
    ) -> list[Change]:
        """Entries with higher numbers than `after`, lowest first, at most `limit`.

        With a time (from `since` on, earlier than `before`) `after` is how many of the window's entries are left out;
        nothing will still be added to a window that has passed.
        """
        ...

    def latest_change(self) -> Change | None:
        """The last entry; None where nothing ever happened."""
        ...


@dataclass(frozen=True, slots=True)
class NewOperation:
    """What `OperationStore.create` records."""

    id: OperationId
    cutoff: int
    source: DecidedSource
    destination: dict[str, object]
    sealed_secret: str | None
    log_href: str
    log_etag: str | None
    fingerprint: str
    idempotency_key: str | None
    created_by: str = ""
    type: OperationType = OperationType.EXPORT
    query: Mapping[str, object] | None = None
    """Of an operation that indexes: `{"tags": [path]}`. Its source is everything."""


@dataclass(frozen=True, slots=True)
class OperationLimits:
    """How many operations may be active at the same time. The second one does not hold for callers without a key:
    where there is no sign-in, everybody is one caller.
    """

    in_all: int
    per_caller: int


class ChunkPosition(NamedTuple):
    """How far planning is, and in which generation: `resume` is opaque text of the planner's."""

    next_number: int
    resume: str | None
    is_planned: bool
    generation: int


class LogState(NamedTuple):
    """What is known of the error log at the destination."""

    etag: str | None
    lines_written: int
    bytes_written: int
    written_at: datetime
    failures: int


class OperationStore(Protocol):
    """The operations, their chunks and their failures. Every method is one durable transaction."""

    def create(self, operation: NewOperation) -> Operation:
        """Record a new operation, or return the one that has the same idempotency key.

        Raises IdempotencyKeyReused when that one's fingerprint differs, TooManyOperations.
        """
        ...

    def find_by_key(self, idempotency_key: str, fingerprint: str) -> Operation | None:
        """The operation that was created with this key. Raises IdempotencyKeyReused as `create` does."""
        ...

    def get(self, operation_id: OperationId) -> Operation:
        """Raises NotFound."""
        ...

    def ensure_room(self, created_by: str) -> None:
        """Raises TooManyOperations when `create` would. Spares the destination a needless proof."""
        ...

    def page(
        self,
        limit: int,
        before: tuple[datetime, str] | None,
        status: frozenset[OperationStatus] | None,
        created_by: str | None = None,
    ) -> list[Operation]:
        """Operations, newest first, older than (created at, id) `before`; of one creator, or of all."""
        ...

    def active(self) -> list[OperationId]:
        """Those that have not ended, oldest first."""
        ...

    def oldest_active_cutoff(self) -> int | None:
        """The lowest cut-off that an operation which has not ended still needs."""
        ...

    def source(self, operation_id: OperationId) -> DecidedSource:
        """What it is about, as it was recorded."""
        ...

    def sealed_secret(self, operation_id: OperationId) -> str | None:
        """The sealed secret; None when there was none or it has been erased."""
        ...

    def begin(self, operation_id: OperationId) -> OperationStatus:
        """NOT_STARTED becomes RUNNING. Idempotent; returns the status as it is then."""
        ...

    def plan_position(self, operation_id: OperationId) -> ChunkPosition:
        """Where planning goes on."""
        ...

    def save_plan(
        self,
        operation_id: OperationId,
        position: ChunkPosition,
        chunks: Sequence[PlannedChunk],
        failures: Sequence[Sequence[ExportFailure]],
        following: ChunkPosition,
    ) -> bool:
        """Append chunks and move on to `following`. Does nothing and returns False when planning is no longer at
        `position` (somebody else got here, or the operation was resumed) or the operation no longer runs. A chunk of
        unmatched identifiers is done at once, with its `failures`.
        """
        ...

    def runnable(self, operation_id: OperationId, window: int, first: int = 0, last: int | None = None) -> list[int]:
        """Numbers, from `first` to `last`, of planned chunks that may be queued: chunk n may once chunk n - `window`
        is done. May name a chunk again; queueing is idempotent.
        """
        ...

    def claim_chunk(self, operation_id: OperationId, generation: int, number: int) -> ClaimedChunk | None:
        """Take a chunk with a new attempt number, from whoever had it. None when it is done, the operation no longer
        runs (a chunk that was in flight then counts as stopped), or `generation` is not its present one.
        """
        ...

    def commit_chunk(self, chunk: ClaimedChunk, outcome: ChunkOutcome) -> bool:
        """Counters, failures and the chunk's state in one transaction. False, and no effect, when the attempt is not
        the current one or the chunk was committed already. What is not complete although the operation runs is planned
        again.
        """
        ...

    def stop(
        self,
        operation_id: OperationId,
        into: OperationStatus,
        error: OperationError | None,
        generation: int | None = None,
    ) -> Operation:
        """Move a running operation to FAILING or CANCELING; anything else, also one that has left `generation` behind,
        is left as it is and returned.
        """
        ...

    def statuses(self, operation_ids: Sequence[OperationId]) -> dict[OperationId, OperationStatus]:
        """The present status of each; one query."""
        ...

    def is_settled(self, operation_id: OperationId) -> bool:
        """Whether only the finish is missing: every chunk is done, or it was stopped and nothing is in flight."""
        ...

    def failures(
        self, operation_id: OperationId, after: tuple[int, int], limit: int
    ) -> list[tuple[int, ExportFailure]]:
        """(chunk number, failure) ordered by chunk and position, of committed chunks only, after a place."""
        ...

    def log_state(self, operation_id: OperationId) -> LogState: ...

    def save_log_state(self, operation_id: OperationId, etag: str | None, lines: int, size: int) -> None:
        """Remember what was written to the log last."""
        ...

    def finish(self, operation_id: OperationId) -> Operation:
        """Enter the terminal state that belongs to the present one and erase the secret. Idempotent."""
        ...

    def unfinished(self, operation_id: OperationId, after: int, limit: int) -> list[tuple[int, Sequence[int]]]:
        """Number and instance ids of chunks that are not done, by number, above `after`."""
        ...

    def resume(self, operation_id: OperationId, generation: int, sealed_secret: str | None) -> Operation | None:
        """Let an operation that failed or was canceled run again, as its next generation and with this secret.

        Chunks that are not done are planned again; what a stopped one had counted is taken back, with its failures.
        None, and no effect, when `generation` is no longer the present one or the operation is in another state: of
        two that resume it, one does. Raises NotFound, TooManyOperations.
        """
        ...

    def purge(self, ended_before: datetime) -> list[OperationId]:
        """Remove operations that ended before a time, with their chunks and failures; return which."""
        ...


class Destination(Protocol):
    """Where an export writes. Built for one operation; safe for many threads.

    Keys are slash separated. Every method raises DestinationFault, with its kind decided.
    """

    def put(self, key: str, content: bytes) -> None:
        """Create or overwrite an instance. Idempotent."""
        ...

    def put_stream(self, key: str, blocks: Iterator[bytes], size: int) -> None:
        """As `put`, for content that is too large for memory. Nothing becomes visible when `blocks` raises; that
        exception is raised again.
        """
        ...

    def flush(self, keys: Iterable[str]) -> None:
        """Return once these objects are durable. After a fault they must be put again, not only flushed again."""
        ...

    def create_log(self, key: str) -> str | None:
        """Create an empty log, and return its ETag. A log that exists already is a fault."""
        ...

    def write_log(self, key: str, blocks: Iterable[bytes], *, if_match: str | None) -> str | None:
        """Replace the log if its ETag is still `if_match` (None: whatever it is) and return the new one.

        Raises LogOutdated when it is not.
        """
        ...

    def remove_log(self, key: str) -> bool:
        """Remove the log if that is allowed, and return whether it was. Never raises."""
        ...

    def close(self) -> None:
        """Let go of connections."""
        ...


class LogOutdated(Exception):
    """The error log at the destination is not the one that was written last."""


class DestinationFactory(Protocol):
    """Checks and opens destinations."""

    def parse(self, type_: str, settings: Mapping[str, object]) -> DestinationSpec:
        """Read a caller's destination and refuse what is malformed or what the service's settings do not allow,
        without touching the network. Raises DestinationRefused that names the member.
        """
        ...

    def log_href(self, spec: DestinationSpec, key: str) -> str:
        """Where a caller finds the log: a URL without secrets, or a path relative to the root."""
        ...

    def open(self, spec: DestinationSpec) -> Destination:
        """Raises DestinationRefused."""
        ...


class SecretBox(Protocol):
    """Seals secrets for the database."""

    def seal(self, secret: str, bound_to: str) -> str:
        """Encrypt and authenticate; opens only for the same `bound_to`."""
        ...

    def open(self, sealed: str, bound_to: str) -> str:
        """Raises ConfigurationError when the key is not among the configured ones."""
        ...


class DurableEngine(Protocol):
    """Runs operations to their end, whatever dies on the way."""

    def start(self, operation_id: OperationId, generation: int) -> None:
        """Begin, or go on with, an operation that the store holds. Idempotent. What the store holds is begun anyway,
        if later: an error here is none of the caller's.
        """
        ...

    def settle(self, operation_id: OperationId, generation: int) -> None:
        """Finish the operation if nothing of it is in flight. Idempotent."""
        ...


class ManagedIdentity(Protocol):
    """The service's identity: a stored switch, and tokens while it is on. Safe for many threads."""

    def is_enabled(self) -> bool:
        """Whether the operator has switched it on; off at first, the same for all processes."""
        ...

    def set_enabled(self, *, on: bool) -> None:
        """Durable on return. Idempotent. Raises IdentityUnavailable, and stays off, where the host has no identity."""
        ...

    def describe(self) -> IdentityDescription:
        """What a fresh enough token says. Raises IdentityDisabled, IdentityUnavailable (what the host lacks)."""
        ...

    def token(self) -> AccessToken:
        """A token for the storage service with enough life left for a request; kept, renewed in time, and asked for
        once however many threads need it. Raises IdentityUnavailable, IdentityDisabled.
        """
        ...

    def discard(self, token: AccessToken) -> None:
        """Forget a token that the storage service did not accept; a newer one stays."""
        ...


class TokenVerifier(Protocol):
    """Checks callers' bearer tokens."""

    def verify(self, token: str) -> Caller:
        """The caller that a valid token stands for. Raises Unauthenticated, ServiceUnavailable when the issuer's keys
        cannot be fetched.
        """
        ...


class AuditTrail(Protocol):
    """Where it is recorded who did what. No patient data, no secrets."""

    def record(self, event: str, **fields: object) -> None:
        """Append one line. Never raises."""
        ...
