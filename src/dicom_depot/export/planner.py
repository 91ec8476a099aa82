"""From a specification to chunks of instances, a page at a time, in flat memory.

A page is one transaction: the chunks found, the identifiers that match nothing, and the place where the next page
begins. Planning that is interrupted goes on at that place; planning that runs twice plans nothing twice.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import assert_never

from dicom_depot.codec.qido import Extended, SearchResource, parse_filters
from dicom_depot.domain.errors import QueryTagGone
from dicom_depot.domain.export import (
    Answered,
    DecidedSource,
    Everything,
    ExportFailure,
    Listed,
    Matching,
    PlannedChunk,
    PlannedInstance,
    Selection,
    Source,
    select,
)
from dicom_depot.domain.identifiers import InstanceRef, Ref, SeriesRef, StudyRef
from dicom_depot.domain.operation import OperationId
from dicom_depot.domain.query_tags import QueryTag, TagStatus
from dicom_depot.domain.search import Condition, Level, SearchQuery
from dicom_depot.ports import ChunkPosition, InstanceIndex, OperationStore, QueryTags, SearchIndex, SelectionPage

UNMATCHED_CODE = "NotFound"

_CHUNKS_IN_PAGE = 10
_REFS_IN_PAGE = 2000
_CHOSEN_KEPT = 4


@dataclass(frozen=True, slots=True)
class DryRun:
    """What an export would do: instances, their bytes, and the identifiers that match nothing."""

    count: int
    bytes_total: int
    unmatched: tuple[Ref, ...]


@dataclass(frozen=True, slots=True)
class Decision:
    """What an export that begins now copies: what `source` names, as it was at the cut-off."""

    cutoff: int
    source: DecidedSource


@dataclass(frozen=True, slots=True)
class _InSeries:
    """What is left of a query that was answered: the series, and what each of their instances must meet."""

    series_ids: Sequence[int]
    conditions: tuple[Condition, ...]
    tag_ids: tuple[int, ...]


_Chosen = Everything | Selection | _InSeries


@dataclass(slots=True)
class Planner:
    """Plans operations. `chunk_instances` and `chunk_bytes` bound a chunk (one instance may exceed the bytes)."""

    index: InstanceIndex
    search: SearchIndex
    tags: QueryTags
    operations: OperationStore
    chunk_instances: int
    chunk_bytes: int
    _chosen: dict[OperationId, _Chosen] = field(default_factory=dict)
    _choosing: threading.Lock = field(default_factory=threading.Lock)

    def decide(self, source: Source) -> Decision:
        """Read the cut-off. A query is answered in the same moment, as far as its answer could change: what studies and
        series say is what their newest instances say. What instances say never changes, and is looked at page by page.

        Raises InvalidRequest, QueryTagGone.
        """
        match source:
            case Everything() | Listed():
                return Decision(self.index.sequence(), source)
            case Matching():
                tags = self.tags.all()
                conditions = _conditions(source, {tag.tag: tag for tag in tags})
                cutoff, series_ids = self.search.snapshot(SearchQuery(source.level, conditions))
                named = {condition.attribute.column for condition in conditions}
                tag_ids = tuple(tag.id for tag in tags if tag.attribute.column in named)
                self._present(tag_ids)
                return Decision(cutoff, Answered(source, series_ids, tag_ids))
            case _:
                assert_never(source)

    def plan_page(self, operation_id: OperationId, generation: int) -> int | None:
        """Plan the next page of an operation; returns the number of its first chunk, None when nothing was planned
        because planning is complete, somebody else is planning, or the operation no longer runs in this generation.

        Raises QueryTagGone.
        """
        position = self.operations.plan_position(operation_id)
        if position.is_planned or position.generation != generation:
            self._chosen.pop(operation_id, None)
            return None
        cutoff = self.operations.get(operation_id).cutoff
        page = self._next_page(self._recall(operation_id), cutoff, _Place.parse(position.resume))
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

    def dry_run(self, source: Source) -> DryRun:
        """Count what would be exported now, without recording anything. Raises as `decide`."""
        decision = self.decide(source)
        chosen = self._choose(decision.source)
        if isinstance(chosen, Everything):
            return DryRun(*self.index.totals(decision.cutoff), ())
        count = size = 0
        unmatched: list[Ref] = []
        place = _Place()
        while True:
            page = self._next_page(chosen, decision.cutoff, place)
            count += len(page.instances)
            size += sum(instance.size for instance in page.instances)
            unmatched.extend(page.unmatched)
            if page.following is None:
                return DryRun(count, size, tuple(unmatched))
            place = page.following

    def require_plannable(self, operation_id: OperationId) -> None:
        """Raises QueryTagGone where planning could not go on."""
        self._choose(self.operations.source(operation_id))

    def _recall(self, operation_id: OperationId) -> _Chosen:
        with self._choosing:
            if operation_id in self._chosen:
                return self._chosen[operation_id]
        chosen = self._choose(self.operations.source(operation_id))
        with self._choosing:
            while len(self._chosen) >= _CHOSEN_KEPT:
                self._chosen.pop(next(iter(self._chosen)), None)
            self._chosen[operation_id] = chosen
        return chosen

    def _choose(self, source: DecidedSource) -> _Chosen:
        match source:
            case Everything():
                return source
            case Listed(identifiers):
                return select(identifiers)
            case Answered(asked, series_ids, tag_ids):
                # One that was disabled since still has all of its values.
                tags = (replace(tag, status=TagStatus.READY, is_enabled=True) for tag in self._present(tag_ids))
                extended = {tag.tag: tag for tag in tags}
                conditions = _conditions(asked, extended)
                of_instances = tuple(each for each in conditions if each.attribute.level is Level.INSTANCE)
                return _InSeries(series_ids, of_instances, tag_ids)
            case _:
                assert_never(source)

    def _present(self, tag_ids: Collection[int]) -> list[QueryTag]:
        """The tags that a query meant. A tag goes before its values do: if it is there after they were read, they were
        all there. Raises QueryTagGone.
        """
        found = [tag for tag in self.tags.all() if tag.id in tag_ids] if tag_ids else []
        if len(found) < len(tag_ids):
            raise QueryTagGone(
                "The query names an extended query tag that was removed since: what it matches can no longer be told. "
                "Start a new export.",
                target="source.settings.filters",
            )
        return found

    def _next_page(self, chosen: _Chosen, cutoff: int, place: _Place) -> _Page:
        limit = _CHUNKS_IN_PAGE * self.chunk_instances
        match chosen:
            case Everything():
                return _page(self.index.select(None, cutoff, place.after, limit))
            case _InSeries(series_ids, conditions, tag_ids):
                found = self.index.select_in_series(series_ids, conditions, cutoff, place.after, limit)
                self._present(tag_ids)
                return _page(found)
            case Selection():
                return self._next_of_listed(chosen, cutoff, place, limit)
            case _:
                assert_never(chosen)

    def _next_of_listed(self, selection: Selection, cutoff: int, place: _Place, limit: int) -> _Page:
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


def _page(found: SelectionPage) -> _Page:
    """A page of what needs no identifiers to be looked up."""
    return _Page(found.instances, [], _Place(after=found.resume_after) if found.resume_after else None)


def _conditions(asked: Matching, extended: Extended) -> tuple[Condition, ...]:
    """What a query's filters mean. Raises InvalidRequest."""
    levels = SearchResource(asked.level).levels
    conditions, _ = parse_filters(asked.filters.items(), levels, extended, is_fuzzy=asked.is_fuzzy)
    return conditions


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
