"""Whether the index and the store agree: missing, damaged and unreadable objects, orphans, leftovers.

How it stays small. 50 million keys do not fit into memory and neither side can be asked by key, so both are listed
once, each into the same scratch files, chosen by the key's folder; then one file after the other is joined in memory.
That takes about 200 bytes of scratch disk an instance and, for 50 million, about 150 MB of memory. Objects of one
folder meet in one file and are read in the order of their names.

What may change meanwhile. An import writes an object first and its row later; a sweep removes an object first and its
row later. So the store is listed before the index, whatever looks wrong is looked at once more before it counts, and
what is young is never taken for an orphan.
"""

from __future__ import annotations

import hashlib
import itertools
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import IO, NamedTuple, TypeVar

from dicom_depot.domain.errors import FaultKind, SourceFault
from dicom_depot.ports import BlobStore, IndexEntry, InstanceIndex, StoreEntry

YOUNG_SECONDS = 3600.0
"""An object younger than this may belong to an import that has not added its row yet."""

_FILES = 256
_IN_MEMORY_BYTES = 64 * 1024
_PAGE_ROWS = 2000
_BLOCK_BYTES = 1 << 20
_READERS = 4
_BATCH = 256

_T = TypeVar("_T")


class ProblemKind(StrEnum):
    """What is wrong with an object. Spellings are printed for machines: only ever added to."""

    MISSING = "missing"
    WRONG_SIZE = "wrongSize"
    WRONG_CHECKSUM = "wrongChecksum"
    UNREADABLE = "unreadable"
    ORPHAN = "orphan"
    LEFTOVER = "leftover"


REPAIRABLE = frozenset({ProblemKind.ORPHAN, ProblemKind.LEFTOVER})
"""What no row points at. Everything else needs a backup: bytes that are gone cannot be made again."""


class CheckProblem(NamedTuple):
    """One thing that is wrong. `identifier` is that of the instance, None where there is none."""

    kind: ProblemKind
    store_key: str
    identifier: str | None
    explanation: str
    is_repaired: bool = False


class Phase(StrEnum):
    """What a check is at."""

    STORE = "listing the store"
    INDEX = "listing the index"
    OBJECTS = "checking objects"


@dataclass(slots=True)
class CheckSummary:
    """What was looked at and found so far. `young` objects without a row are left for a later check."""

    phase: Phase = Phase.STORE
    objects: int = 0
    instances: int = 0
    bytes_total: int = 0
    checked: int = 0
    bytes_checked: int = 0
    young: int = 0
    found: Counter[ProblemKind] = field(default_factory=Counter)
    repaired: Counter[ProblemKind] = field(default_factory=Counter)

    @property
    def remaining(self) -> int:
        """Problems that are still there."""
        return self.found.total() - self.repaired.total()


@dataclass(slots=True)
class Check:
    """One check. Writes nothing but scratch files, unless `repair` is set: then orphans and leftovers are removed.

    scratch: a folder with room for the lists. older_than_seconds: what changed later is never an orphan.
    """

    index: InstanceIndex
    store: BlobStore
    scratch: Path
    checksums: bool = True
    repair: bool = False
    older_than_seconds: float = YOUNG_SECONDS
    on_problem: Callable[[CheckProblem], None] = lambda _problem: None
    on_progress: Callable[[CheckSummary], None] = lambda _summary: None
    summary: CheckSummary = field(default_factory=CheckSummary)
    _last_row: int = 0

    def run(self) -> CheckSummary:
        """Check everything. Raises SourceFault (TRANSIENT) when the store is away: nothing is concluded from that."""
        old_before = time.time() - self.older_than_seconds
        with ExitStack() as files, ThreadPoolExecutor(_READERS, "check") as pool:
            scratch = _Scratch(self.scratch, files)
            for entry in self.store.entries():
                scratch.add(entry.key, f"o\t{entry.key}\t{entry.size}\t{entry.modified_at}\n")
                self.summary.objects += 1
                self._tell(self.summary.objects)
            self.summary.phase = Phase.INDEX
            for row in self._rows_after(0):
                self._last_row = row.instance_id
                scratch.add(row.store_key, _row_line(row, with_checksum=self.checksums))
                if not row.is_deleted:
                    self.summary.instances += 1
                    self.summary.bytes_total += row.size
                self._tell(self.summary.instances)
            self.summary.phase = Phase.OBJECTS
            for lines in scratch.parts():
                self._join(lines, old_before, pool)
        self.on_progress(self.summary)
        return self.summary

    def _join(self, lines: Iterable[str], old_before: float, pool: ThreadPoolExecutor) -> None:
        objects: dict[str, StoreEntry] = {}
        rows: list[_Row] = []
        for line in lines:
            kind, key, *values = line.rstrip("\n").split("\t")
            match kind, values:
                case "o", [size, modified_at]:
                    objects[key] = StoreEntry(key, int(size), float(modified_at))
                case "d", _:
                    rows.append(_Row(key, 0, 0, None, is_deleted=True))
                case _, [size, row_id, sha256]:
                    rows.append(_Row(key, int(size), int(row_id), bytes.fromhex(sha256) or None))
        rows.sort()
        to_check = []
        for row in rows:
            found = objects.pop(row.store_key, None)
            if not row.is_deleted:
                to_check.append((row, found))
        for batch in _batches(to_check):
            results = zip(batch, pool.map(lambda pair: self._look_at(*pair), batch), strict=True)
            for (row, _), wrong in results:
                self.summary.checked += 1
                self.summary.bytes_checked += row.size
                if wrong is not None:
                    self._report_instance(row, *wrong)
            self.on_progress(self.summary)
        self._sort_out([entry for _, entry in sorted(objects.items())], old_before)

    def _look_at(self, row: _Row, found: StoreEntry | None) -> tuple[ProblemKind, str] | None:
        """What is wrong with an instance's object, if anything."""
        if found is not None and found.size != row.size:
            return ProblemKind.WRONG_SIZE, f"{found.size} bytes are stored; {row.size} were imported"
        if found is not None and row.sha256 is None:
            return None
        digest, size = hashlib.sha256(), 0
        try:
            for block in self.store.stream(row.store_key, _BLOCK_BYTES):
                digest.update(block)
                size += len(block)
        except SourceFault as fault:
            if fault.kind is not FaultKind.INSTANCE:
                raise
            if fault.code == "SourceMissing" or found is None:
                return ProblemKind.MISSING, "the object is not in the store"
            return ProblemKind.UNREADABLE, fault.message
        if size != row.size:
            return ProblemKind.WRONG_SIZE, f"{size} bytes are stored; {row.size} were imported"
        if row.sha256 is not None and digest.digest() != row.sha256:
            return ProblemKind.WRONG_CHECKSUM, "its bytes are not those that were imported (SHA-256)"
        return None

    def _report_instance(self, row: _Row, kind: ProblemKind, explanation: str) -> None:
        now = self.index.scan(row.instance_id - 1, 1)
        if not now or now[0].instance_id != row.instance_id or now[0].is_deleted:
            return  # deleted while this check ran
        self._report(CheckProblem(kind, row.store_key, now[0].identifier, explanation))

    def _sort_out(self, unknown: Sequence[StoreEntry], old_before: float) -> None:
        """Objects that no row pointed at when the index was listed."""
        if not unknown:
            return
        old = [entry for entry in unknown if entry.modified_at < old_before]
        self.summary.young += len(unknown) - len(old)
        added_since = {row.store_key for row in self._rows_after(self._last_row)} if old else set()
        for entry in old:
            if entry.key in added_since:
                continue
            kind = ProblemKind.LEFTOVER if _is_leftover(entry.key) else ProblemKind.ORPHAN
            if kind is ProblemKind.ORPHAN and not self.repair and self._is_gone(entry.key):
                continue  # swept while this check ran
            if self.repair:
                self.store.delete(entry.key)
            what = "an interrupted write left it" if kind is ProblemKind.LEFTOVER else "no instance points at it"
            self._report(CheckProblem(kind, entry.key, None, f"{entry.size} bytes; {what}", is_repaired=self.repair))

    def _report(self, problem: CheckProblem) -> None:
        self.summary.found[problem.kind] += 1
        if problem.is_repaired:
            self.summary.repaired[problem.kind] += 1
        self.on_problem(problem)

    def _is_gone(self, key: str) -> bool:
        try:
            for _ in self.store.stream(key, 1):
                break
        except SourceFault as fault:
            if fault.kind is not FaultKind.INSTANCE:
                raise
            return fault.code == "SourceMissing"
        return False

    def _rows_after(self, instance_id: int) -> Iterator[IndexEntry]:
        while rows := self.index.scan(instance_id, _PAGE_ROWS):
            yield from rows
            instance_id = rows[-1].instance_id

    def _tell(self, count: int) -> None:
        if count % _PAGE_ROWS == 0:
            self.on_progress(self.summary)


class _Row(NamedTuple):
    """An index row as the join needs it. `sha256` None: not to be checked."""

    store_key: str
    size: int
    instance_id: int
    sha256: bytes | None
    is_deleted: bool = False


class _Scratch:
    """Lines, split by the folder of the key that they begin with. The files have no names: nothing stays behind."""

    def __init__(self, folder: Path, files: ExitStack) -> None:
        self._files: list[IO[str]] = [
            files.enter_context(
                tempfile.SpooledTemporaryFile(  # noqa: SIM115  (the stack closes it)
                    _IN_MEMORY_BYTES, mode="w+", encoding="utf-8", newline="\n", dir=str(folder)
                )
            )
            for _ in range(_FILES)
        ]

    def add(self, key: str, line: str) -> None:
        folder = key.rpartition("/")[0]
        self._files[zlib.crc32(folder.encode()) % _FILES].write(line)

    def parts(self) -> Iterator[IO[str]]:
        """Each file once, from its begin; it is let go of when the next one is asked for."""
        for file in self._files:
            file.seek(0)
            yield file
            file.close()


def _row_line(row: IndexEntry, *, with_checksum: bool) -> str:
    if row.is_deleted:
        # Its bytes stay until they are swept: known, and in no way wrong, whether they are there or not.
        return f"d\t{row.store_key}\n"
    return f"r\t{row.store_key}\t{row.size}\t{row.instance_id}\t{row.sha256.hex() if with_checksum else ''}\n"


def _is_leftover(key: str) -> bool:
    """Whether the store lists an interrupted write here (`ports.BlobStore.entries`), and no object."""
    return key.endswith(".part")


def _batches(items: Sequence[_T]) -> Iterator[Sequence[_T]]:
    return itertools.takewhile(bool, (items[start : start + _BATCH] for start in range(0, len(items), _BATCH)))
