"""Third-party programs read what an export wrote: DCMTK's dcmdump and dcmftest, and rclone against the container."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from dicom_depot.testing.samples import Sample, ct_volume, multiframe, structured_report
from tests.support.azurite import Azurite
from tests.support.service import (
    RunningService,
    azure_destination,
    export_body,
    file_destination,
    run_command,
    running_service,
)

pytestmark = pytest.mark.clients


def _program(name: str) -> str:
    found = shutil.which(name)
    assert found is not None, f"{name} is not installed; run `make test-clients`, which installs it"
    return found


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return [*ct_volume(slices=4), multiframe(frames=3), structured_report()]


@pytest.fixture(scope="module")
def service(
    tmp_path_factory: pytest.TempPathFactory, azurite: Azurite, samples: list[Sample]
) -> Iterator[RunningService]:
    folder = tmp_path_factory.mktemp("clients")
    source = folder / "source"
    source.mkdir()
    for sample in samples:
        (source / sample.file_name.replace("/", "_")).write_bytes(sample.content)
    (folder / "exports").mkdir()
    run_command("import", str(source), data_dir=folder / "data")
    settings = {"export_root": folder / "exports", "export_allowed_endpoints": azurite.account_url}
    with running_service(folder / "data", **settings) as running:
        yield running


def _export(service: RunningService, destination: dict[str, object]) -> str:
    answer = service.export(export_body(destination))
    assert answer.status_code == 202, answer.text
    state = service.wait(answer.json()["id"])
    assert state["status"] == "succeeded", state
    return str(state["operationId"])


def test_dcmtk_reads_every_exported_file_to_its_last_byte(service: RunningService, samples: list[Sample]) -> None:
    operation_id = _export(service, file_destination("dcmtk"))
    results = Path(str(service.settings["export_root"])) / "dcmtk" / operation_id / "results"
    files = sorted(results.rglob("*.dcm"))
    assert len(files) == len(samples)
    for file in files:
        subprocess.run([_program("dcmftest"), str(file)], check=True, capture_output=True)
        dumped = subprocess.run([_program("dcmdump"), "-q", str(file)], check=True, capture_output=True, text=True)
        assert file.stem in dumped.stdout  # the SOP Instance UID names the file
        assert dumped.stderr == ""


def test_rclone_finds_the_same_files_in_the_container(
    service: RunningService, azurite: Azurite, samples: list[Sample], tmp_path: Path
) -> None:
    container = azurite.create_container()
    sas = azurite.container_sas(container, "cw")
    operation_id = _export(service, azure_destination(azurite.container_url(container, sas)))
    config = tmp_path / "rclone.conf"
    config.write_text(f"[depot]\ntype = azureblob\nuse_emulator = true\nendpoint = {azurite.account_url}\n")
    subprocess.run(
        [
            _program("rclone"),
            *("--config", str(config), "--retries", "1", "--low-level-retries", "1"),
            *("copy", f"depot:{container}/{operation_id}/results", str(tmp_path / "copy")),
        ],
        check=True,
        capture_output=True,
        timeout=120,
    )
    copied = {hashlib.sha256(file.read_bytes()).digest() for file in (tmp_path / "copy").rglob("*.dcm")}
    assert copied == {hashlib.sha256(sample.content).digest() for sample in samples}
