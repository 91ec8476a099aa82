"""The SQL operation store keeps its contract."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from dicom_depot.adapters.database import Database
from dicom_depot.adapters.operations_sql import SqlOperations
from dicom_depot.domain.export import PlannedChunk
from dicom_depot.ports import ChunkPosition
from dicom_depot.testing.chunks_contract import ChunkContract
from dicom_depot.testing.operations_contract import OperationStoreContract, claimed, new_operation, outcome


class _Made:
    _folder: Path
    _numbers = itertools.count()

    @pytest.fixture(autouse=True)
    def _own_folder(self, tmp_path: Path) -> None:
        self._folder = tmp_path

    def make_operations(self) -> SqlOperations:
        database = Database(self._folder / f"{next(self._numbers)}.sqlite")
        database.migrate()
        return SqlOperations(database)


class TestSqlOperations(_Made, OperationStoreContract[SqlOperations]):
    pass


class TestSqlChunks(_Made, ChunkContract[SqlOperations]):
    def test_what_was_committed_is_there_for_the_next_process(self) -> None:
        operations = self.make_operations()
        id_ = operations.create(new_operation()).id
        operations.begin(id_)
        following = ChunkPosition(1, None, True, generation=1)
        operations.save_plan(id_, ChunkPosition(0, None, False, generation=1), [PlannedChunk([4], 1)], [[]], following)
        late = claimed(operations, id_, 0)
        next_process = SqlOperations(Database(operations._database.path))
        assert next_process.commit_chunk(claimed(next_process, id_, 0), outcome(1))
        assert not operations.commit_chunk(late, outcome(1))
        assert operations.get(id_) == next_process.get(id_)
        assert operations.get(id_).exported == 1
