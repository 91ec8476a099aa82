"""Storing over the wire, on doubles: what is left when the store is full or away, and commits of many together."""

from __future__ import annotations

import functools
import hashlib
import itertools
import threading
import time
from collections.abc import Callable, Sequence

import pytest

from dicom_depot.codec.dicom_json import read_instance
from dicom_depot.domain.errors import (
    DepotError,
    FaultKind,
    PayloadTooLarge,
    ServiceUnavailable,
    SourceFault,
    StorageFull,
)
from dicom_depot.domain.identifiers import parse_uid
from dicom_depot.domain.instance import InstanceRecord
from dicom_depot.ports import AddOutcome
from dicom_depot.services import group_commit
from dicom_depot.services.group_commit import GroupCommit
from dicom_depot.services.store import (
    IN_MEMORY_BYTES_MAX,
    FailureReason,
    StoreOutcome,
    StoreRules,
    StoreService,
    StoreSession,
    stored_refs,
)
from dicom_depot.testing.faults import FaultPlan, When, faulty
from dicom_depot.testing.memory import MemoryBlobStore, MemoryIndex
from dicom_depot.testing.samples import Sample, ct_volume, many_small

BLOCK_BYTES = 64 << 10


class ScarceStore(MemoryBlobStore):
    """A store with so much space left; a writer fails at the write that goes beyond it, and leaves nothing."""

    def __init__(self, free: int | None) -> None:
        super().__init__()
        self.free = free

    def free_bytes(self) -> int | None:
        return self.free


def service(store: MemoryBlobStore, index: MemoryIndex | None = None, min_free_bytes: int = 1000) -> StoreService:
    return StoreService(
        store,
        MemoryIndex() if index is None else index,
        list,
        instance_bytes_max=8 << 20,
        instances_max=100,
        min_free_bytes=min_free_bytes,
    )


def large(seed: int = 0) -> Sample:
    [sample] = ct_volume(slices=1, rows=1024, columns=1024, seed=seed)
    assert len(sample.content) > IN_MEMORY_BYTES_MAX
    return sample


def send(session: StoreSession, *samples: Sample) -> None:
    """The instances block by block, as a request brings them."""
    for sample in samples:
        session.begin_instance()
        for start in range(0, len(sample.content), BLOCK_BYTES):
            session.write(sample.content[start : start + BLOCK_BYTES])
        session.end_instance()


def request(stores: StoreService, *samples: Sample, rules: StoreRules | None = None) -> list[StoreOutcome]:
    """One whole request; one that fails is abandoned, as the route does."""
    session = stores.begin(rules or StoreRules())
    try:
        send(session, *samples)
        return session.commit()
    except BaseException:
        session.abandon()
        raise


def full() -> DepotError:
    return StorageFull("no space")


def away() -> DepotError:
    return SourceFault("SourceUnavailable", "the store is away", FaultKind.TRANSIENT)


# Space


@pytest.mark.parametrize(("free", "is_taken"), [(999, False), (0, False), (1000, True), (10**12, True), (None, True)])
def test_nothing_is_begun_below_the_space_to_be_left_free(free: int | None, is_taken: bool) -> None:
    store = ScarceStore(free)
    stores = service(store)
    [sample] = ct_volume(1, 8, 8)
    if is_taken:
        [outcome] = request(stores, sample)
        assert outcome.failure is None
        return
    with pytest.raises(StorageFull, match="DICOM_DEPOT_MIN_FREE_BYTES"):
        request(stores, sample)
    assert store.objects == {}
    store.free = 10**12
    assert request(stores, sample)[0].failure is None


# Faults of the store


class BreakingStore(MemoryBlobStore):
    """A store whose writers fail at their n-th block, whole writers from the n-th `put` on."""

    def __init__(self, error: Callable[[], DepotError], *, write: int = 10**9, put: int = 10**9) -> None:
        super().__init__()
        self.error = error
        self.write_left, self.put_left = write, put

    def put(self, key: str, blocks: object) -> None:
        self.put_left -= 1
        if self.put_left < 0:
            raise self.error()
        super().put(key, blocks)  # type: ignore[arg-type]

    def writer(self, key: str) -> object:  # type: ignore[override]
        return _BreakingWriter(self, super().writer(key))


class _BreakingWriter:
    def __init__(self, store: BreakingStore, writer: object) -> None:
        self._store, self._writer = store, writer

    def write(self, block: bytes) -> None:
        self._store.write_left -= 1
        if self._store.write_left < 0:
            raise self._store.error()
        self._writer.write(block)  # type: ignore[attr-defined]

    def close(self) -> None:
        self._writer.close()  # type: ignore[attr-defined]

    def abandon(self) -> None:
        self._writer.abandon()  # type: ignore[attr-defined]


@pytest.mark.parametrize("error", [full, away])
@pytest.mark.parametrize("number", [0, 1, 5, 20])
def test_a_fault_in_the_middle_of_a_large_instance_leaves_nothing(error: Callable[[], DepotError], number: int) -> None:
    store, index = BreakingStore(error, write=number), MemoryIndex()
    small = ct_volume(2, 8, 8, seed=5)
    with pytest.raises(type(error())):
        request(service(store, index), *small, large())
    assert store.objects == {}
    assert index.sequence() == 0


@pytest.mark.parametrize("error", [full, away])
@pytest.mark.parametrize("number", [0, 2])
def test_a_fault_at_a_small_instance_leaves_nothing(error: Callable[[], DepotError], number: int) -> None:
    store, index = BreakingStore(error, put=number), MemoryIndex()
    with pytest.raises(type(error())):
        request(service(store, index), *ct_volume(4, 8, 8))
    assert store.objects == {}
    assert index.sequence() == 0


def test_a_fault_while_a_large_instance_is_read_again_leaves_nothing() -> None:
    store, index = MemoryBlobStore(), MemoryIndex()
    plan = FaultPlan("store.read_range", 1, error=away)
    with pytest.raises(SourceFault):
        request(service(faulty(store, "store", plan), index), *ct_volume(1, 8, 8, seed=5), large())
    assert plan.acted_count == 1
    assert store.objects == {}
    assert index.sequence() == 0


@pytest.mark.parametrize(("name", "error"), [("store.make_durable", full), ("index.add", full)])
def test_a_store_that_is_full_at_the_commit_leaves_nothing(name: str, error: Callable[[], DepotError]) -> None:
    store, index = MemoryBlobStore(), MemoryIndex()
    plan = FaultPlan(name, 1, error=error)
    stores = service(faulty(store, "store", plan), faulty(index, "index", plan))
    samples = [*ct_volume(2, 8, 8, seed=5), large()]
    with pytest.raises(StorageFull):
        request(stores, *samples)
    assert plan.acted_count == 1
    assert store.objects == {}
    assert index.sequence() == 0
    assert [outcome.failure for outcome in request(stores, *samples)] == [None, None, None]  # it may be sent again
    assert sorted(store.objects.values()) == sorted(sample.content for sample in samples)


@pytest.mark.parametrize(
    ("name", "error"), [("store.make_durable", away), ("index.add", lambda: ServiceUnavailable("busy"))]
)
def test_another_fault_at_the_commit_is_raised_and_no_row_lacks_its_object(
    name: str, error: Callable[[], DepotError]
) -> None:
    for when in When:
        store, index = MemoryBlobStore(), MemoryIndex()
        plan = FaultPlan(name, 1, when, error)
        stores = service(faulty(store, "store", plan), faulty(index, "index", plan))
        with pytest.raises(type(error())):
            request(stores, *ct_volume(3, 8, 8))
        for entry in index.scan(0, 100):
            assert hashlib.sha256(store.objects[entry.store_key]).digest() == entry.sha256
        assert len(index.scan(0, 100)) == (3 if name == "index.add" and when is When.AFTER else 0)


def test_a_request_that_is_abandoned_leaves_nothing_at_any_point() -> None:
    store, index = MemoryBlobStore(), MemoryIndex()
    stores = service(store, index)
    session = stores.begin(StoreRules())
    send(session, *ct_volume(2, 8, 8))
    session.begin_instance()
    session.write(large().content[: IN_MEMORY_BYTES_MAX + 1])
    session.abandon()
    session.abandon()
    assert store.objects == {}
    assert index.sequence() == 0


def test_an_instance_that_fails_leaves_no_object_whatever_its_size() -> None:
    store, index = MemoryBlobStore(), MemoryIndex()
    stores = service(store, index)
    other = StoreRules(study_uid=parse_uid("1.2.3"))
    assert [each.failure for each in request(stores, *ct_volume(1, 8, 8), large(), rules=other)] == [
        FailureReason.VALIDATION
    ] * 2
    assert store.objects == {}
    sample = large()
    assert request(stores, sample)[0].failure is None
    assert request(stores, sample)[0].failure is FailureReason.ALREADY_EXISTS
    assert list(store.objects.values()) == [sample.content]


def test_limits_are_refused_before_the_bytes_are_kept() -> None:
    store = MemoryBlobStore()
    stores = StoreService(store, MemoryIndex(), list, instance_bytes_max=3 << 20, instances_max=2, min_free_bytes=0)
    session = stores.begin(StoreRules())
    session.begin_instance()
    session.write(bytes(3 << 20))
    with pytest.raises(PayloadTooLarge):
        session.write(b"\0")
    session.abandon()
    session = stores.begin(StoreRules())
    send(session, *ct_volume(2, 8, 8))
    with pytest.raises(PayloadTooLarge):
        session.begin_instance()
    session.abandon()
    assert store.objects == {}


# Commits of many requests together


class GatedStore(MemoryBlobStore):
    """The first commit waits until it is let go on; a commit with one of the `bad` keys fails."""

    def __init__(self) -> None:
        super().__init__()
        self.is_committing, self.gate = threading.Event(), threading.Event()
        self.bad: set[str] = set()
        self.error: Callable[[], DepotError] = full
        self.commits: list[list[str]] = []

    def make_durable(self, keys: Sequence[str]) -> None:
        self.commits.append(list(keys))
        if len(self.commits) == 1:
            self.is_committing.set()
            assert self.gate.wait(20)
        if self.bad.intersection(keys):
            raise self.error()
        super().make_durable(keys)


class Rows:
    """A request that is nothing but its records."""

    def __init__(self, records: Sequence[InstanceRecord]) -> None:
        self.records = records
        self.failures: list[BaseException] = []

    def settled(self, outcomes: Sequence[AddOutcome]) -> list[AddOutcome]:
        return list(outcomes)

    def failed(self, error: BaseException) -> None:
        self.failures.append(error)


class Group:
    """Requests that meet at one commit: the first is held there until all others wait behind it."""

    def __init__(self, store: GatedStore) -> None:
        self.store, self.index = store, MemoryIndex()
        self.commits = GroupCommit(store, self.index)
        self.results: dict[int, list[AddOutcome] | Exception] = {}
        self.failures: list[BaseException] = []

    def run(self, requests: Sequence[Sequence[InstanceRecord]]) -> None:
        threads = [threading.Thread(target=self._add, args=each) for each in enumerate(requests)]
        threads[0].start()
        assert self.store.is_committing.wait(20)
        for count, thread in enumerate(threads[1:], 1):
            thread.start()
            deadline = time.monotonic() + 20
            while self.commits._waiting.qsize() < count and time.monotonic() < deadline:
                time.sleep(0.001)
        self.store.gate.set()
        for thread in threads:
            thread.join(20)
        assert len(self.results) == len(requests)

    def add(self, records: Sequence[InstanceRecord]) -> list[AddOutcome]:
        rows = Rows(records)
        try:
            return self.commits.submit(lambda: rows).result(20)
        finally:
            self.failures += rows.failures

    def _add(self, number: int, records: Sequence[InstanceRecord]) -> None:
        try:
            self.results[number] = self.add(records)
        except DepotError as error:
            self.results[number] = error


def records_of(store: MemoryBlobStore, count: int, seed: int = 0) -> list[InstanceRecord]:
    records = []
    for sample, key in zip(many_small(count, seed=seed), store.new_keys(count), strict=True):
        read = read_instance(sample.content, len(sample.content))
        store.put(key, [sample.content])
        digest = hashlib.sha256(sample.content).digest()
        records.append(InstanceRecord(read.header, key, len(sample.content), digest, 0, read.metadata))
    return records


def test_requests_that_wait_are_committed_together_and_each_gets_its_own_outcomes() -> None:
    store = GatedStore()
    records = records_of(store, 60)
    sizes = [1, 2, 5, 1, 3, 4, 2, 6, 1, 5]
    cuts = [0, *itertools.accumulate(sizes)]
    requests = [records[start:end] for start, end in itertools.pairwise(cuts)]
    requests[3] = [records[0], *requests[3], records[1]]  # two that others bring too
    requests[7] = [*requests[7], records[0]]
    group = Group(store)
    group.run(requests)
    assert len(store.commits) == 2
    expected = [[AddOutcome.STORED] * len(each) for each in requests]
    expected[3] = [AddOutcome.ALREADY_THERE, AddOutcome.STORED, AddOutcome.ALREADY_THERE]
    expected[7] = [*[AddOutcome.STORED] * 6, AddOutcome.ALREADY_THERE]
    assert [group.results[number] for number in range(len(requests))] == expected
    assert store.commits[1] == [record.store_key for each in requests[1:] for record in each]


@pytest.mark.parametrize("error", [full, away])
def test_a_commit_that_fails_fails_for_its_whole_group_and_for_nobody_else(error: Callable[[], DepotError]) -> None:
    store = GatedStore()
    store.error = error
    records = records_of(store, 12)
    store.bad = {records[5].store_key}
    group = Group(store)
    group.run([[each] for each in records])
    assert group.results[0] == [AddOutcome.STORED]
    assert all(isinstance(group.results[number], type(error())) for number in range(1, 12))
    assert len(group.failures) == 11, "each request is told that it failed"
    assert [entry.store_key for entry in group.index.scan(0, 100)] == [records[0].store_key]
    store.bad = set()
    assert group.add(records[1:]) == [AddOutcome.STORED] * 11


def test_a_group_has_a_bound_and_a_request_is_never_split(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group_commit, "RECORDS_MAX", 4)
    store = GatedStore()
    records = records_of(store, 20)
    requests = [records[:1], records[1:3], records[3:5], records[5:14], records[14:15], records[15:20]]
    group = Group(store)
    group.run(requests)
    assert [len(keys) for keys in store.commits] == [1, 4, 9, 6]
    assert [len(result) for result in _outcomes(group, len(requests))] == [1, 2, 2, 9, 1, 5]


def _outcomes(group: Group, count: int) -> list[list[AddOutcome]]:
    found = []
    for number in range(count):
        result = group.results[number]
        assert isinstance(result, list)
        found.append(result)
    return found


@pytest.mark.parametrize("is_failing", [False, True])
def test_many_threads_store_and_each_learns_the_truth_about_its_own(is_failing: bool) -> None:
    store, index = MemoryBlobStore(), MemoryIndex()
    plan = FaultPlan("store.make_durable" if is_failing else None, 3, error=full, times=2)
    stores = service(faulty(store, "store", plan), index)
    samples = list(many_small(96, seed=3))
    succeeded: list[Sample] = []
    refused: list[Sample] = []
    lock = threading.Lock()

    def work(own: Sequence[Sample]) -> None:
        for start in range(0, len(own), 2):
            pair = own[start : start + 2]
            try:
                outcomes = request(stores, *pair)
            except StorageFull:
                with lock:
                    refused.extend(pair)
                continue
            assert stored_refs(outcomes) == [sample.ref for sample in pair]
            with lock:
                succeeded.extend(pair)

    threads = [threading.Thread(target=work, args=(samples[number::12],)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(succeeded) + len(refused) == 96
    assert bool(refused) == is_failing
    assert set(index.find([sample.ref for sample in samples])) == {sample.ref for sample in succeeded}
    assert sorted(store.objects.values()) == sorted(sample.content for sample in succeeded)
    assert set(store.objects) <= store.durable


def test_a_request_that_cannot_be_prepared_fails_alone() -> None:
    store = GatedStore()
    store.gate.set()
    group = Group(store)
    records = records_of(store, 2)

    def fail() -> Rows:
        raise full()

    first = group.commits.submit(lambda: Rows(records[:1]))
    failing = group.commits.submit(fail)
    last = group.commits.submit(lambda: Rows(records[1:]))
    assert first.result(20) == [AddOutcome.STORED] == last.result(20)
    with pytest.raises(StorageFull):
        failing.result(20)


def test_a_request_that_is_cancelled_before_its_turn_is_not_begun() -> None:
    store = GatedStore()
    group = Group(store)
    records = records_of(store, 2)
    running = group.commits.submit(lambda: Rows(records[:1]))
    assert store.is_committing.wait(20)
    begun: list[bool] = []

    def prepare() -> Rows:
        begun.append(True)
        return Rows(records[1:])

    waiting = group.commits.submit(prepare)
    assert waiting.cancel()
    assert not running.cancel(), "what is being committed cannot be called back"
    store.gate.set()
    assert running.result(20) == [AddOutcome.STORED]
    group.commits.close()
    assert not begun


def test_after_the_end_everything_submitted_is_done_and_nothing_new_begins() -> None:
    store = GatedStore()
    store.gate.set()
    group = Group(store)
    rows = [Rows([record]) for record in records_of(store, 20)]
    futures = [group.commits.submit(functools.partial(lambda each: each, each)) for each in rows]
    group.commits.close()
    assert [future.result(0) for future in futures] == [[AddOutcome.STORED]] * 20
    with pytest.raises(ServiceUnavailable):
        group.commits.submit(lambda: Rows([]))
