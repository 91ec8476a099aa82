"""One engine for each data folder, and what becomes of it when its processes are told to end, or die."""

from __future__ import annotations

import sqlite3
import subprocess
import time
from contextlib import closing
from pathlib import Path

import pytest

from dicom_depot.adapters import folder_lock
from dicom_depot.config import Settings
from dicom_depot.domain.errors import ConfigurationError
from dicom_depot.testing.samples import many_small
from dicom_depot.wiring import open_service
from tests.durability.conftest import ServeArchive
from tests.durability.processes import is_alive
from tests.support.archive import Archive, instance_keys, log_lines, write_samples
from tests.support.fault_endpoint import Delay, FaultEndpoint, Hang, Rule
from tests.support.service import azure_destination, file_destination, free_port, run_command

_REFUSED = 4


def _serve_once_more(data_dir: Path, **settings: object) -> tuple[subprocess.CompletedProcess[str], float]:
    started = time.monotonic()
    result = run_command("serve", data_dir=data_dir, check=False, port=free_port(), **settings)
    return result, time.monotonic() - started


def test_a_second_serve_on_the_same_folder_refuses_with_the_process_to_stop(
    serve: ServeArchive, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = serve()
    assert service.process is not None
    result, seconds = _serve_once_more(service.data_dir)
    assert result.returncode == _REFUSED
    assert f"in use by process {service.process.pid}." in result.stderr
    assert "Stop that process" in result.stderr
    assert "DICOM_DEPOT_DATA_DIR" in result.stderr
    assert seconds < 15
    monkeypatch.setattr(folder_lock, "_WAIT_SECONDS", 0.2)
    with pytest.raises(ConfigurationError, match=f"process {service.process.pid}"):
        open_service(Settings(data_dir=service.data_dir))
    service.begin(file_destination("a"))


def test_an_import_runs_beside_the_service_and_an_export_then_sees_it(
    serve: ServeArchive, small_archive: Archive, tmp_path: Path
) -> None:
    service = serve()
    new = write_samples(tmp_path / "new", many_small(40, 1200, seed=7))
    before = service.begin(file_destination("before"))
    run_command("import", str(tmp_path / "new"), data_dir=service.data_dir)
    after = service.begin(file_destination("after"))
    assert service.wait(before)["results"]["exported"] == len(small_archive.contents)
    assert service.wait(after)["results"]["exported"] == len(small_archive.contents) + len(new)
    keys = instance_keys(after, new)
    assert all((tmp_path / "out" / "after" / keys[ref]).read_bytes() == content for ref, content in new.items())


def test_a_worker_ends_within_two_seconds_of_its_parent_and_the_next_start_succeeds_at_once(
    serve: ServeArchive,
) -> None:
    service = serve()
    [worker] = service.workers()
    service.kill_parent()
    deadline = time.monotonic() + 2
    while is_alive(worker):
        assert time.monotonic() < deadline, "the worker outlives its parent"
        time.sleep(0.01)
    service.start()
    service.kill_parent()
    service.start()  # without waiting for the orphan


@pytest.mark.parametrize("hanging", [False, True], ids=["copying", "with requests that hang"])
def test_told_to_end_in_the_middle_of_an_export_it_ends_soon_and_the_next_start_completes_the_export(
    serve: ServeArchive, small_archive: Archive, endpoint: FaultEndpoint, hanging: bool
) -> None:
    service = serve(export_concurrency=4)
    rule = endpoint.add_rule(Rule(Delay(0.02), method="PUT", blob="*.dcm"))
    destination = azure_destination(endpoint.container_url("exports"))
    operation_id = service.begin(destination, "1.2.3", *small_archive.identifiers)
    while service.operation(operation_id)["results"]["exported"] < 60:
        time.sleep(0.02)
    if hanging:
        endpoint.set_outage(True, Hang())
        time.sleep(0.5)
    assert service.process is not None
    processes = [service.process.pid, *service.workers()]
    started = time.monotonic()
    service.stop()
    assert time.monotonic() - started < 8
    assert not any(map(is_alive, processes))
    assert "Traceback" not in service.log_path.read_text()
    endpoint.set_outage(False)
    rule.enabled = False
    service.start()
    end = service.wait(operation_id)
    assert (end["status"], end["results"]["exported"], end["results"]["skipped"]) == ("succeeded", 300, 1)
    tree = endpoint.read_tree("exports")
    [(unmatched, _)] = log_lines(tree.pop(f"{operation_id}/errors.log"))
    assert unmatched == "1.2.3"
    keys = instance_keys(operation_id, small_archive.contents)
    assert tree == {keys[ref]: content for ref, content in small_archive.contents.items()}


def test_it_does_not_start_on_a_database_of_an_unknown_version(small_archive: Archive, tmp_path: Path) -> None:
    archive = small_archive.copy_to(tmp_path / "data")
    with closing(sqlite3.connect(archive.settings.database_path)) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
        connection.commit()
    result, _ = _serve_once_more(archive.data_dir)
    assert result.returncode == _REFUSED
    assert "version 9999" in result.stderr
    assert "newer release" in result.stderr


def test_it_does_not_start_where_there_is_too_little_space(small_archive: Archive, tmp_path: Path) -> None:
    archive = small_archive.copy_to(tmp_path / "data")
    result, _ = _serve_once_more(archive.data_dir, min_free_bytes=1 << 50)
    assert result.returncode == _REFUSED
    assert "DICOM_DEPOT_MIN_FREE_BYTES" in result.stderr
