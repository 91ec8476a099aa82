"""What is deleted or replaced while an export runs, and what is swept when."""

from __future__ import annotations

import sqlite3
import time
from contextlib import closing
from datetime import timedelta
from pathlib import Path

import pytest

from dicom_depot.adapters.database import Database
from dicom_depot.adapters.operations_sql import SqlOperations
from dicom_depot.adapters.query_tags_sql import SqlQueryTags
from dicom_depot.config import Settings
from dicom_depot.domain.errors import NotFound
from dicom_depot.domain.export import DestinationSpec, Everything, ExportSpecification, Listed
from dicom_depot.domain.identifiers import parse_identifier
from dicom_depot.domain.operation import OperationId
from dicom_depot.services.ingest import find_files, ingest
from dicom_depot.services.upkeep import Upkeep
from dicom_depot.wiring import Service, open_service, open_stores, prepare_import
from tests.durability.conftest import ServeArchive
from tests.support.archive import Archive, instance_keys, read_folder
from tests.support.fault_endpoint import Delay, FaultEndpoint, Rule
from tests.support.service import RunningService, azure_destination

_CONTAINER = "exports"


def _upkeep(settings: Settings, **changed: timedelta) -> Upkeep:
    """What the service does now and then, told to do it at once."""
    store, index = open_stores(settings)
    database = Database(settings.database_path)
    operations = SqlOperations(database)
    times = {"retention": timedelta(days=1), "delete_delay": timedelta(0)} | changed
    return Upkeep(index, store, operations, times["retention"], times["delete_delay"], SqlQueryTags(database))


def _restore(archive: Archive, folder: Path, contents: dict[str, bytes]) -> None:
    folder.mkdir()
    for number, content in enumerate(contents.values()):
        (folder / str(number)).write_bytes(content)
    summary = ingest(find_files([folder]), prepare_import(archive.settings), processes=0)
    assert summary.stored == len(contents)


def _changed(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 0xFF])


def _begin_slowly(service: RunningService, endpoint: FaultEndpoint) -> tuple[str, Rule]:
    slow = endpoint.add_rule(Rule(Delay(0.05), method="PUT", blob="*.dcm"))
    operation_id = service.begin(azure_destination(endpoint.container_url(_CONTAINER)))
    while len(endpoint.objects) < 30:
        time.sleep(0.01)
    return operation_id, slow


def _copies(endpoint: FaultEndpoint, operation_id: str) -> dict[str, bytes]:
    return endpoint.read_tree(_CONTAINER, f"{operation_id}/results/")


def test_a_delete_a_replacement_and_a_sweep_change_nothing_for_an_export_that_runs(
    serve: ServeArchive, endpoint: FaultEndpoint, tmp_path: Path
) -> None:
    service = serve(export_concurrency=4)
    archive = Archive(service.data_dir, {})
    _, index = open_stores(archive.settings)
    paths = archive.store_paths()
    before = {ref: path.read_bytes() for ref, path in paths.items()}
    refs = list(before)
    deleted, replaced = refs[120:200], {ref: _changed(before[ref]) for ref in refs[200:280]}

    operation_id, slow = _begin_slowly(service, endpoint)
    for ref in (*deleted, *replaced):
        assert index.delete(parse_identifier(ref)) == 1
    _restore(archive, tmp_path / "replacements", replaced)
    assert _upkeep(archive.settings).sweep() == 0
    assert all(path.exists() for path in paths.values())
    assert service.operation(operation_id)["status"] == "running"
    slow.enabled = False

    state = service.wait(operation_id)
    assert (state["status"], state["results"]["exported"], state["results"]["skipped"]) == ("succeeded", 300, 0)
    keys = instance_keys(operation_id, before)
    assert _copies(endpoint, operation_id) == {keys[ref]: content for ref, content in before.items()}

    # The export has ended, so nobody needs the old bytes any more.
    assert _upkeep(archive.settings, delete_delay=timedelta(hours=1)).sweep() == 0
    assert _upkeep(archive.settings).sweep() == len(deleted) + len(replaced)
    assert _upkeep(archive.settings).sweep() == 0
    assert not any(paths[ref].exists() for ref in (*deleted, *replaced))
    later = service.begin(azure_destination(endpoint.container_url(_CONTAINER)))
    assert service.wait(later)["results"]["exported"] == 220
    keys = instance_keys(later, before)
    present = {ref: content for ref, content in (before | replaced).items() if ref not in deleted}
    assert _copies(endpoint, later) == {keys[ref]: content for ref, content in present.items()}


def test_what_was_deleted_before_an_export_began_is_swept_while_it_runs(
    serve: ServeArchive, endpoint: FaultEndpoint
) -> None:
    service = serve(export_concurrency=4)
    archive = Archive(service.data_dir, {})
    _, index = open_stores(archive.settings)
    paths = archive.store_paths()
    early, late = list(paths)[:20], list(paths)[20:30]
    for ref in early:
        index.delete(parse_identifier(ref))
    operation_id, slow = _begin_slowly(service, endpoint)
    for ref in late:
        index.delete(parse_identifier(ref))
    assert _upkeep(archive.settings).sweep() == len(early)
    assert [ref for ref, path in paths.items() if not path.exists()] == early
    slow.enabled = False
    assert service.wait(operation_id)["results"]["exported"] == 280


def test_a_sweep_that_was_interrupted_is_completed_by_the_next(small_archive: Archive, tmp_path: Path) -> None:
    archive = small_archive.copy_to(tmp_path / "data")
    upkeep = _upkeep(archive.settings)
    paths = archive.store_paths()
    gone = list(paths)[:10]
    for ref in gone:
        upkeep.index.delete(parse_identifier(ref))
    paths[gone[0]].unlink()  # removed, and then the process died before the row was
    assert upkeep.sweep() == len(gone)
    assert not any(paths[ref].exists() for ref in gone)


@pytest.fixture
def service(small_archive: Archive, tmp_path: Path) -> Service:
    archive = small_archive.copy_to(tmp_path / "data")
    (tmp_path / "out").mkdir()
    return open_service(Settings(data_dir=archive.data_dir, export_root=tmp_path / "out", chunk_instances=20))


def test_the_retention_ends_operations_with_all_that_belongs_to_them_and_no_other(
    service: Service, tmp_path: Path
) -> None:
    try:
        specification = ExportSpecification(
            Listed((parse_identifier("1.2.3"),)), DestinationSpec("file", {"folder": "a"})
        )
        everything = ExportSpecification(Everything(), DestinationSpec("file", {"folder": "b"}))
        ended = [service.exports.start(each).id for each in (specification, everything)]
        for operation_id in ended:
            _wait(service, operation_id)
        settings = service.settings
        assert _rows(settings.database_path, "operation_failures") == 1
        assert _rows(settings.database_path, "operation_chunks") == 16

        _upkeep(settings, retention=timedelta(hours=1)).run()
        service._engine.purge_ended(timedelta(hours=1))
        assert [service.exports.get(operation_id).id for operation_id in ended] == ended
        assert _rows(_workflows(settings), "workflow_status") > 16

        _upkeep(settings, retention=timedelta(0)).run()
        service._engine.purge_ended(timedelta(0))
        for operation_id in ended:
            with pytest.raises(NotFound):
                service.exports.get(operation_id)
        for table in ("operations", "operation_chunks", "operation_failures"):
            assert _rows(settings.database_path, table) == 0
        for table in ("workflow_status", "operation_outputs"):
            assert _rows(_workflows(settings), table) == 0
        assert len(read_folder(tmp_path / "out" / "b")) == 301, "what was exported is not ours to remove"

        again = service.exports.start(everything).id
        _wait(service, again)
        assert service.exports.get(again).exported == 300
    finally:
        service.close()


def _wait(service: Service, operation_id: OperationId) -> None:
    deadline = time.monotonic() + 60
    while not service.exports.get(operation_id).status.is_terminal:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _workflows(settings: Settings) -> Path:
    return settings.data_dir / "workflows.sqlite"


def _rows(database: Path, table: str) -> int:
    with closing(sqlite3.connect(database)) as connection:
        return int(connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0])  # noqa: S608  (fixed names)
