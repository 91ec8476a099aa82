"""Deleting and replacing over HTTP while an export of the same instances runs."""

from __future__ import annotations

import sqlite3
import time
from contextlib import closing
from datetime import timedelta
from pathlib import Path

import httpx

from dicom_depot.adapters.database import Database
from dicom_depot.adapters.folder_store import FolderBlobStore
from dicom_depot.adapters.index_sql import SqlIndex
from dicom_depot.adapters.operations_sql import SqlOperations
from dicom_depot.adapters.query_tags_sql import SqlQueryTags
from dicom_depot.services.upkeep import Upkeep
from tests.durability.conftest import ServeArchive
from tests.support.archive import Archive, instance_keys
from tests.support.fault_endpoint import Delay, FaultEndpoint, Rule
from tests.support.service import RunningService, azure_destination

_CONTAINER = "exports"
_AS_STORED = {"Accept": "application/dicom; transfer-syntax=*"}
_END_SECONDS = 20.0


def _path(identifier: str) -> str:
    """`study`, `study/series` or `study/series/instance` as a resource."""
    names = ("studies", "series", "instances")
    return "/v2/" + "/".join(f"{name}/{uid}" for name, uid in zip(names, identifier.split("/"), strict=False))


def _changed(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 0xFF])


def _sweep(archive: Archive) -> int:
    """What the service's upkeep would sweep by now, without any delay."""
    database = Database(archive.settings.database_path)
    try:
        store = FolderBlobStore(archive.settings.store_path, may_create=False)
        upkeep = Upkeep(
            SqlIndex(database), store, SqlOperations(database), timedelta(days=1), timedelta(0), SqlQueryTags(database)
        )
        return upkeep.sweep()
    finally:
        database.close()


def _rows(archive: Archive) -> dict[str, Path]:
    """Where the object of each row is, be it deleted or not, by the row's internal id and identifier."""
    statement = (
        "SELECT i.id || ' ' || t.study_uid || '/' || s.series_uid || '/' || i.sop_instance_uid, i.store_key"
        " FROM instances i JOIN series s ON s.id = i.series_id JOIN studies t ON t.id = s.study_id ORDER BY i.id"
    )
    with closing(sqlite3.connect(archive.settings.database_path, timeout=30)) as connection:
        return {name: archive.settings.store_path / key for name, key in connection.execute(statement)}


def _copies(endpoint: FaultEndpoint, operation_id: str) -> dict[str, bytes]:
    return endpoint.read_tree(_CONTAINER, f"{operation_id}/results/")


def _assert_present(client: httpx.Client, present: dict[str, bytes], absent: list[str]) -> None:
    for ref, content in present.items():
        answer = client.get(_path(ref), headers=_AS_STORED)
        assert (answer.status_code, answer.content) == (200, content), ref
    for ref in absent:
        for resource in (_path(ref), f"{_path(ref)}/metadata", f"{_path(ref)}/frames/1"):
            assert client.get(resource).status_code == 404, resource


def _described(client: httpx.Client, study: str) -> set[str]:
    answer = client.get(f"{_path(study)}/metadata").raise_for_status()
    return {each["00080018"]["Value"][0] for each in answer.json()}


def test_an_export_ends_as_planned_while_half_of_a_study_is_deleted_and_another_instance_replaced(
    serve: ServeArchive, endpoint: FaultEndpoint, small_archive: Archive
) -> None:
    service = serve(export_concurrency=4)
    archive = Archive(service.data_dir, small_archive.contents)
    before = small_archive.contents
    study = archive.identifiers[0].split("/")[0]
    of_study = [ref for ref in before if ref.startswith(f"{study}/")]
    first_series, second_series = dict.fromkeys(ref.rpartition("/")[0] for ref in of_study)
    deleted = [ref for ref in of_study if ref.startswith(f"{second_series}/")]
    single, replaced, twice = [ref for ref in of_study if ref.startswith(f"{first_series}/")][-3:]
    changes = {replaced: _changed(before[replaced]), twice: before[twice][:-2] + b"\1\2"}
    assert len(of_study) == 100
    assert len(deleted) == 50
    paths = {name.split()[1]: path for name, path in _rows(archive).items()}

    slow = endpoint.add_rule(Rule(Delay(0.25), method="PUT", blob="*.dcm"))
    with httpx.Client(base_url=service.url, timeout=30) as client:
        destination = azure_destination(endpoint.container_url(_CONTAINER))
        operation_id = service.begin(destination, study)
        while len(endpoint.objects) < 10:
            time.sleep(0.01)
        assert client.delete(_path(second_series)).status_code == 204
        assert client.delete(_path(single)).status_code == 204
        assert client.delete(_path(single)).status_code == 404
        for content in (_changed(before[replaced]), _changed(before[twice]), changes[twice]):
            answer = client.put("/v2/studies", content=content, headers={"Content-Type": "application/dicom"})
            assert answer.status_code == 200, answer.text
        exported = sum(name.endswith(".dcm") for name in endpoint.objects)
        assert exported < 50, "the changes must come while most of the study has still to be copied"
        assert _sweep(archive) == 0, "the export still needs them"
        assert service.operation(operation_id)["status"] == "running"
        slow.enabled = False

        gone = [*deleted, single]
        stays = {ref: content for ref, content in (before | changes).items() if ref not in gone}
        _assert_present(client, {ref: stays[ref] for ref in stays if ref.startswith(f"{study}/")}, gone)
        assert _described(client, study) == {ref.rpartition("/")[2] for ref in of_study if ref not in gone}
        assert client.get(f"{_path(second_series)}/metadata").status_code == 404

        state = service.wait(operation_id)
        results = {name: state["results"][name] for name in ("total", "exported", "skipped")}
        assert (state["status"], results) == ("succeeded", {"total": 100, "exported": 100, "skipped": 0})
        keys = instance_keys(operation_id, of_study)
        assert _copies(endpoint, operation_id) == {keys[ref]: before[ref] for ref in of_study}

    old = [paths[ref] for ref in (*gone, *changes)]
    assert all(path.exists() for path in old)
    service.settings["delete_delay_seconds"] = 0
    service.stop()
    service.start()  # its upkeep comes first
    _assert_swept(archive, stays)
    assert not any(path.exists() for path in old)
    with httpx.Client(base_url=service.url, timeout=30) as client:
        _assert_present(client, stays, gone)
    _assert_exported_now(service, endpoint, stays)


def _assert_swept(archive: Archive, stays: dict[str, bytes]) -> None:
    """Rows and bytes of what is gone go, and nothing else does."""
    deadline = time.monotonic() + _END_SECONDS
    while len(rows := _rows(archive)) > len(stays):
        assert time.monotonic() < deadline, "not swept"
        time.sleep(0.05)
    assert sorted(name.split()[1] for name in rows) == sorted(stays)
    files = {path for path in archive.settings.store_path.glob("*/*") if path.is_file()}
    assert files == set(rows.values())


def _assert_exported_now(service: RunningService, endpoint: FaultEndpoint, stays: dict[str, bytes]) -> None:
    """A new export shows the present state."""
    operation_id = service.begin(azure_destination(endpoint.container_url(_CONTAINER)))
    assert service.wait(operation_id)["results"]["exported"] == len(stays)
    keys = instance_keys(operation_id, stays)
    assert _copies(endpoint, operation_id) == {keys[ref]: content for ref, content in stays.items()}


def test_a_whole_study_deleted_before_its_first_copy_is_exported_all_the_same(
    serve: ServeArchive, endpoint: FaultEndpoint, small_archive: Archive
) -> None:
    service = serve(export_concurrency=2)
    before = small_archive.contents
    study = small_archive.identifiers[-1].split("/")[0]
    of_study = [ref for ref in before if ref.startswith(f"{study}/")]
    slow = endpoint.add_rule(Rule(Delay(0.5), method="PUT", blob="*.dcm"))
    operation_id = service.begin(azure_destination(endpoint.container_url(_CONTAINER)), study)
    with httpx.Client(base_url=service.url, timeout=30) as client:
        assert client.delete(_path(study)).status_code == 204
        assert client.get(_path(study)).status_code == 404
        for ref in of_study[:20]:  # the same instances come again, as other bytes
            answer = client.post(
                "/v2/studies", content=_changed(before[ref]), headers={"Content-Type": "application/dicom"}
            )
            assert answer.status_code == 200, answer.text
        assert len(endpoint.objects) < 20
        slow.enabled = False
        assert service.wait(operation_id)["results"]["exported"] == len(of_study) == 100
        keys = instance_keys(operation_id, of_study)
        assert _copies(endpoint, operation_id) == {keys[ref]: before[ref] for ref in of_study}
        _assert_present(client, {ref: _changed(before[ref]) for ref in of_study[:20]}, of_study[20:25])
