"""`dicom-depot demo`: the whole way, on its own samples and on given files."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

from dicom_depot.testing.samples import multiframe, structured_report
from tests.cli.conftest import Invoke
from tests.support.service import END_SECONDS, environment


def run_demo(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The demo with its temporary folder below `folder`, and with settings around that must not matter."""
    return subprocess.run(
        [sys.executable, "-m", "dicom_depot", "demo", *arguments],
        env=environment(folder / "other", {"port": "nonsense"}) | {"TMPDIR": str(folder)},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=END_SECONDS,
    )


def serving_below(folder: Path) -> list[int]:
    """Processes that have `folder` in their environment."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and int(entry.name) != os.getpid():
            try:
                if str(folder).encode() in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


def test_it_needs_nothing_shows_the_way_and_leaves_nothing(tmp_path: Path) -> None:
    done = run_demo(tmp_path)
    assert done.returncode == 0, done.stderr
    for expected in (
        "10 instances stored",
        "$ curl http://127.0.0.1:",
        '"status": "succeeded"',
        '"exported": 10, "skipped": 1, "total": 11',
        "NotFound: no instance of this study is stored.",
        "All 10 exported files are byte for byte those that were imported",
        "What to try next",
    ):
        assert expected in done.stdout
    assert list(tmp_path.iterdir()) == []
    assert serving_below(tmp_path) == []


def test_given_files_are_used_and_kept_folders_stay(tmp_path: Path) -> None:
    report, image = structured_report(), multiframe()
    scans = tmp_path / "scans"
    scans.mkdir()
    (scans / "notes.txt").write_text("no DICOM")
    (scans / "report").write_bytes(report.content)
    with zipfile.ZipFile(scans / "more.zip", "w") as archive:
        archive.writestr("image.dcm", image.content)
        archive.writestr("again.dcm", report.content)
    done = run_demo(tmp_path, str(scans), "--keep", "kept")
    assert done.returncode == 0, done.stderr
    assert "2 instances stored" in done.stdout
    assert "1 not DICOM" in done.stdout
    assert "All 2 exported files are byte for byte" in done.stdout
    exported = {path.name: path.read_bytes() for path in (tmp_path / "kept").glob("exported/demo/*/results/*/*/*.dcm")}
    assert exported == {f"{sample.ref.sop_instance_uid}.dcm": sample.content for sample in (report, image)}


def test_what_cannot_be_used_is_told(invoke: Invoke, tmp_path: Path) -> None:
    notes = tmp_path / "notes.txt"
    notes.write_text("no DICOM")
    for arguments, code, said in (
        ([str(notes)], 4, "no DICOM instance"),
        ([str(tmp_path / "missing")], 2, "No such file"),
        (["--keep", str(tmp_path)], 2, "is not empty"),
    ):
        result = invoke("demo", *arguments)
        assert result.exit_code == code
        assert said in result.stderr
    assert list(tmp_path.iterdir()) == [notes]


def test_sigterm_takes_the_service_and_the_folder_along(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "dicom_depot", "demo"],
        env=environment(tmp_path / "other", {}) | {"TMPDIR": str(tmp_path), "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("Start the service"):
            break
    time.sleep(0.5)
    process.terminate()
    process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM
    assert list(tmp_path.iterdir()) == []
    deadline = time.monotonic() + 5
    while serving_below(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert serving_below(tmp_path) == []
