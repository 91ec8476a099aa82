"""From a specification to chunks of instances, a page at a time, in flat memory.

A page is one transaction: the chunks found, the identifiers that match nothing, and the place where the next page
begins. Planning that is interrupted goes on at that place; planning that runs twice plans nothing twice.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import assert_never

from dicom_depot.domain.export import ExportFailure, PlannedChunk, PlannedInstance, Selection, select
from dicom_depot.domain.identifiers import InstanceRef, Ref, SeriesRef, StudyRef, parse_identifier
from dicom_depot.domain.operation import OperationId
from dicom_depot.ports import ChunkPosition, InstanceIndex, OperationStore

UNMATCHED_CODE = "NotFound"

_CHUNKS_IN_PAGE = 10
_REFS_IN_PAGE = 2000
_SELECTIONS_KEPT = 4


@dataclass(frozen=True, slots=True)
class DryRun:
    """What an export would do: instances, their bytes, and the identifiers that match nothing."""

    count: int
    bytes_total: int
    unmatched: tuple[Ref, ...]


@dataclass(slots=True)
class Planner:
    """Plans operations. `chunk_instances` and `chunk_bytes` bound a chunk (one instance may exceed the bytes)."""

    index: InstanceIndex
    operations: OperationStore
    chunk_instances: int
    chunk_bytes: int
    _selections: dict[OperationId, Selection | None] = field(default_factory=dict)
    _choosing: threading.Lock = field(default_factory=threading.Lock)

    def plan_page(self, operation_id: OperationId, generation: int) -> int | None:
        """Plan the next page of an operation; returns the number of its first chunk, None when nothing was planned
        because planning is complete, somebody else is planning, or the operation no longer runs in this generation.
        """
        position = self.operations.plan_position(operation_id)
        if position.is_planned or position.generation != generation:
            self._selections.pop(operation_id, None)
            return None
        cutoff = self.operations.get(operation_id).cutoff
        page = self._next_page(self._selection(operation_id), cutoff, _Place.parse(position.resume))
        chunks = list(cut(page.instances, self.chunk_instances, self.chunk_bytes))
        failures: list[list[ExportFailure]] = [[] for _ in chunks]
        if page.unmatched:
            chunks.append(PlannedChunk(unmatched=tuple(page.unmatched)))
            failures.append(_unmatched_failures(page.unmatched))
        following = ChunkPosition(
            position.next_number + len(chunks),
            page.following.text() if page.following else None,
            page.following is None,
            generation,
        )
        saved = self.operations.save_plan(operation_id, position, chunks, failures, following)
        return position.next_number if saved else None

    def dry_run(self, identifiers: Sequence[Ref] | None) -> DryRun:
        """Count what would be exported now, without recording anything."""
        cutoff = self.index.sequence()
        if identifiers is None:
            count, size = self.index.totals(cutoff)
            return DryRun(count, size, ())
        count = size = 0
        unmatched: list[Ref] = []
        selection, place = select(identifiers), _Place()
        while True:
            page = self._next_page(selection, cutoff, place)
            count += len(page.instances)
            size += sum(instance.size for instance in page.instances)
            unmatched.extend(page.unmatched)
            if page.following is None:
                return DryRun(count, size, tuple(unmatched))
            place = page.following

    def _selection(self, operation_id: OperationId) -> Selection | None:
        with self._choosing:
            if operation_id in self._selections:
                return self._selections[operation_id]
        texts = self.operations.identifiers(operation_id)
        selection = None if texts is None else select(map(parse_identifier, texts))
        with self._choosing:
            while len(self._selections) >= _SELECTIONS_KEPT:
                self._selections.pop(next(iter(self._selections)), None)
            self._selections[operation_id] = selection
        return selection

    def _next_page(self, selection: Selection | None, cutoff: int, place: _Place) -> _Page:
        limit = _CHUNKS_IN_PAGE * self.chunk_instances
        if selection is None:
            everything = self.index.select(None, cutoff, place.after, limit)
            following = _Place(after=everything.resume_after) if everything.resume_after else None
            return _Page(everything.instances, [], following)
        if place.planned < len(selection.planned):
            refs = _of_one_kind(selection.planned, place.planned)
            unmatched = self.index.unmatched(refs, cutoff) if place.after is None else []
            found = self.index.select(refs, cutoff, place.after, limit)
            if found.resume_after is not None:
                return _Page(found.instances, unmatched, _Place(place.planned, 0, found.resume_after))
            following = _Place(place.planned + len(refs))
            return _Page(found.instances, unmatched, following.unless_past(selection))
        refs = selection.covered[place.covered : place.covered + _REFS_IN_PAGE]
        following = _Place(place.planned, place.covered + len(refs))
        return _Page([], self.index.unmatched(refs, cutoff), following.unless_past(selection))


@dataclass(frozen=True, slots=True)
class _Place:
    """Where planning goes on: identifiers of each part already dealt with, and the index's cursor within a page."""

    planned: int = 0
    covered: int = 0
    after: tuple[int, str] | None = None

    def text(self) -> str:
        return json.dumps([self.planned, self.covered, self.after])

    @staticmethod
    def parse(text: str | None) -> _Place:
        if text is None:
            return _Place()
        planned, covered, after = json.loads(text)
        return _Place(planned, covered, None if after is None else (after[0], after[1]))

    def unless_past(self, selection: Selection) -> _Place | None:
        is_past = self.planned >= len(selection.planned) and self.covered >= len(selection.covered)
        return None if is_past else self


@dataclass(frozen=True, slots=True)
class _Page:
    instances: Sequence[PlannedInstance]
    unmatched: Sequence[Ref]
    following: _Place | None


def cut(instances: Sequence[PlannedInstance], count_max: int, bytes_max: int) -> Iterator[PlannedChunk]:
    """Cut into chunks of at most `count_max` instances and, unless a single one is larger, `bytes_max` bytes."""
    ids: list[int] = []
    size = 0
    for instance in instances:
        if ids and (len(ids) >= count_max or size + instance.size > bytes_max):
            yield PlannedChunk(ids, size)
            ids, size = [], 0
        ids.append(instance.instance_id)
        size += instance.size
    if ids:
        yield PlannedChunk(ids, size)


def _of_one_kind(refs: Sequence[Ref], start: int) -> Sequence[Ref]:
    end = min(len(refs), start + _REFS_IN_PAGE)
    kind = type(refs[start])
    return [ref for ref in refs[start:end] if type(ref) is kind]


def _unmatched_failures(refs: Sequence[Ref]) -> list[ExportFailure]:
    now = datetime.now(UTC)
    return [
        ExportFailure(position, str(ref), UNMATCHED_CODE, f"{UNMATCHED_CODE}: {_explanation(ref)}", now)
        for position, ref in enumerate(refs)
    ]


def _explanation(ref: Ref) -> str:
    match ref:
        case StudyRef():
            return "no instance of this study is stored."
        case SeriesRef():
            return "no instance of this series is stored."
        case InstanceRef():
            return "this instance is not stored."
        case _:
            assert_never(ref)
