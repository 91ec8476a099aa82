"""Searching for studies, series and instances (QIDO-RS, PS3.18 section 10.6)."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

from dicom_depot.codec.qido import Extended, Search
from dicom_depot.codec.search_results import AnswerSet, answer_of, result_of
from dicom_depot.codec.search_values import loads
from dicom_depot.domain.search import Found, Level
from dicom_depot.ports import QueryTags, SearchIndex
from dicom_depot.services.metadata import MetadataReader

_ANCHORS_KEPT = 1000
_ANCHOR_SECONDS = 300.0


@dataclass(frozen=True, slots=True)
class SearchAnswer:
    """What a search found, as DICOM JSON objects. `remaining`: how many follow; None where they were not counted."""

    results: list[dict[str, Any]]
    remaining: int | None


class Anchors:
    """Where searches that are read page by page began, so that what is stored meanwhile does not move their pages.

    Results come newest first and pages are asked for by how many came before: without an anchor, each new result would
    push one of the present page into the next. Kept in memory for a while; a page that comes later is read as of now.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: OrderedDict[Hashable, tuple[int, float]] = OrderedDict()

    def set(self, key: Hashable, newest: int) -> None:
        with self._lock:
            self._known[key] = (newest, time.monotonic())
            self._known.move_to_end(key)
            while len(self._known) > _ANCHORS_KEPT:
                self._known.popitem(last=False)

    def get(self, key: Hashable) -> int | None:
        with self._lock:
            newest, used_at = self._known.get(key, (None, 0.0))
            if newest is None or time.monotonic() > used_at + _ANCHOR_SECONDS:
                return None
            self._known[key] = (newest, time.monotonic())
            self._known.move_to_end(key)
            return newest


@dataclass(slots=True)
class SearchService:
    """Answers searches."""

    index: SearchIndex
    metadata: MetadataReader
    tags: QueryTags
    _anchors: Anchors = field(default_factory=Anchors)

    def extended(self) -> Extended:
        """The extended query tags, by their tags."""
        return {tag.tag: tag for tag in self.tags.all()}

    def search(self, search: Search, answer_set: AnswerSet, studies_url: str, asked_by: Sequence[str]) -> SearchAnswer:
        """One page of results. `studies_url`: below which they are retrieved; `asked_by`: whose pages these are, the
        narrowest description first: of two who are one by the wider one, each keeps its own pages by the narrower.
        """
        keys = [(who, search.query) for who in asked_by]
        if search.offset:
            newest = next((known for key in keys if (known := self._anchors.get(key)) is not None), None)
        else:
            newest = self.index.newest(search.query.level)
            for key in keys:
                self._anchors.set(key, newest)
        page = self.index.page(search.query, search.limit, search.offset, newest)
        return SearchAnswer(self._results(search, page.found, answer_set, studies_url), page.remaining)

    def _results(
        self, search: Search, found: Sequence[Found], answer_set: AnswerSet, studies_url: str
    ) -> list[dict[str, Any]]:
        answer = answer_of(search, answer_set)
        speakers = {id_ for each in found for id_ in (each.study_speaker, each.series_speaker, each.speaker)}
        contents = {id_: loads(each.dicom_json) for id_, each in self.metadata.by_ids(sorted(speakers)).items()}
        counts = self.index.study_counts([each.study_id for each in found]) if answer.wants_counts and found else {}
        return [
            result_of(answer, each, contents, counts.get(each.study_id), _url(each, search.query.level, studies_url))
            for each in found
        ]


def _url(found: Found, level: Level, studies_url: str) -> str:
    url = f"{studies_url}/{found.ref.study_uid}"
    if level is not Level.STUDY:
        url += f"/series/{found.ref.series_uid}"
    if level is Level.INSTANCE:
        url += f"/instances/{found.ref.sop_instance_uid}"
    return url
