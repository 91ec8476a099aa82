"""The engine in this process, on DBOS: what it does with a service that closes, with errors, and with torn backups."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path

import pytest

from dicom_depot.adapters.destinations import Destinations
from dicom_depot.config import Settings
from dicom_depot.domain.export import ExportSpecification, Listed
from dicom_depot.domain.identifiers import parse_identifier
from dicom_depot.domain.operation import OperationId
from dicom_depot.testing.faults import FaultPlan, When, faulty
from dicom_depot.wiring import Service, open_service
from tests.support.archive import Archive, instance_keys, log_lines
from tests.support.fault_endpoint import Delay, FaultEndpoint, Rule

_CONTAINER = "exports"
_COUNT = 300


class Place:
    """A data folder and an endpoint, with a service on them whenever a test opens one."""

    def __init__(self, archive: Archive, endpoint: FaultEndpoint) -> None:
        self.archive = archive
        self.endpoint = endpoint
        self.slow = endpoint.add_rule(Rule(Delay(0.03), method="PUT", blob="*.dcm"))
        self.settings = Settings(
            data_dir=archive.data_dir,
            chunk_instances=20,
            export_concurrency=4,
            export_allowed_endpoints=(endpoint.account_url,),
        )

    @contextmanager
    def service(self) -> Iterator[Service]:
        opened = open_service(self.settings)
        try:
            yield opened
        finally:
            opened.close()

    def begin(self, service: Service) -> OperationId:
        """Export everything, and an identifier that matches nothing."""
        destinations = service.exports.destinations
        assert isinstance(destinations, Destinations)
        url = self.endpoint.container_url(_CONTAINER)
        destination = destinations.parse("azureblob", {"blobContainerUri": url})
        identifiers = map(parse_identifier, ["1.2.3", *self.archive.identifiers])
        return service.exports.start(ExportSpecification(Listed(tuple(identifiers)), destination)).id

    def wait_for_copies(self, count: int) -> None:
        deadline = time.monotonic() + 60
        while len(self.endpoint.objects) < count:
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def assert_whole(self, service: Service, operation_id: OperationId) -> None:
        deadline = time.monotonic() + 60
        while not (operation := service.exports.get(operation_id)).status.is_terminal:
            assert time.monotonic() < deadline, operation
            time.sleep(0.02)
        assert (operation.status, operation.exported, operation.skipped) == ("succeeded", _COUNT, 1)
        tree = self.endpoint.read_tree(_CONTAINER)
        assert [ref for ref, _ in log_lines(tree.pop(f"{operation_id}/errors.log"))] == ["1.2.3"]
        keys = instance_keys(operation_id, self.archive.contents)
        assert tree == {keys[ref]: content for ref, content in self.archive.contents.items()}


@pytest.fixture
def place(small_archive: Archive, endpoint: FaultEndpoint, tmp_path: Path) -> Place:
    return Place(small_archive.copy_to(tmp_path / "data"), endpoint)


def test_a_service_that_is_closed_and_opened_again_goes_on(place: Place) -> None:
    with place.service() as service:
        operation_id = place.begin(service)
    for count in (40, 100, 160):
        with place.service():
            place.wait_for_copies(count)
    place.slow.enabled = False
    with place.service() as service:
        place.assert_whole(service, operation_id)


def test_a_workflow_that_ended_in_an_error_is_begun_again(place: Place) -> None:
    place.slow.enabled = False
    with place.service() as service:
        engine = service._engine
        runner = engine._runner
        for step, when in (
            ("begin", When.BEFORE),
            ("plan", When.AFTER),
            ("run_chunk", When.AFTER),
            ("finish", When.BEFORE),
        ):
            error = FaultPlan(f"runner.{step}", 1, when, partial(RuntimeError, "even the runner met an error"))
            engine._runner = faulty(runner, "runner", error)
            place.endpoint.objects.clear()
            operation_id = place.begin(service)
            deadline = time.monotonic() + 60
            while not (error.acted_count and service.exports.get(operation_id).status.is_terminal):
                assert time.monotonic() < deadline, (step, when)
                time.sleep(0.2)
                engine._go_on()  # as the maintenance does
            place.assert_whole(service, operation_id)


def test_an_export_goes_on_when_the_workflows_are_lost(place: Place) -> None:
    with place.service() as service:
        operation_id = place.begin(service)
        place.wait_for_copies(60)
    for path in place.settings.data_dir.glob("workflows.sqlite*"):
        path.unlink()
    place.slow.enabled = False
    with place.service() as service:
        place.assert_whole(service, operation_id)


@pytest.mark.parametrize("older", ["depot.sqlite", "workflows.sqlite"])
def test_an_export_goes_on_from_a_backup_whose_databases_are_of_different_moments(
    place: Place, older: str, tmp_path: Path
) -> None:
    database, backup = place.settings.data_dir / older, tmp_path / older
    with place.service() as service:
        operation_id = place.begin(service)
        place.wait_for_copies(60)
        _copy(database, backup)
        place.wait_for_copies(220)
    for path in place.settings.data_dir.glob(f"{older}*"):
        path.unlink()
    _copy(backup, database)
    place.slow.enabled = False
    with place.service() as service:
        place.assert_whole(service, operation_id)


def _copy(source: Path, target: Path) -> None:
    with closing(sqlite3.connect(source)) as one, closing(sqlite3.connect(target)) as other:
        one.backup(other)
