"""The bulk import on several processes, with the SQL index and the folder store that they share."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dicom_depot.adapters.database import Database
from dicom_depot.adapters.folder_store import FolderBlobStore
from dicom_depot.adapters.index_sql import SqlIndex
from dicom_depot.domain.errors import ServiceUnavailable
from dicom_depot.ports import BlobStore, InstanceIndex
from dicom_depot.services.ingest import IngestProblem, IngestSummary, find_files, ingest
from dicom_depot.testing.samples import ct_volume, many_small


def open_stores(folder: str) -> tuple[BlobStore, InstanceIndex]:
    return FolderBlobStore(Path(folder) / "store"), SqlIndex(Database(Path(folder) / "index.sqlite"))


def die(_folder: str) -> tuple[BlobStore, InstanceIndex]:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def refuse(_folder: str) -> tuple[BlobStore, InstanceIndex]:
    raise ServiceUnavailable("the database is away")


@pytest.fixture
def depot(tmp_path: Path) -> Path:
    folder = tmp_path / "depot"
    folder.mkdir()
    database = Database(folder / "index.sqlite")
    database.migrate()
    database.close()
    return folder


def write_many(folder: Path, count: int, seed: int = 0) -> Path:
    for sample in many_small(count, seed=seed):
        path = folder / sample.file_name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(sample.content)
    return folder


def run(
    depot: Path,
    *paths: Path,
    opener: Callable[[str], tuple[BlobStore, InstanceIndex]] = open_stores,
    stop: threading.Event | None = None,
    on_problem: Callable[[IngestProblem], None] | None = None,
    on_progress: Callable[[IngestSummary], None] | None = None,
) -> IngestSummary:
    return ingest(
        find_files(paths),
        functools.partial(opener, str(depot)),
        processes=2,
        on_progress=on_progress,
        on_problem=on_problem,
        stop=stop,
    )


def check(depot: Path) -> int:
    """Rows and objects match one to one; returns how many there are."""
    store, index = open_stores(str(depot))
    entries = index.scan(0, 1_000_000)
    assert {entry.store_key for entry in entries} == {entry.key for entry in store.entries()}
    assert all(len(store.read(entry.store_key)) == entry.size for entry in entries)
    return len(entries)


def test_two_processes_store_every_instance_once(tmp_path: Path, depot: Path) -> None:
    write_many(tmp_path / "in" / "a", 300)
    write_many(tmp_path / "in" / "b", 300)  # the same instances again
    (sample,) = ct_volume(1)
    for number in range(80):
        content = sample.content[:-1] + bytes([number])
        (tmp_path / "in" / f"conflict{number:02}.dcm").write_bytes(content)
    problems: list[IngestProblem] = []
    summary = run(depot, tmp_path / "in", on_problem=problems.append)
    assert summary.failure is None
    assert (summary.stored, summary.already_there, summary.conflicting) == (301, 300, 79)
    assert len(problems) == 79
    assert [problem.path for problem in problems] == sorted(problem.path for problem in problems)
    assert check(depot) == 301


def test_a_worker_that_dies_ends_the_import_with_a_clear_error(tmp_path: Path, depot: Path) -> None:
    write_many(tmp_path / "in", 10)
    summary = run(depot, tmp_path / "in", opener=die)
    assert summary.failure is not None
    assert "run the import again" in summary.failure.message
    assert run(depot, tmp_path / "in").stored == 10


def test_a_store_that_cannot_be_opened_ends_the_import_with_its_reason(tmp_path: Path, depot: Path) -> None:
    write_many(tmp_path / "in", 10)
    summary = run(depot, tmp_path / "in", opener=refuse)
    assert summary.failure is not None
    assert summary.failure.message == "the database is away"


def test_a_stop_ends_the_import_and_the_next_run_goes_on(tmp_path: Path, depot: Path) -> None:
    write_many(tmp_path / "in", 2000)
    stop = threading.Event()
    summary = run(depot, tmp_path / "in", stop=stop, on_progress=lambda _: stop.set())
    assert summary.is_interrupted
    assert 0 < summary.stored == check(depot) < 2000
    again = run(depot, tmp_path / "in")
    assert (again.stored, again.already_there) == (2000 - summary.stored, summary.stored)
    assert check(depot) == 2000


SCRIPT = """
import functools, sys
sys.path[:0] = {path!r}
from test_ingest_processes import run
from pathlib import Path
if __name__ == "__main__":
    run(Path(sys.argv[1]), Path(sys.argv[2]), on_progress=lambda summary: print(summary.stored, flush=True))
"""


def test_a_killed_import_leaves_no_worker_and_no_row_without_bytes(tmp_path: Path, depot: Path) -> None:
    write_many(tmp_path / "in", 3000)
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(path=[str(Path(__file__).parent), *sys.path]))
    command = [sys.executable, str(script), str(depot), str(tmp_path / "in")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline()
        process.kill()
        # The workers hold the pipe's other end as well: it closes when the last of them is gone.
        started = time.monotonic()
        process.stdout.read()
        assert time.monotonic() - started < 10
    store, index = open_stores(str(depot))
    for entry in index.scan(0, 1_000_000):
        assert len(store.read(entry.store_key)) == entry.size
    assert run(depot, tmp_path / "in").failure is None
    assert len(index.scan(0, 1_000_000)) == 3000
