"""One small export, run step by step on the real adapters, with a place for a fault at every call. No tests here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from dicom_depot.adapters.catalog_sql import SqlCatalog
from dicom_depot.adapters.database import Database
from dicom_depot.adapters.destination_guard import DestinationGuard
from dicom_depot.adapters.destinations import Destinations
from dicom_depot.adapters.folder_store import FolderBlobStore
from dicom_depot.adapters.index_sql import SqlIndex
from dicom_depot.adapters.managed_identity import AzureManagedIdentity
from dicom_depot.adapters.operations_sql import SqlOperations
from dicom_depot.adapters.query_tags_sql import SqlQueryTags
from dicom_depot.adapters.sealing import AesSecretBox
from dicom_depot.adapters.search_sql import SqlSearch
from dicom_depot.adapters.switches_sql import SqlSwitches
from dicom_depot.domain.errors import DepotError
from dicom_depot.domain.export import DestinationSpec, ExportSpecification, Listed, Matching
from dicom_depot.domain.identifiers import parse_identifier
from dicom_depot.domain.operation import Operation, OperationId
from dicom_depot.export.copier import CopyPool
from dicom_depot.export.planner import Planner
from dicom_depot.export.resume import ResumeService
from dicom_depot.export.runner import ExportRunner, Interrupted
from dicom_depot.export.service import ExportService
from dicom_depot.ports import BlobStore, Destination, InstanceIndex, OperationStore
from dicom_depot.services.metadata import MetadataReader
from dicom_depot.services.reindex import ReindexService
from dicom_depot.services.upkeep import Upkeep
from dicom_depot.testing.engine import StepEngine, WorkflowRecords
from dicom_depot.testing.faults import Crash, FaultPlan, faulty
from tests.support.archive import Archive, instance_keys, log_lines, read_folder

CHUNK_INSTANCES = 3
WINDOW = 2
RETRY_SECONDS = 20.0

_compiled: dict[Any, Any] = {}
"""Statements that were compiled already, shared by all databases: hundreds are opened."""


@dataclass(frozen=True)
class End:
    """How an export ended, in terms that do not depend on its id and its times."""

    status: str
    counters: tuple[int, ...]
    error: str | None
    tree: dict[str, bytes]
    log: list[tuple[str, str]]


@dataclass(frozen=True)
class _Destinations(Destinations):
    """Opens destinations that fail as planned."""

    faults: FaultPlan = field(default_factory=FaultPlan)

    def open(self, spec: DestinationSpec) -> Destination:
        return faulty(
            self.faults.call("destinations.open", lambda: super(_Destinations, self).open(spec)),
            "destination",
            self.faults,
        )


@dataclass
class Process:
    """What a process builds on the data folder, as `wiring` does; here without DBOS."""

    archive: Archive
    database: Database
    index: InstanceIndex
    operations: OperationStore
    store: BlobStore
    runner: ExportRunner
    engine: StepEngine
    exports: ExportService
    resumes: ResumeService
    upkeep: Upkeep


@dataclass
class Bench:
    """A data folder, an export root and the workflow records: what outlives a process."""

    archive: Archive
    root: Path
    records: WorkflowRecords = field(default_factory=WorkflowRecords)

    @contextmanager
    def process(self, faults: FaultPlan | None = None, *, is_start_faulty: bool = False) -> Iterator[Process]:
        plan = faults or FaultPlan()
        settings = self.archive.settings
        database = Database(settings.database_path)
        database.engine.update_execution_options(compiled_cache=_compiled)
        index = faulty(SqlIndex(database), "index", plan)
        operations = faulty(SqlOperations(database), "operations", plan)
        store = faulty(FolderBlobStore(settings.store_path, may_create=False), "store", plan)
        destinations = _Destinations(
            export_root=self.root,
            guard=DestinationGuard((), ()),
            allow_anonymous=False,
            request_seconds=5,
            content_md5=False,
            identity=AzureManagedIdentity(SqlSwitches(database), source="auto", client_id=None),
            faults=plan,
        )
        tags = faulty(SqlQueryTags(database), "tags", plan)
        secrets = AesSecretBox([bytes(32)])
        search = faulty(SqlSearch(database), "search", plan)
        planner = Planner(index, search, tags, operations, CHUNK_INSTANCES, 1 << 30)
        runner = ExportRunner(
            index=index,
            operations=operations,
            store=store,
            destinations=destinations,
            secrets=secrets,
            planner=planner,
            pool=CopyPool(2, 1 << 28, 1 << 25, 2),
            reindexer=ReindexService(tags, MetadataReader(SqlCatalog(database), store)),
            retry_seconds=RETRY_SECONDS,
            window=WINDOW,
        )
        engine = StepEngine(runner, operations, self.records, plan)
        exports = ExportService(
            operations=operations,
            destinations=destinations,
            secrets=secrets,
            planner=planner,
            runner=runner,
            engine=engine,
            identifiers_max=1000,
        )
        upkeep = Upkeep(
            index=index,
            store=store,
            operations=operations,
            retention=timedelta(days=1),
            delete_delay=timedelta(0),
            tags=tags,
        )
        resumes = ResumeService(
            index=index,
            store=store,
            operations=operations,
            destinations=destinations,
            secrets=secrets,
            planner=planner,
            engine=engine,
            hold_sweeps=upkeep.held,
        )
        try:
            yield Process(self.archive, database, index, operations, store, runner, engine, exports, resumes, upkeep)
        finally:
            runner.close()
            database.close()

    def start(self, *identifiers: str) -> OperationId:
        """Record an operation. Nothing of it runs before the engine does."""
        with self.process() as process:
            return process.exports.start(specification(*identifiers)).id

    def start_query(self, asked: Matching) -> OperationId:
        """The same for what a query matches now."""
        with self.process() as process:
            return process.exports.start(ExportSpecification(asked, DestinationSpec("file", {"folder": ""}))).id

    def run(self, faults: FaultPlan | None = None, processes_max: int = 5) -> int:
        """Run everything to its end, in a new process after each death; returns how many it took.

        Only the first process has the faults.
        """
        for number in range(1, processes_max + 1):
            with self.process(faults if number == 1 else None) as process:
                try:
                    process.engine.take_over()
                    process.engine.run()
                except (Crash, Interrupted):
                    continue
                return number
        raise AssertionError(f"not at its end after {processes_max} processes")

    def end(self, operation_id: OperationId) -> End:
        with self.process() as process:
            operation = process.operations.get(operation_id)
            assert process.operations.active() == []
            assert process.operations.sealed_secret(operation_id) is None
            assert not self.records.waiting
        tree = read_folder(self.root / operation_id)
        log = log_lines(tree.pop("errors.log"))
        return End(
            operation.status.value, counters(operation), operation.error.code if operation.error else None, tree, log
        )


def specification(*identifiers: str) -> ExportSpecification:
    return ExportSpecification(
        Listed(tuple(map(parse_identifier, identifiers))), DestinationSpec("file", {"folder": ""})
    )


def counters(operation: Operation) -> tuple[int, ...]:
    return (
        operation.total,
        operation.exported,
        operation.skipped,
        operation.bytes_total,
        operation.bytes_exported,
    )


def expected_tree(contents: dict[str, bytes], exported: list[str]) -> dict[str, bytes]:
    """The copies of some instances, by path below the operation's folder."""
    keys = instance_keys("", exported)
    return {keys[identifier].removeprefix("/"): contents[identifier] for identifier in exported}


class ForeignError(DepotError):
    """An error that no rule mentions."""

    code = "Foreign"
