"""kill -9 while an export by query is planned: it goes on by itself, with what matched when it was started."""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import time
from pathlib import Path

import httpx

from tests.durability.conftest import ServeArchive
from tests.support.archive import Archive, read_folder
from tests.support.service import RunningService, file_destination

_TRIES = 6


def _kill(service: RunningService, workers: list[int]) -> None:
    for pid in workers:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    service.kill_parent()
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        time.sleep(0.02)


def _is_planned(service: RunningService, operation_id: str) -> bool:
    database = sqlite3.connect(service.data_dir / "depot.sqlite")
    try:
        [(is_planned,)] = database.execute("SELECT is_planned FROM operations WHERE id = ?", (operation_id,)).fetchall()
        return bool(is_planned)
    finally:
        database.close()


def test_a_query_export_that_was_killed_while_it_was_planned_ends_exact(
    small_archive: Archive, serve: ServeArchive
) -> None:
    service = serve(chunk_instances=2)
    root = Path(str(service.settings["export_root"]))
    wanted = [each for number, each in enumerate(small_archive.identifiers) if number % 10]
    filters = {"SOPInstanceUID": ",".join(each.split("/")[2] for each in wanted), "Modality": "CT"}
    source = {"type": "query", "settings": {"level": "instance", "filters": filters}}
    for number in range(_TRIES):
        workers = service.workers()
        answer = service.export({"source": source, "destination": file_destination(str(number))})
        _kill(service, workers)
        operation_id = answer.raise_for_status().json()["id"]
        was_planned = _is_planned(service, operation_id)
        service.start()
        late = f"{service.url}/v2/studies/{wanted[-1].split('/')[0]}"
        if not was_planned:
            assert httpx.delete(late, timeout=30).status_code == 204
        state = service.wait(operation_id)
        expected = {f"{operation_id}/results/{each}.dcm": small_archive.contents[each] for each in wanted}
        assert read_folder(root / str(number)) == expected | {f"{operation_id}/errors.log": b""}
        results = {name: state["results"][name] for name in ("exported", "skipped", "total", "bytes")}
        size = sum(map(len, expected.values()))
        assert results == {"exported": len(wanted), "skipped": 0, "total": len(wanted), "bytes": size}
        if not was_planned:
            return
    raise AssertionError("planning was always over before the kill")
