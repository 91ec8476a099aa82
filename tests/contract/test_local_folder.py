"""Local folders keep both contracts, and stand hostile trees, full disks and killed writers."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from dicom_depot.adapters.folder_destination import FolderDestination, check_folder
from dicom_depot.adapters.folder_store import MARKER_NAME, FolderBlobStore
from dicom_depot.domain.errors import (
    DestinationFault,
    DestinationRefused,
    FaultKind,
    SourceFault,
    StorageFull,
)
from dicom_depot.testing.contracts import BlobStoreContract, DestinationContract

FOLDER = "exports/2024"
STUDY = "op/results/1.2"
KEY = f"{STUDY}/3.4/5.6.dcm"
LOG = "op/errors.log"


def files_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}


@pytest.fixture
def no_unnamed_files(monkeypatch: pytest.MonkeyPatch) -> None:
    forbid_unnamed_files(monkeypatch.setattr)


def forbid_unnamed_files(set_attribute: Callable[[Any, str, Any], None]) -> None:
    """As on NFS: O_TMPFILE is not supported."""
    real_open = os.open

    def without(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        return real_open(path, flags, *args, **kwargs)

    set_attribute(os, "open", without)


def fail(monkeypatch: pytest.MonkeyPatch, function: str, number: int, *, after: int = 0) -> None:
    """`os.<function>` raises from its call `after` + 1 on."""
    real = getattr(os, function)
    calls = 0

    def failing(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > after:
            raise OSError(number, os.strerror(number))
        return real(*args, **kwargs)

    monkeypatch.setattr(os, function, failing)


class TestFolderBlobStore(BlobStoreContract[FolderBlobStore]):
    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path: Path) -> None:
        self.tmp_path = tmp_path
        self.stores = 0

    def make_store(self) -> FolderBlobStore:
        self.stores += 1
        self.root = self.tmp_path / f"data{self.stores}" / "store"
        return FolderBlobStore(self.root)

    def take_away(self, store: FolderBlobStore) -> None:
        self.root.rename(self.tmp_path / "elsewhere")
        self.root.mkdir()  # the empty mount point

    def leave_leftover(self, store: FolderBlobStore) -> str | None:
        shard = next(path for path in self.root.iterdir() if path.is_dir())
        key = f"{shard.name}/.{'0f' * 16}.part"
        (self.root / key).write_bytes(b"begun")
        return key

    def test_files_and_directories_are_closed_to_others(self) -> None:
        store = self.make_store()
        [key] = store.new_keys(1)
        store.put(key, [b"content"])
        modes = {path.name: path.stat().st_mode & 0o777 for path in (self.root.parent).rglob("*")}
        assert modes == {"store": 0o700, MARKER_NAME: 0o600, key[:3]: 0o700, key[4:]: 0o600}

    def test_keys_share_one_directory(self) -> None:
        keys = self.make_store().new_keys(100)
        assert len({key[:3] for key in keys}) == 1
        assert all(len(key) == 36 and key[3] == "/" for key in keys)

    @pytest.mark.parametrize("key", ["", "abc", "abc/def", "../../etc/passwd", f"abc/{'0' * 32}\n", f"/bc/{'0' * 32}"])
    def test_a_malformed_key_is_never_written_or_deleted(self, key: str) -> None:
        store = self.make_store()
        attempts: list[Callable[[], None]] = [
            lambda: store.put(key, []),
            lambda: store.delete(key),
            lambda: store.make_durable([key]),
        ]
        for attempt in attempts:
            with pytest.raises(SourceFault, match="not a store key"):
                attempt()
        assert not self.root.exists()

    @pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
    @pytest.mark.parametrize("after", [0, 1, 3])
    def test_a_full_disk_leaves_nothing(self, number: int, after: int, monkeypatch: pytest.MonkeyPatch) -> None:
        store = self.make_store()
        [first, key] = store.new_keys(2)
        store.put(first, [b"first"])
        with monkeypatch.context() as patch:
            fail(patch, "write", number, after=after)
            with pytest.raises(StorageFull) as caught:
                store.put(key, [b"block"] * 5)
        assert str(self.tmp_path) not in caught.value.message
        assert [entry.key for entry in store.entries()] == [first]

    def test_a_really_full_disk_leaves_nothing(self, tiny_disk: Path) -> None:
        store = FolderBlobStore(tiny_disk / "store")
        stored: list[str] = []
        with pytest.raises(StorageFull):  # noqa: PT012 - any of the puts may be the one
            for key in store.new_keys(100):
                store.put(key, [b"x" * 100_000])
                stored.append(key)
        assert {entry.key for entry in store.entries()} == set(stored)
        assert all(len(store.read(key)) == 100_000 for key in stored)

    @pytest.mark.parametrize(
        ("number", "code", "kind"),
        [
            (errno.EIO, "SourceUnreadable", FaultKind.INSTANCE),
            (errno.EMFILE, "SourceUnavailable", FaultKind.TRANSIENT),
            (errno.ENFILE, "SourceUnavailable", FaultKind.TRANSIENT),
            (errno.ENOMEM, "SourceUnavailable", FaultKind.TRANSIENT),
            (errno.ESTALE, "SourceUnavailable", FaultKind.TRANSIENT),
            (errno.EACCES, "SourceUnavailable", FaultKind.TRANSIENT),
        ],
    )
    @pytest.mark.parametrize("function", ["open", "read"])
    def test_read_errors_are_sorted(
        self, number: int, code: str, kind: FaultKind, function: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store = self.make_store()
        [key] = store.new_keys(1)
        store.put(key, [b"content"])
        fail(monkeypatch, function, number)
        for attempt in (lambda: store.read(key), lambda: list(store.stream(key, 10))):
            with pytest.raises(SourceFault) as caught:
                attempt()
            assert (caught.value.code, caught.value.kind) == (code, kind)
            assert str(self.tmp_path) not in caught.value.message

    def test_short_reads_and_writes_lose_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        read, write = os.read, os.write
        monkeypatch.setattr(os, "read", lambda file, size: read(file, min(size, 1000)))
        monkeypatch.setattr(os, "write", lambda file, block: write(file, block[:700]))
        store = self.make_store()
        [key] = store.new_keys(1)
        content = os.urandom(10_000)
        store.put(key, [content[:5000], content[5000:]])
        assert store.read(key) == content

    def test_an_object_is_not_missing_when_the_disk_comes_back_meanwhile(self, monkeypatch: pytest.MonkeyPatch) -> None:
        store = self.make_store()
        [key] = store.new_keys(1)
        store.put(key, [b"content"])
        away = self.tmp_path / "away"
        self.root.rename(away)
        stat = os.stat

        def mounting(*args: Any, **kwargs: Any) -> os.stat_result:
            if os.path.lexists(away):
                away.rename(self.root)
            return stat(*args, **kwargs)

        monkeypatch.setattr(os, "stat", mounting)
        assert store.read(key) == b"content"

    def test_a_store_that_must_be_there_is_never_made_anew(self) -> None:
        root = self.tmp_path / "mount"
        root.mkdir()
        store = FolderBlobStore(root, may_create=False)
        for attempt in (lambda: store.put(store.new_keys(1)[0], [b"x"]), lambda: list(store.entries())):
            with pytest.raises(SourceFault, match="mounted") as caught:
                attempt()
            assert caught.value.kind is FaultKind.TRANSIENT
        assert files_below(root) == set()

    def test_make_durable_syncs_files_then_directories_and_new_parents_once(self, synced: list[str]) -> None:
        store = self.make_store()
        keys = store.new_keys(3)
        for key in keys:
            store.put(key, [b"content"])
        made = [str(self.tmp_path), str(self.root.parent), str(self.root / MARKER_NAME), str(self.root)]
        assert synced == made
        synced.clear()
        files = [str(self.root / key) for key in sorted(keys)]
        shard = str(self.root / keys[0][:3])
        store.make_durable(keys)
        assert synced == [*files, shard, str(self.root)]
        synced.clear()
        store.make_durable(keys[:1])
        assert synced == [str(self.root / keys[0]), shard]

    def test_foreign_files_are_not_entries(self) -> None:
        store = self.make_store()
        [key] = store.new_keys(1)
        store.put(key, [b"content"])
        (self.root / "lost+found").mkdir()
        (self.root / key[:3] / ".nfs0001").write_bytes(b"")
        assert [entry.key for entry in store.entries()] == [key]


class TestFolderDestination(DestinationContract[FolderDestination]):
    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path: Path) -> None:
        self.root = tmp_path / "root"
        self.root.mkdir()

    def make_destination(self) -> FolderDestination:
        return FolderDestination(self.root, FOLDER)

    def reopen(self, destination: FolderDestination) -> FolderDestination:
        return FolderDestination(self.root, FOLDER)

    def read_back(self, destination: FolderDestination, key: str) -> bytes | None:
        path = self.root / FOLDER / key
        return path.read_bytes() if path.exists() else None

    def keys(self, destination: FolderDestination) -> set[str]:
        return files_below(self.root / FOLDER)


@pytest.mark.usefixtures("no_unnamed_files")
class TestFolderDestinationWithoutUnnamedFiles(TestFolderDestination):
    pass


class TestFolderDestinationWithoutProc(TestFolderDestination):
    """As in a chroot: unnamed files can be written, but not linked through /proc."""

    @pytest.fixture(autouse=True)
    def _no_proc(self, monkeypatch: pytest.MonkeyPatch) -> None:
        fail(monkeypatch, "link", errno.ENOENT)


@pytest.fixture(params=["unnamed files", "parts"])
def both_ways(request: pytest.FixtureRequest) -> str:
    if request.param == "parts":
        request.getfixturevalue("no_unnamed_files")
    return str(request.param)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    path = tmp_path / "root"
    path.mkdir()
    return path


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    path = tmp_path / "outside"
    path.mkdir()
    return path


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MB. The tests with made-up errors say the same; this one needs the right to mount."""
    path = tmp_path / "tiny"
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(path)]
    is_mounted = os.geteuid() == 0 and subprocess.run(command, capture_output=True, check=False).returncode == 0
    if not is_mounted:
        pytest.skip("mounting a tmpfs is not allowed here")
    yield path
    subprocess.run(["umount", str(path)], check=True)


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The paths that were given to fsync, in order."""
    paths: list[str] = []
    fsync = os.fsync

    def recording(file: int) -> None:
        paths.append(os.readlink(f"/proc/self/fd/{file}"))
        fsync(file)

    monkeypatch.setattr(os, "fsync", recording)
    return paths


def refused(attempt: Callable[[], object], code: str, kind: FaultKind, root: Path) -> None:
    with pytest.raises(DestinationFault) as caught:
        attempt()
    assert (caught.value.code, caught.value.kind) == (code, kind)
    assert str(root) not in caught.value.message
    assert str(root.parent) not in caught.value.message


@pytest.mark.usefixtures("both_ways")
class TestHostileTrees:
    @pytest.mark.parametrize("level", range(6))
    @pytest.mark.parametrize("call", ["put", "put_stream", "create_log", "flush"])
    def test_a_symbolic_link_at_any_level_is_not_followed(
        self, level: int, call: str, root: Path, outside: Path
    ) -> None:
        components = [*FOLDER.split("/"), *KEY.split("/")[:-1]]
        parent = root.joinpath(*components[:level])
        parent.mkdir(parents=True, exist_ok=True)
        (parent / components[level]).symlink_to(outside)
        (outside / "mark").touch()
        destination = FolderDestination(root, FOLDER)
        calls: dict[str, Callable[[], object]] = {
            "put": lambda: destination.put(KEY, b"content"),
            "put_stream": lambda: destination.put_stream(KEY, iter([b"content"]), 7),
            "create_log": lambda: destination.create_log(f"{KEY}.log"),
            "flush": lambda: destination.flush([KEY]),
        }
        refused(calls[call], "DestinationNotFolder", FaultKind.PERMANENT, root)
        assert files_below(outside) == {"mark"}

    def test_the_root_itself_may_be_a_link_of_the_operators(self, root: Path, tmp_path: Path) -> None:
        (tmp_path / "link").symlink_to(root)
        FolderDestination(tmp_path / "link", FOLDER).put(KEY, b"content")
        assert files_below(root) == {f"{FOLDER}/{KEY}"}

    def test_a_link_under_the_final_name_is_replaced(self, root: Path, outside: Path) -> None:
        (outside / "precious").write_bytes(b"precious")
        path = root / FOLDER / KEY
        path.parent.mkdir(parents=True)
        path.symlink_to(outside / "precious")
        FolderDestination(root, FOLDER).put(KEY, b"content")
        assert path.read_bytes() == b"content"
        assert not path.is_symlink()
        assert (outside / "precious").read_bytes() == b"precious"

    @pytest.mark.parametrize("kind", ["symbolic", "hard"])
    def test_a_link_under_the_part_name_is_never_written_through(self, kind: str, root: Path, outside: Path) -> None:
        precious = outside / "precious"
        precious.write_bytes(b"precious")
        path = root / FOLDER / KEY
        path.parent.mkdir(parents=True)
        path.write_bytes(b"earlier")
        part = path.with_name(f".{path.name}.part")
        part.symlink_to(precious) if kind == "symbolic" else part.hardlink_to(precious)
        destination = FolderDestination(root, FOLDER)
        if kind == "symbolic":
            refused(lambda: destination.put(KEY, b"new"), "DestinationNotFolder", FaultKind.PERMANENT, root)
        else:
            destination.put(KEY, b"new")
            assert path.read_bytes() == b"new"
        assert precious.read_bytes() == b"precious"

    def test_a_study_replaced_by_a_link_between_two_puts(self, root: Path, outside: Path) -> None:
        destination = FolderDestination(root, FOLDER)
        destination.put(KEY, b"content")
        shutil.rmtree(root / FOLDER / STUDY)
        (root / FOLDER / STUDY).symlink_to(outside)
        refused(lambda: destination.put(KEY, b"new"), "DestinationNotFolder", FaultKind.PERMANENT, root)
        assert files_below(outside) == set()

    def test_a_study_moved_away_between_two_puts_is_found_out_by_flush(self, root: Path, outside: Path) -> None:
        destination = FolderDestination(root, FOLDER)
        destination.put(KEY, b"content")
        (root / FOLDER / STUDY).rename(root / "moved")
        other = f"{STUDY}/3.4/5.7.dcm"
        destination.put(other, b"content")
        refused(lambda: destination.flush([KEY, other]), "DestinationChanged", FaultKind.TRANSIENT, root)
        destination.put(KEY, b"content")
        destination.put(other, b"content")
        destination.flush([KEY, other])
        (root / FOLDER / STUDY).rename(root / "moved again")
        (root / FOLDER / STUDY).symlink_to(outside)
        refused(lambda: destination.flush([KEY]), "DestinationNotFolder", FaultKind.PERMANENT, root)
        assert files_below(outside) == set()

    def test_a_directory_removed_between_two_puts_is_made_again(self, root: Path) -> None:
        destination = FolderDestination(root, FOLDER)
        destination.put(KEY, b"content")
        shutil.rmtree(root / "exports")
        destination.put(KEY, b"new")
        shutil.rmtree(root / "exports")
        destination.put_stream(KEY, iter([b"new"]), 3)
        destination.flush([KEY])
        assert (root / FOLDER / KEY).read_bytes() == b"new"

    @pytest.mark.parametrize(
        "key",
        [
            "",
            "/",
            "..",
            "../x",
            "a/../x",
            "a/..",
            "a/.",
            "./a",
            "a//b",
            "/a",
            "/etc/x",
            "a/",
            "a\0b",
            "a\0/b",
            "a/./b",
        ],
    )
    def test_a_key_that_is_no_plain_path_is_refused(self, key: str, root: Path) -> None:
        for folder in ("", FOLDER):
            destination = FolderDestination(root, folder)
            for attempt in (partial(destination.put, key, b"x"), partial(destination.create_log, key)):
                refused(attempt, "DestinationRejected", FaultKind.INSTANCE, root)
            destination.remove_log(key)
        assert files_below(root.parent) == set()

    def test_a_name_that_is_too_long_concerns_that_instance_only(self, root: Path) -> None:
        destination = FolderDestination(root, FOLDER)
        refused(lambda: destination.put("a/" + "x" * 300, b""), "DestinationRejected", FaultKind.INSTANCE, root)
        destination.put(KEY, b"content")

    def test_a_directory_under_the_final_name_concerns_that_instance_only(self, root: Path) -> None:
        (root / FOLDER / KEY).mkdir(parents=True)
        destination = FolderDestination(root, FOLDER)
        refused(lambda: destination.put(KEY, b"x"), "DestinationRejected", FaultKind.INSTANCE, root)
        assert files_below(root) == set()

    @pytest.mark.parametrize("put_before", [False, True])
    def test_a_root_that_is_gone_is_permanent(self, put_before: bool, root: Path) -> None:
        destination = FolderDestination(root, FOLDER)
        if put_before:
            destination.put(KEY, b"content")
        shutil.rmtree(root)
        for attempt in (lambda: destination.put(KEY, b"x"), lambda: destination.flush([KEY])):
            refused(attempt, "DestinationMissing", FaultKind.PERMANENT, root)
        assert not root.exists()
        root.write_bytes(b"")
        refused(lambda: destination.put(KEY, b"x"), "DestinationMissing", FaultKind.PERMANENT, root)

    def test_the_folder_may_be_the_root(self, root: Path) -> None:
        destination = FolderDestination(root, "")
        destination.put(KEY, b"content")
        destination.put("plain", b"content")
        etag = destination.create_log(LOG)
        destination.write_log(LOG, [b"line"], if_match=etag)
        destination.flush([KEY, "plain"])
        assert files_below(root) == {KEY, "plain", LOG}
        destination.remove_log(LOG)
        assert files_below(root) == {KEY, "plain"}

    def test_removing_the_log_removes_the_empty_operation_folder(self, root: Path) -> None:
        destination = FolderDestination(root, FOLDER)
        destination.create_log(LOG)
        destination.remove_log(LOG)
        assert not (root / FOLDER / "op").exists()
        assert (root / FOLDER).exists()


@pytest.mark.usefixtures("both_ways")
class TestFaults:
    @pytest.mark.parametrize(
        ("number", "code", "kind"),
        [
            (errno.ENOSPC, "DestinationFull", FaultKind.TRANSIENT),
            (errno.EDQUOT, "DestinationFull", FaultKind.TRANSIENT),
            (errno.EACCES, "DestinationForbidden", FaultKind.PERMANENT),
            (errno.EPERM, "DestinationForbidden", FaultKind.PERMANENT),
            (errno.EROFS, "DestinationForbidden", FaultKind.PERMANENT),
            (errno.EIO, "DestinationUnavailable", FaultKind.TRANSIENT),
            (errno.EMFILE, "DestinationUnavailable", FaultKind.TRANSIENT),
            (errno.ESTALE, "DestinationUnavailable", FaultKind.TRANSIENT),
        ],
    )
    @pytest.mark.parametrize("function", ["open", "write"])
    def test_errors_are_sorted(
        self,
        number: int,
        code: str,
        kind: FaultKind,
        function: str,
        root: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        destination = FolderDestination(root, FOLDER)
        fail(monkeypatch, function, number)
        refused(lambda: destination.put(KEY, b"content"), code, kind, root)
        refused(lambda: destination.put_stream(KEY, iter([b"content"]), 7), code, kind, root)
        assert files_below(root) == set()

    @pytest.mark.parametrize("exists", [False, True])
    @pytest.mark.parametrize("after", range(4))
    def test_a_full_disk_leaves_what_was_there(
        self, exists: bool, after: int, root: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        destination = FolderDestination(root, FOLDER)
        if exists:
            destination.put(KEY, b"earlier")
        with monkeypatch.context() as patch:
            fail(patch, "write", errno.ENOSPC, after=after)
            attempt = lambda: destination.put_stream(KEY, iter([b"block"] * 9), 45)  # noqa: E731
            refused(attempt, "DestinationFull", FaultKind.TRANSIENT, root)
        assert files_below(root) == ({f"{FOLDER}/{KEY}"} if exists else set())
        if exists:
            assert (root / FOLDER / KEY).read_bytes() == b"earlier"
        destination.put(KEY, b"there is room again")
        assert (root / FOLDER / KEY).read_bytes() == b"there is room again"

    def test_a_really_full_disk_takes_more_once_there_is_room(self, tiny_disk: Path) -> None:
        destination = FolderDestination(tiny_disk, FOLDER)
        (tiny_disk / "ballast").write_bytes(b"x" * 500_000)
        written = []
        with pytest.raises(DestinationFault) as caught:  # noqa: PT012 - any of the puts may be the one
            for number in range(100):
                destination.put(f"{STUDY}/3.4/{number}.dcm", b"x" * 50_000)
                written.append(f"{number}.dcm")
        assert caught.value.code == "DestinationFull"
        assert files_below(tiny_disk / FOLDER / STUDY / "3.4") == set(written)
        (tiny_disk / "ballast").unlink()
        destination.put(KEY, b"x" * 50_000)
        destination.close()

    def test_flush_of_an_object_that_is_not_there_is_transient(self, root: Path) -> None:
        destination = FolderDestination(root, FOLDER)
        refused(lambda: destination.flush([KEY]), "DestinationChanged", FaultKind.TRANSIENT, root)

    def test_flush_syncs_files_then_directories_then_all_parents(self, root: Path, synced: list[str]) -> None:
        destination = FolderDestination(root, FOLDER)
        keys = [f"{STUDY}/3.4/{number}.dcm" for number in range(3)]
        for key in keys:
            destination.put(key, b"content")
        assert synced == []
        destination.flush(keys)
        base = root / FOLDER
        assert synced[:4] == [*(str(base / key) for key in keys), str(base / STUDY / "3.4")]
        above = [root, root / "exports", base, base / "op", base / "op/results", base / STUDY]
        assert sorted(synced[4:]) == [str(path) for path in above]

    def test_logs_are_durable_when_written(self, root: Path, synced: list[str]) -> None:
        destination = FolderDestination(root, FOLDER)
        etag = destination.create_log(LOG)
        base = root / FOLDER
        expected = [base / LOG, base / "op", root, root / "exports", base]
        assert synced == [str(path) for path in expected]
        synced.clear()
        destination.write_log(LOG, [b"line"], if_match=etag)
        assert synced == [str(base / "op/.errors.log.part"), str(base / "op")]

    def test_no_descriptor_is_leaked_and_few_are_held(self, root: Path) -> None:
        before = len(os.listdir("/proc/self/fd"))
        destination = FolderDestination(root, FOLDER)
        for number in range(200):
            destination.put(f"{STUDY}/{number}/1.dcm", b"content")
        assert len(os.listdir("/proc/self/fd")) <= before + 64
        destination.flush([f"{STUDY}/{number}/1.dcm" for number in range(200)])
        destination.write_log(LOG, [b""], if_match=destination.create_log(LOG))
        destination.close()
        assert len(os.listdir("/proc/self/fd")) == before

    def test_running_out_of_descriptors_is_transient(self, root: Path) -> None:
        destination = FolderDestination(root, FOLDER)
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        os.close(lowest_free := os.dup(0))
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free + 1, limits[1]))
        try:
            with pytest.raises(DestinationFault) as caught:
                destination.put(KEY, b"content")
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert caught.value.kind is FaultKind.TRANSIENT
        destination.put(KEY, b"content")


@pytest.mark.usefixtures("both_ways")
class TestKilledWriters:
    @pytest.mark.parametrize("exists", [False, True])
    @pytest.mark.parametrize("streamed", [False, True])
    def test_killed_at_any_step_and_run_again_leaves_nothing_else(
        self, exists: bool, streamed: bool, root: Path
    ) -> None:
        """A child kills itself before its n-th file system call, for every n."""
        path = root / FOLDER / KEY
        for step in range(1, 100):
            shutil.rmtree(root / "exports", ignore_errors=True)
            if exists:
                FolderDestination(root, FOLDER).put(KEY, b"earlier")
            was_killed = killed_at_step(step, lambda: write(FolderDestination(root, FOLDER), streamed))
            assert not path.exists() or path.read_bytes() in (CONTENT, b"earlier")
            write(FolderDestination(root, FOLDER), streamed)
            assert files_below(root) == {f"{FOLDER}/{KEY}"}
            assert path.read_bytes() == CONTENT
            if not was_killed:
                assert step > 5
                return
        pytest.fail("the write does not end")

    def test_a_log_survives_a_writer_killed_at_any_step(self, root: Path) -> None:
        destination = FolderDestination(root, FOLDER)
        for step in range(1, 100):
            destination.remove_log(LOG)
            etag = destination.create_log(LOG)
            late = partial(FolderDestination(root, FOLDER).write_log, LOG, [CONTENT], if_match=etag)
            was_killed = killed_at_step(step, late)
            assert (root / FOLDER / LOG).read_bytes() in (b"", CONTENT)
            destination.write_log(LOG, [b"again"], if_match=None)
            assert files_below(root) == {f"{FOLDER}/{LOG}"}
            if not was_killed:
                assert step > 5
                return

    def test_a_store_put_killed_at_any_step_leaves_what_entries_lists(self, tmp_path: Path) -> None:
        store = FolderBlobStore(tmp_path / "store")
        step = 1
        [first] = store.new_keys(1)
        store.put(first, [b"first"])
        while True:
            [key] = store.new_keys(1)
            was_killed = killed_at_step(step, partial(store.put, key, [CONTENT]))
            found = {entry.key for entry in store.entries()}
            assert files_below(tmp_path / "store") == {MARKER_NAME, *found}
            if key in found:
                assert store.read(key) == CONTENT
            for leftover in found - {first}:
                store.delete(leftover)
            if not was_killed:
                break
            step += 1
        assert step > 5
        assert [entry.key for entry in store.entries()] == [first]

    def test_kill_amid_many_threads_and_puts(self, root: Path, both_ways: str) -> None:
        script = textwrap.dedent("""
            import os, sys
            from concurrent.futures import ThreadPoolExecutor
            from pathlib import Path
            from dicom_depot.adapters.folder_destination import FolderDestination

            destination = FolderDestination(Path(sys.argv[1]), sys.argv[2])
            if sys.argv[3] == "parts":
                destination._has_unnamed_files = False

            def put(number):
                key = f"op/results/1.2/3.{number % 7}/{number}.dcm"
                if number % 3:
                    destination.put(key, b"%d," % number * 10_000)
                else:
                    destination.put_stream(key, iter([b"%d," % number * 5_000] * 2), 0)

            def chunk():
                with ThreadPoolExecutor(4) as pool:
                    list(pool.map(put, range(300)))

            if sys.argv[4] == "once":
                chunk()
            else:
                print("begun", flush=True)
                while True:
                    chunk()
        """)
        command = [sys.executable, "-c", script, str(root), FOLDER, both_ways]
        expected = {f"op/results/1.2/3.{number % 7}/{number}.dcm": number for number in range(300)}
        for round_number in range(5):
            child = subprocess.Popen([*command, "for ever"], stdout=subprocess.PIPE)
            with child:
                try:
                    assert child.stdout is not None
                    assert child.stdout.readline() == b"begun\n"
                    time.sleep(0.005 + 0.05 * round_number)
                finally:
                    child.kill()
        subprocess.run([*command, "once"], check=True)
        assert files_below(root / FOLDER) == set(expected)
        for key, number in expected.items():
            assert (root / FOLDER / key).read_bytes() == b"%d," % number * 10_000


def test_killed_on_a_first_run_leaves_nothing_at_all(root: Path) -> None:
    step = 1
    while killed_at_step(step, lambda: write(FolderDestination(root, FOLDER), True)):
        assert files_below(root) <= {f"{FOLDER}/{KEY}"}
        shutil.rmtree(root / "exports", ignore_errors=True)
        step += 1
    assert step > 5


@pytest.mark.usefixtures("no_unnamed_files")
def test_a_living_writers_part_is_waited_for_and_then_transient(root: Path) -> None:
    destination = FolderDestination(root, FOLDER)

    def blocks() -> Iterator[bytes]:
        yield b"begun"
        other = FolderDestination(root, FOLDER)
        refused(lambda: other.put(KEY, b"other"), "DestinationUnavailable", FaultKind.TRANSIENT, root)
        yield b" and ended"

    destination.put_stream(KEY, blocks(), 15)
    assert (root / FOLDER / KEY).read_bytes() == b"begun and ended"
    assert files_below(root) == {f"{FOLDER}/{KEY}"}


CONTENT = b"content" * 20_000


def write(destination: FolderDestination, streamed: bool) -> None:
    if streamed:
        destination.put_stream(KEY, iter([CONTENT[:50_000], CONTENT[50_000:]]), len(CONTENT))
    else:
        destination.put(KEY, CONTENT)


def killed_at_step(step: int, work: Callable[[], object]) -> bool:
    """Run `work` in a child that is killed before its n-th file system call; False when it ended first."""
    child = os.fork()
    if child == 0:
        calls = 0

        def counting(real: Callable[..., Any]) -> Callable[..., Any]:
            def counted(*args: Any, **kwargs: Any) -> Any:
                nonlocal calls
                calls += 1
                if calls == step:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args, **kwargs)

            return counted

        try:
            for name in ("open", "mkdir", "write", "link", "rename", "unlink", "fsync", "close"):
                setattr(os, name, counting(getattr(os, name)))
            work()
        except BaseException:  # the parent must see any error of the child
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return True
    assert os.WEXITSTATUS(status) == 0, "the child failed"
    return False


@pytest.mark.parametrize(
    ("text", "folder"),
    [
        ("", ""),
        (".", ""),
        ("a", "a"),
        ("a/b/c", "a/b/c"),
        ("a//b/", "a/b"),
        ("./a/./b", "a/b"),
        ("..a/b..", "..a/b.."),
        ("Studien 2024/Ärzte", "Studien 2024/Ärzte"),
        ("x" * 255, "x" * 255),
    ],
)
def test_a_folder_is_normalised(text: str, folder: str) -> None:
    assert check_folder(text) == folder


@pytest.mark.parametrize(
    "text",
    [
        "/",
        "/a",
        "//a",
        "..",
        "a/..",
        "a/../b",
        "../a",
        "a\\b",
        "a\0b",
        "a\nb",
        "a\x7fb",
        "a\x85b",
        "a\u2028b",
        "a\ud800b",
        "x" * 256,
        "ä" * 128,
        "a/" * 513,
    ],
)
def test_a_folder_that_is_no_plain_path_below_the_root_is_refused(text: str, tmp_path: Path) -> None:
    for attempt in (lambda: check_folder(text), lambda: FolderDestination(tmp_path, text)):
        with pytest.raises(DestinationRefused) as caught:
            attempt()
        assert caught.value.target == "destination.settings.folder"
        assert caught.value.message.startswith("The folder ")
