"""One measured process: an export through the service, or the bare loop that it is compared with.

`python benchmarks/side.py REQUEST` takes a JSON object and prints one: wall and CPU seconds of each run and the
peak memory of this process, which does nothing else. benchmarks/run.py starts it.
"""

from __future__ import annotations

import itertools
import json
import os
import sqlite3
import sys
import threading
import time
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import obstore
from obstore.store import AzureStore

ACCOUNT = "benchmark"
CONTAINER = "exports"
SAS = "sv=2021-08-06&sr=c&sp=cw&sig=bm90aGluZw%3D%3D"
POLL_SECONDS = 0.25


@dataclass(frozen=True, slots=True)
class Request:
    """What to measure. `count` instances of `data_dir` (0: all) are sent `runs` times, one run after the other."""

    side: str
    data_dir: str
    port: int
    concurrency: int
    count: int = 0
    runs: int = 1


def run_export(request: Request) -> list[dict[str, Any]]:
    """From the order (what a POST does) to the terminal state: proof, plan, index, hash, commits, log included."""
    from dicom_depot.config import Settings
    from dicom_depot.domain.export import DestinationSpec, ExportSpecification, Listed
    from dicom_depot.domain.identifiers import parse_identifier
    from dicom_depot.wiring import open_service

    endpoint = f"http://127.0.0.1:{request.port}/{ACCOUNT}"
    settings = Settings(
        data_dir=Path(request.data_dir),
        export_allowed_endpoints=(endpoint,),
        export_concurrency=request.concurrency,
    )
    destination = DestinationSpec("azureBlob", {"endpoint": endpoint, "container": CONTAINER}, json.dumps({"sas": SAS}))
    identifiers = tuple(map(parse_identifier, _identifiers(request)))
    service = open_service(settings)
    runs = []
    for _ in range(request.runs):
        before, ordered_at = _Usage.now(), datetime.now(UTC)
        operation = service.exports.start(ExportSpecification(Listed(identifiers), destination))
        while not operation.status.is_terminal:
            time.sleep(POLL_SECONDS)
            operation = service.exports.get(operation.id)
        used = _Usage.now() - before
        assert operation.status == "succeeded", operation
        assert operation.ended_at is not None
        seconds = (operation.ended_at - ordered_at).total_seconds()  # finer than the polling
        runs.append(replace(used, wall_seconds=seconds).result(operation.exported, operation.bytes_exported))
    service.close()
    return runs


def run_bare_loop(request: Request) -> list[dict[str, Any]]:
    """Open and read each stored file, put it; nothing else."""
    store = AzureStore(
        CONTAINER,
        account_name=ACCOUNT,
        endpoint=f"http://127.0.0.1:{request.port}/{ACCOUNT}",
        sas_key=SAS,
        client_options={"allow_http": True, "pool_max_idle_per_host": "1024"},
    )
    files = _files(request)
    runs = []
    for _ in range(request.runs):
        before = _Usage.now()
        positions = itertools.count()
        sizes: list[int] = []

        def work(positions: itertools.count[int] = positions, sizes: list[int] = sizes) -> None:
            size = 0
            for position in positions:
                if position >= len(files):
                    break
                path, key = files[position]
                file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)  # Python's file objects take twice the system calls
                content = os.read(file, os.fstat(file).st_size)
                os.close(file)
                obstore.put(store, key, content, use_multipart=False)
                size += len(content)
            sizes.append(size)

        threads = [threading.Thread(target=work) for _ in range(request.concurrency)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        used = _Usage.now() - before
        assert len(sizes) == len(threads), "a thread of the bare loop ended early"
        runs.append(used.result(len(files), sum(sizes)))
    return runs


@dataclass(frozen=True, slots=True)
class _Usage:
    wall_seconds: float
    cpu_seconds: float

    @staticmethod
    def now() -> _Usage:
        return _Usage(time.perf_counter(), time.process_time())

    def __sub__(self, earlier: _Usage) -> _Usage:
        return _Usage(self.wall_seconds - earlier.wall_seconds, self.cpu_seconds - earlier.cpu_seconds)

    def result(self, files: int, size: int) -> dict[str, Any]:
        return {
            "files": files,
            "bytes": size,
            "wall_seconds": round(self.wall_seconds, 4),
            "cpu_seconds": round(self.cpu_seconds, 4),
        }


def _identifiers(request: Request) -> list[str]:
    """All studies, or the first that make up the number asked for; of series or instances where that is needed."""
    with sqlite3.connect(Path(request.data_dir) / "depot.sqlite") as connection:
        (total,) = connection.execute("SELECT count(*) FROM instances").fetchone()
        count = request.count or total
        for columns in ("study_uid", "study_uid, series_uid", "study_uid, series_uid, sop_instance_uid"):
            rows = connection.execute(
                f"SELECT {columns}, count(*) FROM instances"  # noqa: S608 - no input of anybody's
                " JOIN series ON series.id = series_id JOIN studies ON studies.id = study_id"
                f" GROUP BY {columns} ORDER BY min(instances.id)"
            )
            chosen, found = [], 0
            for *uids, size in rows:
                if found + size > count:
                    break
                chosen.append("/".join(uids))
                found += size
            if found == count:
                return chosen
    raise ValueError(f"{request.data_dir} has no {count} instances")


def _files(request: Request) -> list[tuple[str, str]]:
    """Path of each stored file and the key it is sent under, of the same form as an export's."""
    folder = f"{'0' * 32}/results"
    with sqlite3.connect(Path(request.data_dir) / "depot.sqlite") as connection:
        rows = connection.execute(
            "SELECT store_key, study_uid, series_uid, sop_instance_uid FROM instances"
            " JOIN series ON series.id = series_id JOIN studies ON studies.id = study_id ORDER BY instances.id LIMIT ?",
            (request.count or -1,),
        )
        return [
            (f"{request.data_dir}/store/{key}", f"{folder}/{study}/{series}/{sop}.dcm")
            for key, study, series, sop in rows
        ]


def peak_memory_bytes() -> int:
    """The most memory that this process ever had resident, as the kernel counted it."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("the kernel does not tell VmHWM")


def main() -> None:
    request = Request(**json.loads(sys.argv[1]))
    runs = run_export(request) if request.side == "export" else run_bare_loop(request)
    print(json.dumps({"runs": runs, "peak_memory_bytes": peak_memory_bytes()}), flush=True)
    os._exit(0)  # what is left of an engine's threads is not measured


if __name__ == "__main__":
    main()
