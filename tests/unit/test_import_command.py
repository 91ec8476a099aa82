"""`dicom-depot import`: exit codes, the errors file, the summary."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from dicom_depot.cli import import_command
from dicom_depot.domain.errors import StorageFull
from dicom_depot.services import ingest as service
from dicom_depot.testing.memory import MemoryBlobStore, MemoryIndex
from dicom_depot.testing.samples import ct_volume

_ingest = service.ingest


class Full(MemoryBlobStore):
    def put(self, key: str, blocks: Iterable[bytes]) -> None:
        raise StorageFull("No space left.")


@pytest.fixture
def app(monkeypatch: pytest.MonkeyPatch) -> typer.Typer:
    """The command with doubles, in this process."""
    application = typer.Typer()
    application.command("import")(import_command.import_files)
    stores = (MemoryBlobStore(), MemoryIndex())
    use(monkeypatch, stores)
    return application


def use(monkeypatch: pytest.MonkeyPatch, stores: tuple[MemoryBlobStore, MemoryIndex]) -> None:
    def in_process(*arguments: object, **options: object) -> service.IngestSummary:
        return _ingest(*arguments, **{**options, "processes": 0})  # type: ignore[arg-type]

    monkeypatch.setattr(import_command, "ingest", in_process)
    monkeypatch.setattr(import_command, "_prepare", lambda _context: lambda: stores)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for sample in ct_volume(3):
        (tmp_path / sample.file_name).write_bytes(sample.content)
    return tmp_path


def test_a_fine_import_exits_with_0_and_shows_a_table(app: typer.Typer, folder: Path) -> None:
    result = CliRunner().invoke(app, [str(folder)])
    assert result.exit_code == 0, result.output
    assert "stored" in result.stdout
    assert "already there" in result.stdout


def test_problems_exit_with_3_and_stand_in_the_errors_file_as_json_lines(
    app: typer.Typer, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    errors = tmp_path_factory.mktemp("out") / "errors.jsonl"
    (sample,) = ct_volume(1)
    (folder / "X1.dcm").write_bytes(sample.content[:-1] + b"\xff")
    (folder / "X2.dcm").write_bytes(sample.content[:300])
    (folder / "X\udcff3.txt").write_text("text")
    result = CliRunner().invoke(app, [str(folder), "--json", "--errors", str(errors)])
    assert result.exit_code == 3, result.output
    summary = json.loads(result.stdout)
    assert (summary["stored"], summary["conflicting"], summary["broken"], summary["not_dicom"]) == (
        3,
        1,
        1,
        1,
    )
    assert summary["error"] is None
    lines = [json.loads(line) for line in errors.read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["conflicting", "broken", "not_dicom"]
    assert lines[0]["identifier"] == str(sample.ref)
    assert set(lines[0]) == {"path", "kind", "reason", "identifier"}


def test_files_that_are_not_dicom_alone_are_no_failure(app: typer.Typer, folder: Path) -> None:
    (folder / "readme.txt").write_text("text")
    assert CliRunner().invoke(app, [str(folder)]).exit_code == 0


def test_a_missing_path_exits_with_2(app: typer.Typer, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, [str(tmp_path / "missing")])
    assert result.exit_code == 2
    assert "No such file or directory" in result.stderr


def test_a_full_disk_exits_with_4_and_says_what_to_do(
    app: typer.Typer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, (Full(), MemoryIndex()))
    result = CliRunner().invoke(app, [str(folder), "--json"])
    assert result.exit_code == 4
    assert json.loads(result.stdout)["error"] == {"code": "StorageFull", "message": "No space left."}
    assert "run the import again" in result.stderr


def test_an_interrupt_exits_with_130(app: typer.Typer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted(MemoryBlobStore):
        def put(self, key: str, blocks: Iterable[bytes]) -> None:
            raise KeyboardInterrupt

    use(monkeypatch, (Interrupted(), MemoryIndex()))
    result = CliRunner().invoke(app, [str(folder)])
    assert result.exit_code == 130
