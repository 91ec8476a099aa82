"""The SQL index and its double in memory keep the same contract."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from dicom_depot.adapters.database import Database
from dicom_depot.adapters.index_sql import SqlIndex
from dicom_depot.adapters.search_sql import SqlSearch
from dicom_depot.domain.identifiers import SeriesRef, parse_identifier
from dicom_depot.domain.search import SERIES_UID, STUDY_UID, Condition, Exactly, Level, SearchQuery
from dicom_depot.testing.index_contract import InstanceIndexContract, make_record
from dicom_depot.testing.memory import MemoryIndex


class TestSqlIndex(InstanceIndexContract[SqlIndex]):
    _folder: Path
    _numbers = itertools.count()

    @pytest.fixture(autouse=True)
    def _own_folder(self, tmp_path: Path) -> None:
        self._folder = tmp_path

    def make_index(self) -> SqlIndex:
        database = Database(self._folder / f"{next(self._numbers)}.sqlite")
        database.migrate()
        return SqlIndex(database)

    def series_id(self, index: SqlIndex, identifier: str) -> int:
        study, series_uid = identifier.split("/")
        asked = SearchQuery(
            Level.SERIES, (Condition(STUDY_UID, Exactly((study,))), Condition(SERIES_UID, Exactly((series_uid,))))
        )
        [found] = SqlSearch(index._database).snapshot(asked)[1]
        return found

    def test_two_processes_worth_of_connections_see_one_index(self) -> None:
        first = self.make_index()
        second = SqlIndex(Database(first._database.path))
        first.add([make_record("1/2/3")])
        assert second.unmatched([parse_identifier("1/2/3")], second.sequence()) == []
        second.add([make_record("1/2/4")])
        assert first.totals(first.sequence()) == (2, 200)


class TestMemoryIndex(InstanceIndexContract[MemoryIndex]):
    def make_index(self) -> MemoryIndex:
        return MemoryIndex()

    def series_id(self, index: MemoryIndex, identifier: str) -> int:
        ref = parse_identifier(identifier)
        assert isinstance(ref, SeriesRef)
        return index.series_id(ref)
