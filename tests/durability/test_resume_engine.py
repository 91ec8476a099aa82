"""The durable engine's part in resuming: which workflow rows are removed, and which are left by an older release."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import timedelta
from pathlib import Path

import pytest
from dbos import DBOS

from dicom_depot.config import Settings
from dicom_depot.domain.export import Everything, ExportSpecification
from dicom_depot.domain.operation import Operation, OperationId, OperationStatus
from dicom_depot.testing.samples import many_small
from dicom_depot.wiring import Service, open_service
from dicom_depot.workflows.engine import CONTRACT_VERSION
from tests.support.archive import Archive, import_in_process
from tests.support.fault_endpoint import Delay, FaultEndpoint, Rule

_COUNT = 30


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Archive:
    return import_in_process(tmp_path_factory.mktemp("archive"), many_small(_COUNT, 1200))


@pytest.fixture
def endpoint() -> Iterator[FaultEndpoint]:
    with FaultEndpoint() as running:
        yield running


@contextmanager
def _opened(data_dir: Path, endpoint: FaultEndpoint) -> Iterator[Service]:
    service = open_service(
        Settings(
            data_dir=data_dir, chunk_instances=3, export_concurrency=2, export_allowed_endpoints=(endpoint.account_url,)
        )
    )
    try:
        yield service
    finally:
        service.close()


def _specification(service: Service, endpoint: FaultEndpoint) -> ExportSpecification:
    settings = {"blobContainerUri": endpoint.container_url("container")}
    return ExportSpecification(Everything(), service.exports.destinations.parse("azureBlob", settings))


def _wait(service: Service, operation_id: OperationId) -> Operation:
    deadline = time.monotonic() + 60
    while not (operation := service.exports.get(operation_id)).status.is_terminal:
        assert time.monotonic() < deadline, operation
        time.sleep(0.05)
    return operation


def _workflows(operation_id: str, generation: int) -> list[str]:
    rows = DBOS.list_workflows(workflow_id_prefix=f"{operation_id}-{generation}-", load_input=False, load_output=False)
    return [row.workflow_id for row in rows]


def test_the_rows_of_a_generation_that_ended_are_removed_while_the_next_one_runs(
    archive: Archive, endpoint: FaultEndpoint, tmp_path: Path
) -> None:
    slowness = endpoint.add_rule(Rule(Delay(0.1), blob="*.dcm"))
    with _opened(archive.copy_to(tmp_path / "data").data_dir, endpoint) as service:
        specification = _specification(service, endpoint)
        operation_id = service.exports.start(specification).id
        service.exports.cancel(operation_id)
        assert _wait(service, operation_id).status is OperationStatus.CANCELED
        deadline = time.monotonic() + 30
        while any(row.status == "PENDING" for row in DBOS.list_workflows(workflow_id_prefix=operation_id)):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert f"{operation_id}-1-finish" in _workflows(operation_id, 1)
        service.resumes.resume(operation_id, specification.destination)
        time.sleep(0.3)
        service._engine.purge_ended(timedelta(0))
        assert _workflows(operation_id, 1) == []
        assert f"{operation_id}-2-chunk-0" in _workflows(operation_id, 2)
        slowness.enabled = False
        end = _wait(service, operation_id)
        assert (end.status, end.exported, end.generation) == (OperationStatus.SUCCEEDED, _COUNT, 2)
    assert len(endpoint.read_tree("container", f"{operation_id}/results/")) == _COUNT


def test_workflows_of_an_older_contract_are_dropped_and_their_operations_go_on(
    archive: Archive, endpoint: FaultEndpoint, tmp_path: Path
) -> None:
    slowness = endpoint.add_rule(Rule(Delay(0.2), blob="*.dcm"))
    data_dir = archive.copy_to(tmp_path / "data").data_dir
    with _opened(data_dir, endpoint) as service:
        operation_id = service.exports.start(_specification(service, endpoint)).id
        time.sleep(0.5)
    with closing(sqlite3.connect(data_dir / "workflows.sqlite")) as workflows, workflows:
        workflows.execute("UPDATE workflow_status SET application_version = '1'")
        waiting = workflows.execute("SELECT count(*) FROM workflow_status WHERE status IN ('PENDING', 'ENQUEUED')")
        assert waiting.fetchone()[0] > 0
    slowness.enabled = False
    with _opened(data_dir, endpoint) as service:
        end = _wait(service, operation_id)
        assert (end.status, end.exported) == (OperationStatus.SUCCEEDED, _COUNT)
        left = DBOS.list_workflows(app_version="1", status=["PENDING", "ENQUEUED"])
        assert left == []
        assert CONTRACT_VERSION != "1"
