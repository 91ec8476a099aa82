"""The bulk import, on doubles and in this process."""

from __future__ import annotations

import hashlib
import os
import struct
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import pytest
import xxhash

from dicom_depot.domain.errors import InvalidRequest, ServiceUnavailable, StorageFull
from dicom_depot.domain.identifiers import InstanceRef
from dicom_depot.domain.instance import InstanceRecord
from dicom_depot.ports import AddOutcome, KnownInstance
from dicom_depot.services import ingest_batch
from dicom_depot.services.import_sources import Candidate
from dicom_depot.services.ingest import (
    IngestProblem,
    IngestSummary,
    ProblemKind,
    batches,
    find_files,
    ingest,
)
from dicom_depot.testing.memory import MemoryBlobStore, MemoryIndex
from dicom_depot.testing.samples import Sample, ct_volume, many_small


class Depot:
    """A store and an index of one test, and what the last import said."""

    def __init__(self, store: MemoryBlobStore | None = None, index: MemoryIndex | None = None) -> None:
        self.store, self.index = store or MemoryBlobStore(), index or MemoryIndex()
        self.problems: list[IngestProblem] = []

    def run(self, *paths: Path, stop: object = None) -> IngestSummary:
        self.problems = []
        summary = ingest(
            find_files(paths),
            lambda: (self.store, self.index),
            processes=0,
            on_problem=self.problems.append,
            stop=stop,  # type: ignore[arg-type]
        )
        self.check()
        return summary

    def check(self) -> None:
        """Every row has its bytes, and they are durable; there is no object without a row."""
        entries = self.index.scan(0, 1_000_000)
        assert {entry.store_key for entry in entries} == set(self.store.objects)
        assert set(self.store.objects) <= self.store.durable
        for entry, stored in zip(entries, self.index.fetch([e.instance_id for e in entries]), strict=True):
            content = self.store.objects[entry.store_key]
            assert hashlib.sha256(content).digest() == entry.sha256
            assert len(content) == entry.size == stored.size
            assert xxhash.xxh3_64_intdigest(content) == stored.xxh3


def write(folder: Path, samples: Iterable[Sample]) -> None:
    for sample in samples:
        path = folder / sample.file_name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(sample.content)


def altered(sample: Sample) -> bytes:
    """The same identifiers, other bytes."""
    return sample.content[:-1] + bytes([sample.content[-1] ^ 1])


def test_every_file_has_one_outcome_and_a_second_run_stores_nothing(tmp_path: Path) -> None:
    write(tmp_path, many_small(150))
    first, second = ct_volume(2)
    (tmp_path / "z1.dcm").write_bytes(first.content)
    (tmp_path / "z2.dcm").write_bytes(altered(first))
    (tmp_path / "z3.dcm").write_bytes(first.content)
    (tmp_path / "z4.dcm").write_bytes(second.content[:200])
    (tmp_path / "z5.txt").write_text("not DICOM")
    depot = Depot()
    summary = depot.run(tmp_path)
    assert (summary.stored, summary.already_there, summary.conflicting) == (151, 1, 1)
    assert (summary.not_dicom, summary.broken, summary.files_seen) == (1, 1, 155)
    assert summary.bytes_stored == sum(map(len, depot.store.objects.values()))
    assert [(Path(p.path).name, p.kind) for p in depot.problems] == [
        ("z2.dcm", ProblemKind.CONFLICTING),
        ("z4.dcm", ProblemKind.BROKEN),
        ("z5.txt", ProblemKind.NOT_DICOM),
    ]
    assert depot.problems[0].identifier == str(first.ref)

    again = depot.run(tmp_path)
    assert (again.stored, again.already_there, again.conflicting) == (0, 152, 1)


def test_the_first_in_path_order_stays_also_across_batches(tmp_path: Path) -> None:
    (sample,) = ct_volume(1)
    (tmp_path / "a.dcm").write_bytes(sample.content)
    write(tmp_path / "b", many_small(100))
    (tmp_path / "c.dcm").write_bytes(altered(sample))
    depot = Depot()
    assert depot.run(tmp_path).conflicting == 1
    assert sample.content in depot.store.objects.values()
    assert Path(depot.problems[0].path).name == "c.dcm"


def test_paths_come_in_the_order_of_their_text(tmp_path: Path) -> None:
    for name in ("b", "a/2", "a/1", "a.dcm", "a-/x"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    found = [candidate.path for candidate in find_files([tmp_path])]
    assert found == sorted(found)
    assert len(found) == 5


def test_a_missing_path_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="No such file or directory"):
        find_files([tmp_path, tmp_path / "missing"])


def test_nothing_is_passed_over_in_silence(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "dangling").symlink_to(folder / "nowhere")
    (folder / "loop").symlink_to(folder)
    os.mkfifo(folder / "pipe")
    depot = Depot()
    summary = depot.run(folder)
    assert (summary.files_seen, summary.broken) == (3, 3)
    assert [problem.reason for problem in depot.problems] == [
        "No such file or directory",
        "a link to a folder is not followed",
        "not a regular file",
    ]


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_unreadable_folders_and_files_are_broken_with_the_systems_reason(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0)
    (tmp_path / "secret.dcm").touch(mode=0)
    depot = Depot()
    assert depot.run(tmp_path).broken == 2
    assert all("Permission denied" in problem.reason for problem in depot.problems)


def test_an_unreadable_folder_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "locked").mkdir()
    real = os.scandir

    def scandir(path: str) -> object:
        if path.endswith("locked"):
            raise PermissionError(13, "Permission denied", path)
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    (candidate,) = find_files([tmp_path])
    assert candidate.problem == "the folder cannot be read: Permission denied"


def test_a_file_that_vanishes_or_changes_is_broken(tmp_path: Path) -> None:
    sample, other = ct_volume(2)
    (tmp_path / "a.dcm").write_bytes(sample.content)
    (tmp_path / "b.dcm").write_bytes(other.content)
    candidates = list(find_files([tmp_path]))
    (tmp_path / "a.dcm").unlink()
    problems: list[IngestProblem] = []
    stores = (MemoryBlobStore(), MemoryIndex())
    summary = ingest(candidates, lambda: stores, processes=0, on_problem=problems.append)
    assert (summary.stored, summary.broken) == (1, 1)
    assert problems[0].reason == "No such file or directory"


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_zip_archives_are_read_member_by_member(tmp_path: Path) -> None:
    samples = list(many_small(70))
    first, second = ct_volume(2)
    with zipfile.ZipFile(tmp_path / "scans", "w", zipfile.ZIP_DEFLATED) as archive:
        for sample in samples:
            archive.writestr(sample.file_name, sample.content)
        archive.writestr("folder/", b"")
        archive.writestr("readme.txt", b"not DICOM")
        archive.writestr("inner.zip", b"PK\5\6" + bytes(18))
        archive.writestr("zz.dcm", first.content)
        archive.writestr("zz.dcm", second.content)  # names repeat in real archives
    depot = Depot()
    summary = depot.run(tmp_path)
    assert (summary.stored, summary.not_dicom, summary.files_seen) == (72, 2, 74)
    assert {Path(problem.path).name for problem in depot.problems} == {"scans!readme.txt", "scans!inner.zip"}


def test_bad_archive_members_are_broken_with_a_reason_and_do_not_stop_the_others(tmp_path: Path) -> None:
    first, second, third = ct_volume(3)
    path = tmp_path / "scans.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.dcm", first.content)
        archive.writestr("b.dcm", second.content)
        archive.writestr("c.dcm", third.content)
    content = bytearray(path.read_bytes())
    content[content.index(first.content) + 5000] ^= 1  # a bad checksum
    directory = content.index(b"PK\1\2", content.index(b"PK\1\2") + 1)
    content[directory + 8] |= 1  # the second member claims to be encrypted
    path.write_bytes(content)
    depot = Depot()
    summary = depot.run(path)
    assert (summary.stored, summary.broken) == (1, 2)
    assert "CRC" in depot.problems[0].reason
    assert depot.problems[1].reason == "the archive member is encrypted"


def test_an_unsupported_compression_and_a_damaged_archive_are_reported(tmp_path: Path) -> None:
    (sample,) = ct_volume(1)
    path = tmp_path / "scans.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.dcm", sample.content)
    content = bytearray(path.read_bytes())
    struct.pack_into("<H", content, content.index(b"PK\1\2") + 10, 97)
    path.write_bytes(content)
    depot = Depot()
    depot.run(path)
    assert "method 97" in depot.problems[0].reason
    content[content.index(b"PK\1\2")] = 0
    path.write_bytes(content)
    depot.run(path)
    assert depot.problems[0].reason.startswith("the archive cannot be read")


@pytest.fixture
def streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file is large."""
    monkeypatch.setattr(ingest_batch, "IN_MEMORY_BYTES_MAX", 100)
    monkeypatch.setattr(ingest_batch, "BLOCK_BYTES", 1000)


@pytest.mark.usefixtures("streamed")
def test_large_files_are_streamed_with_the_same_outcomes(tmp_path: Path) -> None:
    first, second = ct_volume(2)
    (tmp_path / "1.dcm").write_bytes(first.content)
    (tmp_path / "2.dcm").write_bytes(altered(first))
    with zipfile.ZipFile(tmp_path / "3.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.dcm", first.content)
        archive.writestr("b.dcm", second.content)
    depot = Depot()
    summary = depot.run(tmp_path)
    assert (summary.stored, summary.already_there, summary.conflicting) == (2, 1, 1)


@pytest.mark.usefixtures("streamed")
def test_a_large_file_that_changes_between_hash_and_copy_is_broken_and_leaves_nothing(tmp_path: Path) -> None:
    first, second = ct_volume(2)
    (tmp_path / "1.dcm").write_bytes(first.content)
    (tmp_path / "2.dcm").write_bytes(second.content)

    class Changing(MemoryIndex):
        def find(self, refs: Sequence[InstanceRef]) -> dict[InstanceRef, KnownInstance]:
            (tmp_path / "1.dcm").write_bytes(altered(first))
            return super().find(refs)

    depot = Depot(index=Changing())
    summary = depot.run(tmp_path)
    assert (summary.stored, summary.broken) == (1, 1)
    assert depot.problems[0].reason == "the file changed while it was read"


class FullStore(MemoryBlobStore):
    """Has room for so many objects."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room

    def put(self, key: str, blocks: Iterable[bytes]) -> None:
        if len(self.objects) >= self.room:
            raise StorageFull("no space left")
        super().put(key, blocks)


def test_a_full_store_stops_the_import_without_leftovers_and_the_next_run_goes_on(tmp_path: Path) -> None:
    write(tmp_path, many_small(200))
    depot = Depot(store=FullStore(100))
    summary = depot.run(tmp_path)
    assert isinstance(summary.failure, StorageFull)
    assert summary.stored == len(depot.store.objects) == 64  # whole batches only
    depot.store.room = 1000  # type: ignore[attr-defined]
    again = depot.run(tmp_path)
    assert again.failure is None
    assert (again.stored, again.already_there) == (136, 64)


class FailingIndex(MemoryIndex):
    """Fails at the second commit; `commits_first`: after it took effect, as when a connection breaks."""

    def __init__(self, error: Exception, *, commits_first: bool) -> None:
        super().__init__()
        self._error, self._commits_first, self._calls = error, commits_first, 0

    def add(self, records: Sequence[InstanceRecord]) -> list[AddOutcome]:
        self._calls += 1
        if self._calls != 2:
            return super().add(records)
        if self._commits_first:
            super().add(records)
        raise self._error


def test_a_full_database_leaves_no_objects_behind(tmp_path: Path) -> None:
    write(tmp_path, many_small(200))
    depot = Depot(index=FailingIndex(StorageFull("full"), commits_first=False))
    assert isinstance(depot.run(tmp_path).failure, StorageFull)
    assert depot.run(tmp_path).stored == 136


def test_a_commit_of_unknown_outcome_never_leaves_a_row_without_bytes(tmp_path: Path) -> None:
    write(tmp_path, many_small(200))
    depot = Depot(index=FailingIndex(ServiceUnavailable("connection lost"), commits_first=True))
    summary = depot.run(tmp_path)  # checks rows against bytes
    assert summary.failure is not None
    assert summary.failure.message == "connection lost"
    assert summary.stored == 64
    again = depot.run(tmp_path)
    assert (again.stored, again.already_there) == (72, 128)


def test_what_another_import_stored_meanwhile_is_decided_by_the_index(tmp_path: Path) -> None:
    first, second, third = ct_volume(3)
    write(tmp_path, (first, second, third))
    other = Depot()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "1").write_bytes(first.content)
    (tmp_path / "other" / "2").write_bytes(altered(second))

    class Racing(MemoryIndex):
        def find(self, refs: Sequence[InstanceRef]) -> dict[InstanceRef, KnownInstance]:
            found = super().find(refs)
            if not self.sequence():
                ingest(find_files([tmp_path / "other"]), lambda: (other.store, self), processes=0)
            return found

    store, index = MemoryBlobStore(), Racing()
    problems: list[IngestProblem] = []
    paths = [tmp_path / sample.file_name for sample in (first, second, third)]
    summary = ingest(find_files(paths), lambda: (store, index), processes=0, on_problem=problems.append)
    assert (summary.stored, summary.already_there, summary.conflicting) == (1, 1, 1)
    assert list(store.objects.values()) == [third.content]
    assert problems[0].identifier == str(second.ref)


class StopAfter:
    """Is set after it was asked so many times."""

    def __init__(self, times: int) -> None:
        self._left = times

    def is_set(self) -> bool:
        self._left -= 1
        return self._left < 0


@pytest.mark.parametrize("times", [0, 1, 10, 64, 65, 100, 129, 200, 300, 386])
def test_a_stop_at_any_time_leaves_whole_batches(tmp_path: Path, times: int) -> None:
    write(tmp_path, many_small(192, 1024))
    depot = Depot()
    summary = depot.run(tmp_path, stop=StopAfter(times))
    assert summary.is_interrupted
    assert summary.stored == len(depot.store.objects)
    assert summary.stored % 64 == 0
    again = depot.run(tmp_path)
    assert again.stored + again.already_there == 192


def test_an_interrupt_in_a_batch_leaves_nothing_of_it(tmp_path: Path) -> None:
    write(tmp_path, many_small(10))

    class Interrupted(MemoryBlobStore):
        def make_durable(self, keys: Sequence[str]) -> None:
            raise KeyboardInterrupt

    depot = Depot(store=Interrupted())
    assert depot.run(tmp_path).is_interrupted
    assert not depot.store.objects


def test_batches_are_bounded_by_count_and_bytes() -> None:
    def candidates() -> Iterator[Candidate]:
        yield from (Candidate(str(number), 1) for number in range(130))
        yield from (Candidate(str(number), 30 << 20) for number in range(5))
        yield Candidate("huge", 4 << 30)

    assert [len(batch) for batch in batches(candidates())] == [64, 64, 4, 2, 1, 1]
