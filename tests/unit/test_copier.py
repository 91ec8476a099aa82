"""The copy loop's bounds in trouble: many exports that hang, a flush that never succeeds. Shown without a network."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager

import pytest
from xxhash import xxh3_64_intdigest

from dicom_depot.domain.errors import DestinationFault, FaultKind
from dicom_depot.domain.instance import StoredObject
from dicom_depot.domain.operation import OperationId
from dicom_depot.export.copier import CopyPool, ExportWatch, copy_chunk
from dicom_depot.testing.memory import MemoryBlobStore

CONTENT = b"x" * 1000
KEY = "a/0"
OPERATION = OperationId("0" * 32)


def objects(count: int) -> list[StoredObject]:
    return [StoredObject(n, "1", "2", str(n), KEY, len(CONTENT), xxh3_64_intdigest(CONTENT)) for n in range(count)]


def store() -> MemoryBlobStore:
    store = MemoryBlobStore()
    store.put(KEY, [CONTENT])
    return store


class Place:
    """A destination that takes everything, after a while."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self.puts = 0

    def put(self, key: str, content: bytes) -> None:
        time.sleep(self.seconds)
        self.puts += 1

    def put_stream(self, key: str, blocks: Iterator[bytes], size: int) -> None:
        self.put(key, b"".join(blocks))

    def flush(self, keys: Iterable[str]) -> None:
        pass

    def create_log(self, key: str) -> str | None:
        raise NotImplementedError

    def write_log(self, key: str, blocks: Iterable[bytes], *, if_match: str | None) -> str | None:
        raise NotImplementedError

    def remove_log(self, key: str) -> bool:
        raise NotImplementedError

    def close(self) -> None:
        pass


class Hanging(Place):
    """Lets a request hang, then fail."""

    def put(self, key: str, content: bytes) -> None:
        time.sleep(self.seconds)
        raise DestinationFault("TimedOut", "no answer", FaultKind.TRANSIENT)


class NeverFlushed(Place):
    """Takes everything, and can make none of it durable."""

    def flush(self, keys: Iterable[str]) -> None:
        raise DestinationFault("DestinationFull", "no space left", FaultKind.TRANSIENT)


@contextmanager
def running(pool: CopyPool, places: list[Hanging]) -> Iterator[None]:
    watches = [ExportWatch(3600, pool.share(), pool.pace()) for _ in places]
    threads = [
        threading.Thread(target=copy_chunk, args=(OPERATION, objects(50), store(), place, pool, watch))
        for place, watch in zip(places, watches, strict=True)
    ]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        for watch in watches:
            watch.stop.set()
        for thread in threads:
            thread.join()


def test_however_many_destinations_hang_another_export_goes_on() -> None:
    pool = CopyPool(concurrency=4, bytes_in_flight=1 << 20, stream_bytes=1 << 20, chunks=20)
    place = Place(0.002)
    with running(pool, [Hanging(0.5) for _ in range(12)]):
        time.sleep(1.5)  # by then all of them know that they are in trouble
        began = time.monotonic()
        outcome, fault = copy_chunk(
            OPERATION, objects(200), store(), place, pool, ExportWatch(60, pool.share(), pool.pace())
        )
        assert (outcome.exported, fault) == (200, None)
        assert time.monotonic() - began < 5
    pool.close()


@pytest.mark.parametrize("concurrency", [1, 2, 16])
def test_an_instance_as_large_as_the_bytes_in_flight_is_alone(concurrency: int) -> None:
    pool = CopyPool(concurrency, bytes_in_flight=1 << 20, stream_bytes=1 << 20, chunks=1)
    assert 2 * pool.slots_for(1 << 20) > concurrency
    pool.close()


def test_a_flush_that_never_succeeds_ends_the_export_when_its_time_is_over() -> None:
    pool = CopyPool(concurrency=2, bytes_in_flight=1 << 20, stream_bytes=1 << 20, chunks=1)
    began = time.monotonic()
    outcome, fault = copy_chunk(
        OPERATION, objects(5), store(), NeverFlushed(), pool, ExportWatch(1.0, pool.share(), pool.pace())
    )
    assert time.monotonic() - began < 10
    assert outcome.exported == 0
    assert fault is not None
    assert (fault.kind, fault.code) == (FaultKind.PERMANENT, "DestinationUnavailable")
    pool.close()


def test_without_more_threads_a_chunk_goes_on_with_those_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = CopyPool(concurrency=8, bytes_in_flight=1 << 20, stream_bytes=1 << 20, chunks=1)
    submit, lanes = pool.submit, []

    def few(lane: Callable[[], None]) -> Future[None]:
        lanes.append(lane)
        if len(lanes) > 1:
            raise RuntimeError("can't start new thread")
        return submit(lane)

    monkeypatch.setattr(pool, "submit", few)
    outcome, _ = copy_chunk(OPERATION, objects(20), store(), Place(), pool, ExportWatch(60, pool.share(), pool.pace()))
    assert outcome.exported == 20
    assert len(lanes) > 1
    pool.close()
