"""The service under load: memory while very large requests arrive, and everything at once for a minute."""

from __future__ import annotations

import itertools
import shutil
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from random import Random
from types import TracebackType
from typing import Any, Self

import httpx
import pytest

from dicom_depot.testing.samples import Sample, many_small
from tests.support.archive import Archive, import_in_process, instance_keys
from tests.support.azurite import Azurite
from tests.support.service import RunningService, azure_destination, running_service

_MIB = 1 << 20
_SMALL_BYTES, _LARGE_BYTES = 34_000, 520_000
_LOAD_SECONDS = 60.0
_AS_STORED = {"Accept": "application/dicom; transfer-syntax=*"}
_PARTS = {"Content-Type": 'multipart/related; type="application/dicom"; boundary=cut'}


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder whose gigabytes go at the end."""
    yield tmp_path
    shutil.rmtree(tmp_path, ignore_errors=True)


def _count(service: RunningService, table: str, where: str = "1") -> int:
    with closing(sqlite3.connect(service.data_dir / "depot.sqlite")) as connection:
        return int(connection.execute(f"SELECT count(*) FROM {table} WHERE {where}").fetchone()[0])  # noqa: S608


def _kibibytes(pid: int, name: str) -> int:
    """VmRSS is what a process has in memory now, VmHWM the most that it ever had."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1])
    raise AssertionError(f"no {name} of {pid}")


def _bytes_in_memory(service: RunningService) -> int:
    assert service.process is not None
    return 1024 * sum(_kibibytes(pid, "VmRSS") for pid in (service.process.pid, *service.workers()))


class Memory:
    """Samples what parent and worker have in memory, many times a second, while the block runs."""

    def __init__(self, service: RunningService) -> None:
        self._service = service
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self.samples: list[int] = []

    def __enter__(self) -> Self:
        self.samples.append(_bytes_in_memory(self._service))
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._ended.wait(0.05):
            self.samples.append(_bytes_in_memory(self._service))

    def __str__(self) -> str:
        shown = self.samples[:: max(1, len(self.samples) // 12)]
        return ", ".join(str(each // _MIB) for each in shown) + f"; peak {max(self.samples) // _MIB} MiB"


def _parts(samples: Iterator[Sample]) -> Iterator[bytes]:
    """A body that is made while it is sent; nobody ever has it whole."""
    for sample in samples:
        yield b"--cut\r\nContent-Type: application/dicom\r\n\r\n"
        yield sample.content
        yield b"\r\n"
    yield b"--cut--\r\n"


@pytest.mark.parametrize(
    ("count", "size"),
    [
        pytest.param(500, 512 << 10, id="256 MiB in 500"),
        pytest.param(1, 256 << 20, id="256 MiB in 1"),
        pytest.param(2000, 512 << 10, id="1 GiB in 2000", marks=pytest.mark.long),
        pytest.param(8000, 512 << 10, id="4 GiB in 8000", marks=pytest.mark.long),
        pytest.param(1, 3 << 30, id="3 GiB in 1", marks=pytest.mark.long),
    ],
)
def test_however_large_a_request_is_it_takes_little_memory(
    folder: Path, count: int, size: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with running_service(folder / "data") as service:
        [warm] = many_small(1, 1000, seed=99)
        assert httpx.post(f"{service.url}/v2/studies", content=_parts(iter([warm])), headers=_PARTS).status_code == 200
        [worker] = service.workers()
        Path(f"/proc/{worker}/clear_refs").write_text("5")  # from now on VmHWM is the most since now
        before = _kibibytes(worker, "VmRSS")
        started = time.monotonic()
        body = _parts(many_small(count, size)) if count > 1 else _parts_of_one(size)
        answer = httpx.post(f"{service.url}/v2/studies", content=body, headers=_PARTS, timeout=600)
        seconds = time.monotonic() - started
        growth = (_kibibytes(worker, "VmHWM") - before) // 1024
        with capsys.disabled():
            print(f"\n{count * size >> 20} MiB in {count}: {seconds:.1f} s, {before // 1024} MiB, {growth} MiB more")
        assert answer.status_code == 200, answer.text[:500]
        assert growth < 256
        assert _count(service, "instances") == _count(service, "changes") == count + 1
        with closing(sqlite3.connect(service.data_dir / "depot.sqlite")) as connection:
            [total] = connection.execute("SELECT sum(size) FROM instances").fetchone()
        assert total >= count * size


def _parts_of_one(size: int) -> Iterator[bytes]:
    """One instance that grows by a last element (PS3.5 section 7.1.2: OB with a length of four bytes)."""
    [sample] = many_small(1, 1000, seed=5)
    yield b"--cut\r\nContent-Type: application/dicom\r\n\r\n"
    yield sample.content
    yield b"\xfc\xff\xfc\xffOB\0\0" + size.to_bytes(4, "little")  # Data Set Trailing Padding
    block = bytes(_MIB)
    for _ in range(size // _MIB):
        yield block
    yield b"\r\n--cut--\r\n"


class Load:
    """What the clients of the minute do until they are told to stop; any answer but a good one ends the test."""

    def __init__(self, url: str, archive: Archive) -> None:
        self._url = url
        self._archive = archive
        self.ended = threading.Event()

    def store(self, number: int) -> list[str]:
        """Mostly small ones, one or four at a time; returns what was acknowledged."""
        small = many_small(10**6, _SMALL_BYTES, seed=100 + number)
        large = many_small(10**6, _LARGE_BYTES, seed=200 + number)
        acknowledged: list[str] = []
        with httpx.Client(base_url=self._url, timeout=60) as client:
            for turn in itertools.count():
                if self.ended.is_set():
                    return acknowledged
                samples = [next(large if (turn + n) % 5 == 0 else small) for n in range(4 if turn % 3 == 0 else 1)]
                answer = client.post("/v2/studies", content=b"".join(_parts(iter(samples))), headers=_PARTS)
                assert answer.status_code == 200, answer.text
                acknowledged += [str(each.ref) for each in samples]
        raise AssertionError

    def retrieve(self, number: int) -> int:
        """Studies, metadata, instances and frames of what was there at the start; each answer is looked at."""
        randomness = Random(number)
        refs = self._archive.identifiers
        with httpx.Client(base_url=self._url, timeout=60) as client:
            for count in itertools.count():
                if self.ended.is_set():
                    return count
                self._retrieve_one(
                    client, randomness.choice(refs), ("instance", "metadata", "frame", "study")[count % 4]
                )
        raise AssertionError

    def _retrieve_one(self, client: httpx.Client, ref: str, kind: str) -> None:
        content = self._archive.contents[ref]
        study, series, uid = ref.split("/")
        of_study = f"/v2/studies/{study}"
        of_instance = f"{of_study}/series/{series}/instances/{uid}"
        siblings = [other for other in self._archive.identifiers if other.startswith(f"{study}/")]
        match kind:
            case "instance":
                assert client.get(of_instance, headers=_AS_STORED).raise_for_status().content == content
            case "metadata":
                entries = client.get(f"{of_study}/metadata").raise_for_status().json()
                assert {each["00080018"]["Value"][0] for each in entries} == {
                    each.rpartition("/")[2] for each in siblings
                }
            case "frame":
                accept = {"Accept": "application/octet-stream"}
                frame = client.get(f"{of_instance}/frames/1", headers=accept).raise_for_status().content
                assert len(frame) > _SMALL_BYTES // 2
                assert content.endswith(frame)
            case "study":
                accept = {"Accept": 'multipart/related; type="application/dicom"; transfer-syntax=*'}
                body = client.get(of_study, headers=accept).raise_for_status().content
                assert all(self._archive.contents[each] in body for each in siblings)


def _any_ended(futures: Sequence[Future[Any]]) -> bool:
    return any(each.done() for each in futures)


@pytest.mark.long
def test_a_minute_of_storing_retrieving_and_exporting_at_once_goes_without_an_error(
    folder: Path, azurite: Azurite, capsys: pytest.CaptureFixture[str]
) -> None:
    archive = import_in_process(folder, many_small(2000, _SMALL_BYTES, instances_per_series=25, series_per_study=2))
    container = azurite.create_container()
    with running_service(archive.data_dir, export_allowed_endpoints=azurite.account_url) as service:
        load = Load(service.url, archive)
        destination = azure_destination(azurite.container_url(container, azurite.container_sas(container)))
        with Memory(service) as memory, ThreadPoolExecutor(12) as pool:
            operation_id = service.begin(destination)
            storing = [pool.submit(load.store, number) for number in range(8)]
            retrieving = [pool.submit(load.retrieve, number) for number in range(4)]
            try:
                until = time.monotonic() + _LOAD_SECONDS
                while time.monotonic() < until and not _any_ended(storing) and not _any_ended(retrieving):
                    time.sleep(0.1)
            finally:
                load.ended.set()
            acknowledged = [ref for each in storing for ref in each.result()]
            retrieved = sum(each.result() for each in retrieving)
            state: dict[str, Any] = service.wait(operation_id)
        with capsys.disabled():
            print(f"\n{len(acknowledged)} stored, {retrieved} retrievals, MiB in memory: {memory}")
        assert len(set(acknowledged)) == len(acknowledged) > 100
        assert retrieved > 40
        assert max(memory.samples) < 600 * _MIB

        assert (state["status"], state["results"]["skipped"]) == ("succeeded", 0)
        keys = instance_keys(operation_id, archive.contents)
        copies = azurite.read_tree(container, f"{operation_id}/results/")
        assert copies == {keys[ref]: content for ref, content in archive.contents.items()}
        expected = len(acknowledged) + len(archive.contents)
        assert _count(service, "instances", "deleted_sequence = 0") == _count(service, "instances") == expected
        assert _count(service, "changes") == _count(service, "instance_metadata") == expected
        latest = httpx.get(f"{service.url}/v2/changefeed/latest", params={"includeMetadata": "false"}, timeout=30)
        assert latest.json()["sequence"] == expected
