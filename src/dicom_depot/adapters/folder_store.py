"""The service's own store in a local folder. How a file is written: `folder_files`."""

from __future__ import annotations

import errno
import os
import re
import secrets
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from dicom_depot.adapters.folder_files import (
    BlocksFailed,
    open_part,
    opened_directory,
    own_errors_apart,
    read_whole,
    reason_of,
    renamed_when_whole,
    sync_directory,
    sync_files,
    write_blocks,
)
from dicom_depot.domain.errors import (
    FaultKind,
    SourceFault,
    StorageFull,
)
from dicom_depot.ports import StoreEntry

MARKER_NAME = ".dicom-depot-store"
MARKER_TEXT = b"A DICOM Depot store. Without this file the service takes the disk for not mounted.\n"

_NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT})


class FolderBlobStore:
    """The store as files `<3 hex>/<32 hex>` below `root`.

    A marker file tells "this object is gone" from "the disk is not mounted". With `may_create` the first
    write makes the root and its marker, and until then the store counts as empty. Without it (say, because
    the index already holds rows) a missing marker is always a fault, so that an unmounted disk never gets an
    empty store in its place.
    """

    def __init__(self, root: Path, *, may_create: bool = True) -> None:
        self._root = root
        self._prefix = f"{root}/"
        self._marker = f"{root}/{MARKER_NAME}"
        self._may_create = may_create
        self._durable_shards: set[str] = set()

    def new_keys(self, count: int) -> list[str]:
        shard = secrets.token_hex(2)[:3]
        return [f"{shard}/{secrets.token_hex(16)}" for _ in range(count)]

    def writer(self, key: str) -> _FolderWriter:
        with self._write_faults(key):
            return _FolderWriter(self, key, self._open_part(key))

    def put(self, key: str, blocks: Iterable[bytes]) -> None:
        content = own_errors_apart(blocks)
        try:
            with self._write_faults(key):
                part = self._open_part(key)
                with renamed_when_whole(part, self._prefix + key[:4], key[4:], None):
                    write_blocks(part, content)
        except BlocksFailed as failed:
            raise failed.error from None

    def _open_part(self, key: str) -> int:
        directory = self._prefix + self._checked(key)[:4]
        try:
            return open_part(directory, key[4:], 0o600, None)
        except FileNotFoundError:
            self._create_shard(key[:3])
            return open_part(directory, key[4:], 0o600, None)

    @contextmanager
    def _write_faults(self, key: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise self._write_fault(error, key) from error

    def make_durable(self, keys: Sequence[str]) -> None:
        shards: defaultdict[str, set[str]] = defaultdict(set)
        for key in keys:
            shards[self._checked(key)[:3]].add(key[4:])
        try:
            for shard, names in shards.items():
                with opened_directory(self._prefix + shard) as directory:
                    sync_files(sorted(names), directory)
                    sync_directory(directory)
            if not shards.keys() <= self._durable_shards:
                with opened_directory(self._prefix) as directory:
                    sync_directory(directory)
                self._durable_shards |= shards.keys()
        except OSError as error:
            raise self._write_fault(error, keys[0]) from error

    def read(self, key: str, size: int | None = None) -> bytes:
        # The export's hot path: nothing but the system calls, and no check of a key that the index gave us.
        try:
            return read_whole(self._prefix + key, size)
        except FileNotFoundError:
            self._require_marker()
        except OSError as error:
            raise self._read_fault(error, key) from error
        # The store is there. It may have come back only since the first try, so that one alone proves
        # nothing.
        try:
            return read_whole(self._prefix + key, size)
        except OSError as error:
            raise self._read_fault(error, key) from error

    def stream(self, key: str, block_bytes: int) -> Iterator[bytes]:
        try:
            file = self._open_object(key)
        except OSError as error:
            raise self._read_fault(error, key) from error
        try:
            while True:
                try:
                    block = os.read(file, block_bytes)
                except OSError as error:
                    raise self._read_fault(error, key) from error
                if not block:
                    return
                yield block
        finally:
            os.close(file)

    def read_range(self, key: str, offset: int, length: int) -> bytes:
        try:
            file = self._open_object(key)
            try:
                blocks: list[bytes] = []
                while length and (block := os.pread(file, length, offset)):
                    blocks.append(block)
                    offset, length = offset + len(block), length - len(block)
                return blocks[0] if len(blocks) == 1 else b"".join(blocks)
            finally:
                os.close(file)
        except OSError as error:
            raise self._read_fault(error, key) from error

    def _open_object(self, key: str) -> int:
        """A second time where it is missing and the store is there: that may have come back only since the first."""
        path, flags = self._prefix + key, os.O_RDONLY | os.O_CLOEXEC
        try:
            return os.open(path, flags)
        except FileNotFoundError:
            self._require_marker()
            return os.open(path, flags)

    def delete(self, key: str) -> None:
        try:
            os.unlink(self._prefix + self._checked(key, or_part=True))
        except FileNotFoundError:
            self._require_marker()
        except OSError as error:
            raise self._write_fault(error, key) from error

    def entries(self) -> Iterator[StoreEntry]:
        if self._is_unused():
            return
        self._require_marker()
        try:
            shards = sorted(name for name in os.listdir(self._prefix) if _SHARD.fullmatch(name))
            for shard in shards:
                with os.scandir(self._prefix + shard) as found:
                    for entry in found:
                        key = f"{shard}/{entry.name}"
                        if not _KEY_OR_PART.fullmatch(key):
                            continue
                        with suppress(FileNotFoundError):
                            status = entry.stat(follow_symlinks=False)
                            yield StoreEntry(key, status.st_size, status.st_mtime)
        except OSError as error:
            raise _store_away(error) from error

    def free_bytes(self) -> int | None:
        for place in (self._root, *self._root.parents):
            try:
                status = os.statvfs(place)
            except FileNotFoundError as error:
                if not self._may_create:
                    raise _store_away(error) from error
            except OSError as error:
                raise _store_away(error) from error
            else:
                return status.f_bavail * status.f_frsize
        return None

    def _checked(self, key: str, *, or_part: bool = False) -> str:
        if not (_KEY_OR_PART if or_part else _KEY).fullmatch(key):
            raise SourceFault("SourceKeyInvalid", f"{key!a} is not a store key.", FaultKind.INSTANCE)
        return key

    def _create_shard(self, shard: str) -> None:
        """Make a shard's directory, in a store that is known to be there."""
        if not os.path.exists(self._marker):
            if not self._may_create:
                raise _store_away(None)
            self._create()
        self._may_create = False  # from now on a missing marker means that the store went away
        with suppress(FileExistsError):
            os.mkdir(self._prefix + shard, 0o700)

    def _is_unused(self) -> bool:
        try:
            return self._may_create and not os.listdir(self._root)
        except FileNotFoundError:
            return True
        except OSError as error:
            raise _store_away(error) from error

    def _create(self) -> None:
        """Make the root, its parents and the marker, all durable: they are made once."""
        missing = [place for place in (self._root, *self._root.parents) if not place.exists()]
        for place in reversed(missing):
            with suppress(FileExistsError):
                place.mkdir(0o700)
            with opened_directory(str(place.parent)) as directory:
                sync_directory(directory)
        file = os.open(self._marker, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            write_blocks(file, (MARKER_TEXT,))
            os.fsync(file)
        finally:
            os.close(file)
        with opened_directory(self._prefix) as directory:
            sync_directory(directory)

    def _require_marker(self) -> None:
        try:
            os.stat(self._marker)
        except OSError as error:
            raise _store_away(error) from error

    def _read_fault(self, error: OSError, key: str) -> SourceFault:
        if error.errno not in _ABOUT_ONE_OBJECT:
            return _store_away(error)
        self._require_marker()
        if error.errno in {errno.ENOENT, errno.ENOTDIR}:
            return SourceFault("SourceMissing", f"{key} is not in the store.", FaultKind.INSTANCE)
        return SourceFault("SourceUnreadable", f"{key}: {reason_of(error)}", FaultKind.INSTANCE)

    def _write_fault(self, error: OSError, key: str) -> SourceFault | StorageFull:
        if error.errno in _NO_SPACE:
            return StorageFull(f"The store has no space left: {reason_of(error)}")
        if error.errno == errno.ENOENT:
            return self._read_fault(error, key)
        return _store_away(error)


class _FolderWriter:
    """`ports.BlobWriter` on a part file."""

    def __init__(self, store: FolderBlobStore, key: str, part: int) -> None:
        self._store = store
        self._key = key
        self._part = part
        self._stack = ExitStack()
        self._stack.enter_context(renamed_when_whole(part, store._prefix + key[:4], key[4:], None))  # noqa: SLF001

    def write(self, block: bytes) -> None:
        try:
            write_blocks(self._part, (block,))
        except OSError as error:
            self.abandon()
            raise self._store._write_fault(error, self._key) from error  # noqa: SLF001

    def close(self) -> None:
        self._part = -1  # nobody else's descriptor: a later write fails
        with self._store._write_faults(self._key):  # noqa: SLF001
            self._stack.close()

    def abandon(self) -> None:
        self._part = -1
        with suppress(_AbandonedError, OSError), self._stack:
            raise _AbandonedError


class _AbandonedError(Exception):
    """A writer's object is not wanted."""


_SHARD = re.compile(r"[0-9a-f]{3}")
_KEY = re.compile(r"[0-9a-f]{3}/[0-9a-f]{32}")
_KEY_OR_PART = re.compile(r"[0-9a-f]{3}/(?:[0-9a-f]{32}|\.[0-9a-f]{32}\.part)")

# What can only mean this one object. All else (EACCES, EMFILE, ENOMEM, ESTALE, ETIMEDOUT ...) may concern
# every object and must not turn into skips.
_ABOUT_ONE_OBJECT = frozenset(
    {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EIO, errno.EBADMSG, errno.EUCLEAN}
)


def _store_away(error: OSError | None) -> SourceFault:
    if error is None or error.errno in {errno.ENOENT, errno.ENOTDIR}:
        reason = f"its folder has no {MARKER_NAME} file. Is its disk mounted?"
    else:
        reason = reason_of(error)
    return SourceFault("SourceUnavailable", f"The store cannot be used: {reason}", FaultKind.TRANSIENT)
