"""Adding extended query tags to an archive that is in use: killed, canceled and resumed, stored to and deleted from
meanwhile. In the end searches find exactly what they would find if the tags had always been there.
"""

from __future__ import annotations

import os
import signal
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from random import Random
from typing import Any

import httpx
import pytest

from dicom_depot.testing.samples import many_small
from tests.http.dicomweb.conftest import Web, make
from tests.support.archive import Archive, import_by_command
from tests.support.service import RunningService

_COUNT = 2000
_TAGS = [
    {"path": "Columns", "level": "Instance"},
    {"path": "Manufacturer", "level": "Series"},
    {"path": "InstitutionName", "level": "Study"},
    {"path": "PhotometricInterpretation", "level": "Instance"},
]
_VALUES = "SELECT name, value, owner_id FROM search_values WHERE name LIKE 'tag:%'"
_END_SECONDS = 120


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Archive:
    return import_by_command(tmp_path_factory.mktemp("reindex"), many_small(_COUNT, 1200))


@pytest.fixture
def archive(imported: Archive, tmp_path: Path) -> Archive:
    return imported.copy_to(tmp_path / "data")


@pytest.fixture
def web(archive: Archive) -> Iterator[Web]:
    service = RunningService(archive.data_dir, {"chunk_instances": 50})
    service.start()
    running = Web(service)
    yield running
    running.client.close()
    service.stop()


def _add(web: Web) -> str:
    answer = web.client.post("/v2/extendedquerytags", json=_TAGS)
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


def _state(web: Web, operation_id: str) -> dict[str, Any]:
    state: dict[str, Any] = web.client.get(f"/v2/operations/{operation_id}").json()
    return state


def _wait(web: Web, operation_id: str) -> dict[str, Any]:
    end = time.monotonic() + _END_SECONDS
    while time.monotonic() < end:
        try:
            state = _state(web, operation_id)
        except httpx.TransportError:
            state = {"status": "away"}
        if state["status"] in ("succeeded", "failed", "canceled"):
            return state
        time.sleep(0.05)
    raise TimeoutError(operation_id)


def _values(archive: Archive) -> set[tuple[str, str, int]]:
    with closing(sqlite3.connect(archive.settings.database_path)) as connection:
        return set(connection.execute(_VALUES))


def _until_some(archive: Archive, count: int) -> None:
    end = time.monotonic() + _END_SECONDS
    while len(_values(archive)) < count:
        assert time.monotonic() < end
        time.sleep(0.02)


def _expected(archive: Archive, web: Web) -> set[tuple[str, str, int]]:
    """What is there when the same tags are added in peace, under the ids that they have now."""
    present = _values(archive)
    ids = {tag["path"]: _tag_id(archive, tag["path"]) for tag in web.client.get("/v2/extendedquerytags").json()}
    for path in ids:
        assert web.client.delete(f"/v2/extendedquerytags/{path}").status_code == 204
    assert _values(archive) == set()
    assert _wait(web, _add(web))["status"] == "succeeded"
    renamed = {f"tag:{_tag_id(archive, path)}": f"tag:{id_}" for path, id_ in ids.items()}
    expected = {(renamed[name], value, owner) for name, value, owner in _values(archive)}
    assert present
    return expected


def _tag_id(archive: Archive, path: str) -> int:
    with closing(sqlite3.connect(archive.settings.database_path)) as connection:
        (id_,) = connection.execute("SELECT id FROM extended_query_tags WHERE path = ?", (path,)).fetchone()
        return int(id_)


def test_killed_again_and_again_it_goes_on_by_itself(archive: Archive, web: Web) -> None:
    random = Random(5)
    operation_id = _add(web)
    for _ in range(3):
        time.sleep(0.3 + random.random() / 2)
        for pid in web.service.workers():
            os.kill(pid, signal.SIGKILL)
        web.service.stop()
        web.service.start()
    state = _wait(web, operation_id)
    assert state["status"] == "succeeded"
    assert state["percentComplete"] == 100
    values = _values(archive)
    assert values == _expected(archive, web)


def test_canceled_it_leaves_tags_that_cannot_be_searched_and_resumed_it_completes_them(
    archive: Archive, web: Web
) -> None:
    operation_id = _add(web)
    _until_some(archive, 300)
    second = web.client.post("/v2/extendedquerytags", json=[{"path": "PatientAge", "level": "Study"}])
    assert second.status_code == 409
    assert second.headers["Location"] == f"{web.service.url}/v2/operations/{operation_id}"
    busy = web.client.delete("/v2/extendedquerytags/Manufacturer")
    assert (busy.status_code, busy.json()["code"]) == (400, "TagBusy")
    assert web.client.post(f"/v2/operations/{operation_id}/cancel").status_code in (200, 202)
    assert _wait(web, operation_id)["status"] == "canceled"
    assert len(_values(archive)) < _COUNT
    [tag, *_] = web.client.get("/v2/extendedquerytags").json()
    assert tag["status"] == "adding"
    assert web.get("/instances?Columns=117").status_code == 400
    assert web.client.post(f"/v2/operations/{operation_id}/resume").status_code == 202
    assert _wait(web, operation_id)["status"] == "succeeded"
    values = _values(archive)
    assert values == _expected(archive, web)


def test_a_canceled_one_can_be_given_up(archive: Archive, web: Web) -> None:
    operation_id = _add(web)
    _until_some(archive, 300)
    web.client.post(f"/v2/operations/{operation_id}/cancel")
    assert _wait(web, operation_id)["status"] == "canceled"
    for tag in _TAGS:
        assert web.client.delete(f"/v2/extendedquerytags/{tag['path']}").status_code == 204
    assert _values(archive) == set()


def test_what_is_stored_and_deleted_meanwhile_is_indexed_as_it_is_in_the_end(archive: Archive, web: Web) -> None:
    stop = threading.Event()
    random = Random(7)
    studies = sorted({identifier.split("/")[0] for identifier in archive.identifiers})

    def disturb() -> None:
        with httpx.Client(base_url=web.service.url, timeout=60) as client:
            while not stop.is_set():
                study = random.choice(studies)
                made = make(study=study, InstitutionName=f"I{random.random()}", Manufacturer="Maker")
                headers = {"Content-Type": "application/dicom"}
                client.post("/v2/studies", content=made.content, headers=headers).raise_for_status()
                if random.random() < 0.5:
                    identifier = random.choice(archive.identifiers)
                    study, series, sop = identifier.split("/")
                    client.delete(f"/v2/studies/{study}/series/{series}/instances/{sop}")

    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        operation_id = _add(web)
        assert _wait(web, operation_id)["status"] == "succeeded"
        time.sleep(0.5)
    finally:
        stop.set()
        thread.join()
    live = _values_of_live(archive)
    _expected(archive, web)
    assert {value for _, value, _ in live} == {value for _, value, _ in _values_of_live(archive)}
    assert len(live) == len(_values_of_live(archive))


def _values_of_live(archive: Archive) -> set[tuple[str, str, int]]:
    """Without those of deleted instances, which go when the instance is swept, and of studies that are empty."""
    live = (
        "SELECT v.name, v.value, v.owner_id FROM search_values v JOIN extended_query_tags t"
        " ON v.name = 'tag:' || t.id WHERE"
        " (t.level = 'instance' AND v.owner_id IN (SELECT id FROM instances WHERE deleted_sequence = 0))"
        " OR (t.level = 'series' AND v.owner_id IN (SELECT id FROM series WHERE instance_count > 0))"
        " OR (t.level = 'study' AND v.owner_id IN (SELECT id FROM studies WHERE instance_count > 0))"
    )
    with closing(sqlite3.connect(archive.settings.database_path)) as connection:
        return set(connection.execute(live))
