"""Metadata of instances that were stored without it: the service fills it in by itself, whatever dies on the way."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from dicom_depot.adapters.catalog_sql import SqlCatalog
from dicom_depot.adapters.database import Database
from dicom_depot.adapters.folder_store import FolderBlobStore
from dicom_depot.codec.dicom_json import read_instance, unpack_json
from dicom_depot.domain.errors import SourceFault
from dicom_depot.domain.identifiers import parse_identifier
from dicom_depot.services.metadata import InstanceUrl, MetadataReader
from dicom_depot.testing.samples import many_small
from tests.durability.processes import is_alive
from tests.support.archive import Archive, import_in_process
from tests.support.service import RunningService

_COUNT = 3000
_INSTANCES_OF_STUDY = 100
_FILL_SECONDS = 60.0
_PASSED_OVER = "MetadataReader.fill passes over, for good, what it cannot read while the store is away"


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Archive:
    """An archive as a release without metadata left it."""
    samples = many_small(_COUNT, 1200, instances_per_series=50, series_per_study=2)
    archive = import_in_process(tmp_path_factory.mktemp("imported"), samples)
    assert _metadata_count(archive) == _COUNT
    _strip(archive)
    return archive


@pytest.fixture
def archive(imported: Archive, tmp_path: Path) -> Archive:
    return imported.copy_to(tmp_path / "data")


@pytest.fixture
def service(archive: Archive) -> Iterator[RunningService]:
    """Not started yet."""
    made = RunningService(archive.data_dir)
    yield made
    made.stop()


def _query(archive: Archive, statement: str) -> Any:
    with closing(sqlite3.connect(archive.data_dir / "depot.sqlite", timeout=30)) as connection:
        found = connection.execute(statement).fetchone()
        connection.commit()
    return None if found is None else found[0]


def _strip(archive: Archive) -> None:
    _query(archive, "DELETE FROM instance_metadata")
    _query(archive, "DELETE FROM counters WHERE name = 'metadata'")


def _metadata_count(archive: Archive) -> int:
    return int(_query(archive, "SELECT count(*) FROM instance_metadata"))


def _position(archive: Archive) -> int:
    return int(_query(archive, "SELECT value FROM counters WHERE name = 'metadata'") or 0)


def _wait_until(is_true: Callable[[], bool], why: str) -> None:
    deadline = time.monotonic() + _FILL_SECONDS
    while not is_true():
        assert time.monotonic() < deadline, why
        time.sleep(0.005)


def _wait_until_filled(archive: Archive) -> None:
    last = int(_query(archive, "SELECT max(id) FROM instances WHERE deleted_sequence = 0"))
    _wait_until(lambda: _position(archive) >= last, "the back-fill does not end")


def _store_path(archive: Archive, identifier: str) -> Path:
    uid = identifier.rpartition("/")[2]
    key = _query(archive, f"SELECT store_key FROM instances WHERE sop_instance_uid = '{uid}'")  # noqa: S608  (a UID)
    return archive.settings.store_path / str(key)


def _studies(archive: Archive) -> list[str]:
    return list(dict.fromkeys(ref.split("/")[0] for ref in archive.identifiers))


def _path(identifier: str) -> str:
    return "/v2/studies/{}/series/{}/instances/{}".format(*identifier.split("/"))


def _expected(service: RunningService, archive: Archive, study: str) -> dict[str, Any]:
    """By SOP instance UID what the files themselves say."""
    contents = {ref: content for ref, content in archive.contents.items() if ref.startswith(f"{study}/")}
    assert len(contents) == _INSTANCES_OF_STUDY
    found = {}
    for ref, content in contents.items():
        packed = read_instance(content, len(content)).metadata.dicom_json
        found[ref.rpartition("/")[2]] = json.loads(unpack_json(packed, service.url + _path(ref)))
    return found


def _answered(service: RunningService, study: str) -> dict[str, Any]:
    answer = httpx.get(f"{service.url}/v2/studies/{study}/metadata", timeout=30)
    assert answer.status_code == 200, answer.text
    entries = answer.json()
    assert len(entries) == _INSTANCES_OF_STUDY
    return {entry["00080018"]["Value"][0]: entry for entry in entries}


def _kill(service: RunningService) -> None:
    workers = service.workers()
    for worker in workers:
        os.kill(worker, signal.SIGKILL)
    service.kill_parent()
    _wait_until(lambda: not any(map(is_alive, workers)), "a killed process still runs")


def test_after_the_start_the_service_fills_in_what_lacks_and_needs_no_file_any_more(
    service: RunningService, archive: Archive
) -> None:
    studies = _studies(archive)
    expected = {study: _expected(service, archive, study) for study in (studies[0], studies[7], studies[-1])}
    service.start()
    early = _metadata_count(archive)
    while _metadata_count(archive) < _COUNT:  # also while it runs, from the files of what it has not come to
        for study, entries in expected.items():
            assert _answered(service, study) == entries
    print(f"{early} of {_COUNT} were filled when the service answered")
    _wait_until_filled(archive)
    assert _metadata_count(archive) == _COUNT
    store = archive.settings.store_path
    store.rename(store.with_name("away"))
    for study, entries in expected.items():
        assert _answered(service, study) == entries
    assert httpx.get(service.url + _path(archive.identifiers[0]), timeout=30).status_code == 503, "the files are away"
    store.with_name("away").rename(store)


def test_killed_in_the_middle_the_next_start_goes_on_where_it_was(service: RunningService, archive: Archive) -> None:
    service.launch()
    _wait_until(lambda: _position(archive) > 0, "the back-fill does not begin")
    _kill(service)
    position, count = _position(archive), _metadata_count(archive)
    print(f"killed at {count} of {_COUNT}")
    assert 0 < count == position < _COUNT, "rows and position are written together"
    # What is done already is not looked at again: a row that is taken away from there stays away.
    taken = int(_query(archive, "SELECT min(instance_id) FROM instance_metadata"))
    _query(archive, f"DELETE FROM instance_metadata WHERE instance_id = {taken}")  # noqa: S608  (a number)
    service.start()
    study = _studies(archive)[0]
    assert _answered(service, study) == _expected(service, archive, study)
    _wait_until_filled(archive)
    assert _metadata_count(archive) == _COUNT - 1
    study = _studies(archive)[-1]
    assert _answered(service, study) == _expected(service, archive, study)


def test_instances_that_are_gone_or_damaged_do_not_stop_it(service: RunningService, archive: Archive) -> None:
    studies = _studies(archive)
    refs = archive.identifiers
    missing, damaged = refs[5], refs[1005]
    _store_path(archive, missing).unlink()
    _store_path(archive, damaged).unlink()  # not in place: other archives share the file
    _store_path(archive, damaged).write_bytes(b"not DICOM at all")
    service.start()
    _wait_until_filled(archive)
    assert _metadata_count(archive) == _COUNT - 1, "what could not be read is not kept as if it had been"
    for study, broken in ((studies[0], missing), (studies[10], damaged)):
        expected, answered = _expected(service, archive, study), _answered(service, study)
        study_uid, series_uid, uid = broken.split("/")
        bare = answered.pop(uid)
        names = {"0020000D": study_uid, "0020000E": series_uid, "00080018": uid}
        assert {tag: bare[tag]["Value"] for tag in names} == {tag: [value] for tag, value in names.items()}
        del expected[uid]
        assert answered == expected
    assert _answered(service, studies[-1]) == _expected(service, archive, studies[-1])


@pytest.fixture
def small(small_archive: Archive, tmp_path: Path) -> Archive:
    copy = small_archive.copy_to(tmp_path / "small")
    _strip(copy)
    return copy


@contextmanager
def _opened_reader(archive: Archive) -> Iterator[MetadataReader]:
    database = Database(archive.settings.database_path)
    try:
        store = FolderBlobStore(archive.settings.store_path, may_create=False)
        yield MetadataReader(SqlCatalog(database), store)
    finally:
        database.close()


def _assert_all_described(archive: Archive, reader: MetadataReader) -> None:
    """Whether from the index or from the files: as the files say."""
    url_of = InstanceUrl("http://there")
    for study in _studies(archive):
        found, after = reader._catalog.instances(parse_identifier(study), None, 1000)
        assert after is None
        entries = json.loads(b"".join(reader.json_array(iter(found), url_of)))
        contents = [archive.contents[str(each.ref)] for each in found]
        packed = [read_instance(content, len(content)).metadata.dicom_json for content in contents]
        assert entries == [
            json.loads(unpack_json(each, url_of(instance))) for each, instance in zip(packed, found, strict=True)
        ]


def test_a_store_that_is_away_meanwhile_loses_nothing_of_the_back_fill(small: Archive) -> None:
    folder = small.settings.store_path
    with _opened_reader(small) as reader:
        folder.rename(folder.with_name("away"))
        folder.mkdir()  # the empty mount point
        stopped = threading.Event()
        timer = threading.Timer(2, stopped.set)  # it may wait for the store to come back
        timer.start()
        with suppress(SourceFault):
            reader.fill(stopped)
        timer.cancel()
        assert _metadata_count(small) == 0
        folder.rmdir()
        folder.with_name("away").rename(folder)
        assert reader.fill(threading.Event()) == len(small.contents)
        _assert_all_described(small, reader)


def test_what_was_missing_during_the_back_fill_is_described_once_it_was_restored(small: Archive) -> None:
    path = _store_path(small, small.identifiers[7])
    with _opened_reader(small) as reader:
        path.rename(path.with_suffix(".backup"))
        reader.fill(threading.Event())
        path.with_suffix(".backup").rename(path)
        _assert_all_described(small, reader)
