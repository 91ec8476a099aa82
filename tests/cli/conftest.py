"""What the tests of commands share: one service with the samples, and commands run in this process."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from dicom_depot.cli import app
from dicom_depot.cli.client import OperationReport
from dicom_depot.testing.samples import ct_volume, multiframe, structured_report
from tests.support.fault_endpoint import FaultEndpoint, Respond, Rule
from tests.support.service import RunningService, run_command, running_service

CT, US, SR = ct_volume(4), multiframe(), structured_report()
SAMPLES = (*CT, US, SR)

RUNNING = OperationReport(
    id="0" * 32,
    status="running",
    created_at=datetime(2026, 1, 1, tzinfo=UTC),
    updated_at=datetime(2026, 1, 1, 0, 0, 10, tzinfo=UTC),
    percent_complete=50,
    exported=1000,
    skipped=0,
    total=2000,
    bytes_exported=5_000_000,
    log_href="https://account.blob.core.windows.net/scans/0/errors.log",
    error=None,
    body={"operationId": "0" * 32},
)
"""An operation half-way, as the API reports it."""

Invoke = Callable[..., Result]


@dataclass(frozen=True)
class Depot:
    """A running service that holds `SAMPLES`, and where its exports go."""

    service: RunningService
    exported: Path
    endpoint: FaultEndpoint


@pytest.fixture(scope="package")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder that holds `SAMPLES`; nobody works in it, tests take copies."""
    folder = tmp_path_factory.mktemp("filled")
    files = folder / "files"
    files.mkdir()
    for sample in SAMPLES:
        (files / sample.file_name).write_bytes(sample.content)
    run_command("import", str(files), "--processes", "1", data_dir=folder / "data", min_free_bytes=0)
    return folder / "data"


@pytest.fixture
def data_dir(filled: Path, tmp_path: Path) -> Path:
    """A data folder of the test's own that holds `SAMPLES`."""
    return Path(shutil.copytree(filled, tmp_path / "data"))


@pytest.fixture(scope="package")
def depot(filled: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Depot]:
    folder = tmp_path_factory.mktemp("depot")
    exported = folder / "exported"
    exported.mkdir()
    shutil.copytree(filled, folder / "data")
    with (
        FaultEndpoint() as endpoint,
        running_service(
            folder / "data",
            export_root=exported,
            export_allowed_endpoints=endpoint.account_url,
            min_free_bytes=0,
        ) as service,
    ):
        yield Depot(service, exported, endpoint)


@pytest.fixture
def failing_instances(depot: Depot) -> Iterator[Callable[[Respond], None]]:
    """Makes the endpoint answer so for every instance, until the test ends."""
    rules: list[Rule] = []
    yield lambda answer: rules.append(depot.endpoint.add_rule(Rule(answer, method="PUT", blob="*.dcm")))
    for rule in rules:
        rule.enabled = False


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("DICOM_DEPOT_"):
            monkeypatch.delenv(name)


@pytest.fixture
def invoke() -> Invoke:
    """Runs a command in this process; `stdin` is what it reads, other arguments are settings."""

    def run(*arguments: str, stdin: str | None = None, **settings: object) -> Result:
        environment = {f"DICOM_DEPOT_{name.upper()}": str(value) for name, value in settings.items()}
        return CliRunner().invoke(app, arguments, input=stdin, env=environment)

    return run


@pytest.fixture
def ask(depot: Depot, invoke: Invoke) -> Invoke:
    """As `invoke`, for commands that talk to the running service."""

    def run(*arguments: str, stdin: str | None = None, **settings: object) -> Result:
        return invoke(*arguments, stdin=stdin, **{"port": depot.service.port, **settings})

    return run
