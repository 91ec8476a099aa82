"""Local folders (Linux): the service's own store, and a folder as an export's destination.

How a file is written. Nothing under its final name is ever partial, and a process killed at any moment leaves
nothing that a second run of the same work does not remove:

* A destination writes into an unnamed file (O_TMPFILE) and links it in when it is whole. The kernel frees an
  unnamed file when its process dies, so a first attempt leaves no trace however it ends.
* When the name is taken, or the file system has no O_TMPFILE (NFS, some FUSE), and always in the store, the
  content goes to `.<name>.part` beside it and is renamed over the name. That part name is fixed, so whoever
  writes the key again finds what a killed writer left and removes it. A living writer holds a lock (flock) on
  its part from before its first byte until after the rename; the kernel drops the lock when the process dies.

Writing makes nothing durable: `make_durable` and `flush` do, for many objects together.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import stat
import time
import unicodedata
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Lock

from dicom_depot.domain.errors import (
    DestinationFault,
    DestinationRefused,
    FaultKind,
    Obstacle,
    SourceFault,
    StorageFull,
)
from dicom_depot.ports import LogOutdated, StoreEntry

MARKER_NAME = ".dicom-depot-store"
MARKER_TEXT = b"A DICOM Depot store. Without this file the service takes the disk for not mounted.\n"

FOLDER_LENGTH_MAX = 1024
COMPONENT_BYTES_MAX = 255

_PART_WAIT_SECONDS = 2.0
_SYNC_BATCH_FILES = 64
_COPY_BLOCK_BYTES = 1 << 20

_NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT})
_NO_UNNAMED_FILES = frozenset({errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOSYS})


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

    def put(self, key: str, blocks: Iterable[bytes]) -> None:
        directory = self._prefix + self._checked(key)[:4]
        content = _own_errors_apart(blocks)
        try:
            try:
                part = _open_part(directory, key[4:], 0o600, None)
            except FileNotFoundError:
                self._create_shard(key[:3])
                part = _open_part(directory, key[4:], 0o600, None)
            with _renamed_when_whole(part, directory, key[4:], None):
                _write_blocks(part, content)
        except OSError as error:
            raise self._write_fault(error, key) from error
        except _BlocksFailed as failed:
            raise failed.error from None

    def make_durable(self, keys: Sequence[str]) -> None:
        shards: defaultdict[str, set[str]] = defaultdict(set)
        for key in keys:
            shards[self._checked(key)[:3]].add(key[4:])
        try:
            for shard, names in shards.items():
                with _opened_directory(self._prefix + shard) as directory:
                    _sync_files(sorted(names), directory)
                    _sync_directory(directory)
            if not shards.keys() <= self._durable_shards:
                with _opened_directory(self._prefix) as directory:
                    _sync_directory(directory)
                self._durable_shards |= shards.keys()
        except OSError as error:
            raise self._write_fault(error, keys[0]) from error

    def read(self, key: str, size: int | None = None) -> bytes:
        # The export's hot path: nothing but the system calls, and no check of a key that the index gave us.
        try:
            return _read_whole(self._prefix + key, size)
        except FileNotFoundError:
            self._require_marker()
        except OSError as error:
            raise self._read_fault(error, key) from error
        # The store is there. It may have come back only since the first try, so that one alone proves
        # nothing.
        try:
            return _read_whole(self._prefix + key, size)
        except OSError as error:
            raise self._read_fault(error, key) from error

    def stream(self, key: str, block_bytes: int) -> Iterator[bytes]:
        path = self._prefix + key
        flags = os.O_RDONLY | os.O_CLOEXEC
        try:
            try:
                file = os.open(path, flags)
            except FileNotFoundError:
                self._require_marker()
                file = os.open(path, flags)
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
            with _opened_directory(str(place.parent)) as directory:
                _sync_directory(directory)
        file = os.open(self._marker, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            _write_blocks(file, (MARKER_TEXT,))
            os.fsync(file)
        finally:
            os.close(file)
        with _opened_directory(self._prefix) as directory:
            _sync_directory(directory)

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
        return SourceFault("SourceUnreadable", f"{key}: {_reason(error)}", FaultKind.INSTANCE)

    def _write_fault(self, error: OSError, key: str) -> SourceFault | StorageFull:
        if error.errno in _NO_SPACE:
            return StorageFull(f"The store has no space left: {_reason(error)}")
        if error.errno == errno.ENOENT:
            return self._read_fault(error, key)
        return _store_away(error)


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
        reason = _reason(error)
    return SourceFault("SourceUnavailable", f"The store cannot be used: {reason}", FaultKind.TRANSIENT)


class FolderDestination:
    """Writes below `root`/`folder`. Files get mode 0640 and directories 0750, less the umask.

    `root` is the operator's: it must exist and may itself be a symbolic link. Everything below it, the
    caller's folder included, is opened one component at a time without following links, so that nothing lands
    outside. Raises DestinationRefused when `folder` is malformed; the disk is not touched before the first
    write.
    """

    def __init__(self, root: Path, folder: str) -> None:
        self._root = str(root)
        self._folder = check_folder(folder)
        self._directories = _DirectoryCache(self._walk)
        self._has_unnamed_files = os.path.isdir("/proc/self/fd")

    def put(self, key: str, content: bytes) -> None:
        directory, name = self._place(key)
        try:
            try:
                self._write(directory, name, (content,))
            except OSError as error:
                if error.errno not in _DIRECTORY_GONE:
                    raise
                # Somebody may have removed the directory that we hold open. Look again, and make it anew.
                self._directories.clear()
                self._write(directory, name, (content,))
        except OSError as error:
            raise _destination_fault(error, self._shown(key)) from error

    def put_stream(self, key: str, blocks: Iterator[bytes], size: int) -> None:
        directory, name = self._place(key)
        # Blocks can be read only once, so a directory that was removed meanwhile is noticed before, not
        # after.
        self._directories.clear()
        try:
            self._write(directory, name, _own_errors_apart(blocks))
        except OSError as error:
            raise _destination_fault(error, self._shown(key)) from error
        except _BlocksFailed as failed:
            raise failed.error from None

    def flush(self, keys: Iterable[str]) -> None:
        names: defaultdict[str, set[str]] = defaultdict(set)
        for key in keys:
            directory, name = self._place(key)
            names[directory].add(name)
        # Every path is walked again from the root: what was moved away under an open directory is found out
        # here, before anybody counts it as exported.
        self._directories.clear()
        at = ""
        try:
            for at, wanted in names.items():
                with self._opened(at, create=False) as directory_fd:
                    _sync_files(sorted(wanted), directory_fd)
                    _sync_directory(directory_fd)
            for at in _ancestors(names):
                with self._opened(at, create=False) as directory_fd:
                    _sync_directory(directory_fd)
        except OSError as error:
            raise _destination_fault(error, ascii(at or ".")) from error

    def create_log(self, key: str) -> str | None:
        directory, name = self._place(key)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            with self._opened(directory, create=True) as directory_fd:
                file = os.open(name, flags, 0o640, dir_fd=directory_fd)
                try:
                    os.fsync(file)
                    etag = _etag(os.fstat(file))
                finally:
                    os.close(file)
                _sync_directory(directory_fd)
            for ancestor in _ancestors([directory]):
                with self._opened(ancestor, create=False) as directory_fd:
                    _sync_directory(directory_fd)
        except FileExistsError as error:
            raise DestinationFault(
                "DestinationLogExists", f"{self._shown(key)} exists already.", FaultKind.PERMANENT
            ) from error
        except OSError as error:
            raise _destination_fault(error, self._shown(key)) from error
        return etag

    def write_log(self, key: str, blocks: Iterable[bytes], *, if_match: str | None) -> str | None:
        directory, name = self._place(key)
        content = _own_errors_apart(blocks)
        try:
            with self._opened(directory, create=True) as directory_fd:
                part = _open_part("", name, 0o640, directory_fd)
                # The part's lock is held from the comparison until after the rename: of two processes that
                # hold the same ETag only one can replace the log.
                with _renamed_when_whole(part, "", name, directory_fd):
                    if if_match is not None and if_match != _etag_of(name, directory_fd):
                        raise LogOutdated(f"{self._shown(key)} was written by somebody else.")
                    _write_blocks(part, content)
                    os.fsync(part)
                    etag = _etag(os.fstat(part))
                _sync_directory(directory_fd)
        except OSError as error:
            raise _destination_fault(error, self._shown(key)) from error
        except _BlocksFailed as failed:
            raise failed.error from None
        return etag

    def remove_log(self, key: str) -> bool:
        is_removed = False
        with suppress(OSError, DestinationFault):
            directory, name = self._place(key)
            with self._opened(directory, create=False) as directory_fd:
                for leftover in (_part_name(name), name):
                    with suppress(FileNotFoundError):
                        os.unlink(leftover, dir_fd=directory_fd)
            is_removed = True
            if directory != self._folder:
                parent, _, folder_name = directory.rpartition("/")
                with self._opened(parent, create=False) as parent_fd:
                    os.rmdir(folder_name, dir_fd=parent_fd)
        return is_removed

    def close(self) -> None:
        self._directories.clear()

    def _write(self, directory: str, name: str, blocks: Iterable[bytes]) -> None:
        held = self._directories.get(directory)
        try:
            self._write_in(held.fd, name, blocks)
        finally:
            del held  # or an error that is kept would, through its traceback, keep the directory open

    def _write_in(self, directory_fd: int, name: str, blocks: Iterable[bytes]) -> None:
        if self._has_unnamed_files:
            flags = os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC
            try:
                unnamed = os.open(".", flags, 0o640, dir_fd=directory_fd)
            except OSError as error:
                if error.errno not in _NO_UNNAMED_FILES:
                    raise
                self._has_unnamed_files = False
            else:
                try:
                    self._link(unnamed, name, directory_fd, blocks)
                finally:
                    os.close(unnamed)
                return
        part = _open_part("", name, 0o640, directory_fd)
        with _renamed_when_whole(part, "", name, directory_fd):
            _write_blocks(part, blocks)

    def _link(self, unnamed: int, name: str, directory_fd: int, blocks: Iterable[bytes]) -> None:
        _write_blocks(unnamed, blocks)
        try:
            os.link(f"/proc/self/fd/{unnamed}", name, dst_dir_fd=directory_fd, follow_symlinks=True)
        except OSError as error:
            # Most likely the name is taken. Whatever it is, a renamed part works or tells the true reason.
            part = _open_part("", name, 0o640, directory_fd)
            with _renamed_when_whole(part, "", name, directory_fd):
                os.lseek(unnamed, 0, os.SEEK_SET)
                _write_blocks(part, iter(lambda: os.read(unnamed, _COPY_BLOCK_BYTES), b""))
            if error.errno != errno.EEXIST:
                self._has_unnamed_files = False

    def _place(self, key: str) -> tuple[str, str]:
        """The key's directory below the root, and its name in there. Directories are checked in `_walk`."""
        directory, slash, name = key.rpartition("/")
        if name in _FORBIDDEN_NAMES or "\0" in name or (slash and not directory):
            raise _rejected(self._shown(key))
        if not directory:
            return self._folder, name
        return (f"{self._folder}/{directory}" if self._folder else directory), name

    @contextmanager
    def _opened(self, directory: str, *, create: bool) -> Iterator[int]:
        directory_fd = self._walk(directory, create=create)
        try:
            yield directory_fd
        finally:
            os.close(directory_fd)

    def _walk(self, directory: str, *, create: bool = True) -> int:
        """Open a directory (relative to the root) from the root down, following no link."""
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            at = os.open(self._root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise DestinationFault(
                "DestinationMissing",
                f"The root of {self._shown('')} is gone: {_reason(error)}",
                FaultKind.PERMANENT,
            ) from error
        for component in directory.split("/") if directory else ():
            try:
                if component in _FORBIDDEN_NAMES or "\0" in component:
                    raise _rejected(ascii(directory))
                try:
                    child = os.open(component, flags, dir_fd=at)
                except FileNotFoundError:
                    if not create:
                        raise
                    with suppress(FileExistsError):
                        os.mkdir(component, 0o750, dir_fd=at)
                    child = os.open(component, flags, dir_fd=at)
            finally:
                os.close(at)
            at = child
        return at

    def _shown(self, key: str) -> str:
        return ascii("/".join(filter(None, (self._folder, key))) or ".")


_FORBIDDEN_NAMES = frozenset({"", ".", ".."})

# What making a file in a removed directory gives; EPERM is ext4's answer to O_TMPFILE there.
_DIRECTORY_GONE = frozenset({errno.ENOENT, errno.ESTALE, errno.EPERM})

_DESTINATION_FAULTS = {
    # An operator can make room; the export goes on when that is done in time.
    errno.ENOSPC: ("DestinationFull", FaultKind.TRANSIENT),
    errno.EDQUOT: ("DestinationFull", FaultKind.TRANSIENT),
    # Written, and then removed or moved by somebody: the chunk's next run writes it again.
    errno.ENOENT: ("DestinationChanged", FaultKind.TRANSIENT),
    errno.EACCES: ("DestinationForbidden", FaultKind.PERMANENT),
    errno.EPERM: ("DestinationForbidden", FaultKind.PERMANENT),
    errno.EROFS: ("DestinationForbidden", FaultKind.PERMANENT),
    # A file or a symbolic link where a directory must be.
    errno.ENOTDIR: ("DestinationNotFolder", FaultKind.PERMANENT),
    errno.ELOOP: ("DestinationNotFolder", FaultKind.PERMANENT),
    errno.EOPNOTSUPP: ("DestinationUnsupported", FaultKind.PERMANENT),
    errno.ENOSYS: ("DestinationUnsupported", FaultKind.PERMANENT),
    errno.ENAMETOOLONG: ("DestinationRejected", FaultKind.INSTANCE),
    errno.EISDIR: ("DestinationRejected", FaultKind.INSTANCE),
    errno.EFBIG: ("DestinationRejected", FaultKind.INSTANCE),
    errno.EILSEQ: ("DestinationRejected", FaultKind.INSTANCE),
    errno.EINVAL: ("DestinationRejected", FaultKind.INSTANCE),
}


def _destination_fault(error: OSError, shown: str) -> DestinationFault:
    code, kind = _DESTINATION_FAULTS.get(error.errno or 0, ("DestinationUnavailable", FaultKind.TRANSIENT))
    obstacle = {"DestinationUnavailable": Obstacle.REACH, "DestinationNotFolder": Obstacle.CONTAINER}
    return DestinationFault(code, f"{shown}: {_reason(error)}", kind, obstacle=obstacle.get(code, Obstacle.WRITE))


def _rejected(shown: str) -> DestinationFault:
    return DestinationFault("DestinationRejected", f"{shown} is not a usable path.", FaultKind.INSTANCE)


def check_folder(text: str) -> str:
    """The caller's folder below a root, without repeated or trailing slashes and `.`; empty is the root.

    At most 1,024 characters in all and 255 bytes a component. Raises DestinationRefused.
    """
    components = [component for component in text.split("/") if component not in {"", "."}]
    if len(text) > FOLDER_LENGTH_MAX:
        reason = f"has {len(text)} characters; {FOLDER_LENGTH_MAX} are allowed"
    elif text.startswith("/"):
        reason = "is absolute; give a path below the configured root, such as 'research/2024'"
    elif ".." in components:
        reason = "contains '..'; give a path below the configured root"
    elif "\\" in text:
        reason = "contains a backslash; components are separated by '/'"
    elif any(unicodedata.category(character) in {"Cc", "Cs", "Zl", "Zp"} for character in text):
        reason = "contains a control character"
    elif any(len(component.encode()) > COMPONENT_BYTES_MAX for component in components):
        reason = f"has a component of more than {COMPONENT_BYTES_MAX} bytes"
    else:
        return "/".join(components)
    raise DestinationRefused(f"The folder {reason}.", target="destination.settings.folder")


class _Directory:
    """An open directory. Closed when its last reference goes, so a thread that uses it never loses it."""

    __slots__ = ("fd",)

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        close(self.fd)


class _DirectoryCache:
    """The directories used last, kept open: an instance then costs no walk from the root."""

    _OPEN_MAX = 64

    def __init__(self, walk: Callable[[str], int]) -> None:
        self._walk = walk
        self._lock = Lock()
        self._open: OrderedDict[str, _Directory] = OrderedDict()

    def get(self, directory: str) -> _Directory:
        with self._lock:
            held = self._open.get(directory)
            if held is not None:
                self._open.move_to_end(directory)
                return held
        held = _Directory(self._walk(directory))
        with self._lock:
            self._open[directory] = held
            if len(self._open) > self._OPEN_MAX:
                self._open.popitem(last=False)
        return held

    def clear(self) -> None:
        with self._lock:
            self._open.clear()


class _BlocksFailed(Exception):
    """The caller's blocks raised an OSError, which must not be taken for one of ours."""

    def __init__(self, error: OSError) -> None:
        super().__init__()
        self.error = error


def _own_errors_apart(blocks: Iterable[bytes]) -> Iterator[bytes]:
    try:
        yield from blocks
    except OSError as error:
        raise _BlocksFailed(error) from error


def _write_blocks(file: int, blocks: Iterable[bytes]) -> None:
    for block in blocks:
        written = os.write(file, block)
        if written < len(block):
            rest = memoryview(block)[written:]
            while rest:
                rest = rest[os.write(file, rest) :]


def _read_whole(path: str, size: int | None) -> bytes:
    # A caller that knows the size spares the fstat. Every system call lets another thread have the interpreter and
    # then waits to get it back: with many threads that, not the call, is what a small file costs.
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if size is None:
            size = os.fstat(file).st_size
        content = os.read(file, size + 1)  # one more than there is: a full answer then also proves the end
        if len(content) == size:
            return content
        parts = [content]
        while part := os.read(file, _COPY_BLOCK_BYTES):
            parts.append(part)
        return b"".join(parts)
    finally:
        os.close(file)


def _part_name(name: str) -> str:
    return f".{name}.part"


def _open_part(prefix: str, name: str, mode: int, directory_fd: int | None) -> int:
    """Create and lock the part for `name`, after removing one whose writer is dead.

    `prefix` is put before the name; with `directory_fd` the path is relative to it. A part that exists is
    never written to: it could be a hard link to something else. A living writer's part is waited for; EBUSY
    after 2 s.
    """
    path = prefix + _part_name(name)
    flags = os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC
    give_up_at = time.monotonic() + _PART_WAIT_SECONDS
    while time.monotonic() < give_up_at:
        is_ours = True
        try:
            part = os.open(path, flags | os.O_CREAT | os.O_EXCL, mode, dir_fd=directory_fd)
        except FileExistsError:
            is_ours = False
            try:
                part = os.open(path, flags | os.O_NONBLOCK, dir_fd=directory_fd)
            except FileNotFoundError:
                continue
        is_kept = False
        try:
            fcntl.flock(part, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Between opening and locking, another writer may have renamed or removed what we opened.
            if os.path.samestat(os.fstat(part), os.stat(path, dir_fd=directory_fd, follow_symlinks=False)):
                if is_ours:
                    is_kept = True
                    return part
                os.unlink(path, dir_fd=directory_fd)
        except BlockingIOError:
            time.sleep(0.005)
        except FileNotFoundError:
            pass
        finally:
            if not is_kept:
                os.close(part)
    raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))


@contextmanager
def _renamed_when_whole(part: int, prefix: str, name: str, directory_fd: int | None) -> Iterator[None]:
    """Rename the locked part over `name` when the body ends, or remove it when that raises; then close it."""
    path = prefix + _part_name(name)
    try:
        try:
            yield
            os.rename(path, prefix + name, src_dir_fd=directory_fd, dst_dir_fd=directory_fd)
        except BaseException:
            with suppress(OSError):
                os.unlink(path, dir_fd=directory_fd)
            raise
    finally:
        os.close(part)


@contextmanager
def _opened_directory(path: str) -> Iterator[int]:
    directory_fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield directory_fd
    finally:
        os.close(directory_fd)


def _sync_files(names: Sequence[str], directory_fd: int) -> None:
    """Sync files, a batch at a time: the disk works on all of a batch before the first one is waited for."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    for start in range(0, len(names), _SYNC_BATCH_FILES):
        files: list[int] = []
        try:
            for name in names[start : start + _SYNC_BATCH_FILES]:
                file = os.open(name, flags, dir_fd=directory_fd)
                files.append(file)
                with suppress(OSError):  # advice only; on Linux it starts writing dirty pages, without waiting
                    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            for file in files:
                os.fsync(file)
        finally:
            for file in files:
                os.close(file)


def _sync_directory(directory_fd: int) -> None:
    try:
        os.fsync(directory_fd)
    except OSError as error:
        if error.errno != errno.EINVAL:  # EINVAL: this file system has no sync of directories and needs none
            raise


def _ancestors(directories: Iterable[str]) -> list[str]:
    """Every directory above `directories` (themselves left out), down from the root, which is ''."""
    above: set[str] = set()
    for directory in directories:
        at = directory
        while at:
            at = at.rpartition("/")[0]
            above.add(at)
    return sorted(above)


def _etag(status: os.stat_result) -> str:
    return f"{status.st_ino}-{status.st_mtime_ns}-{status.st_size}"


def _etag_of(name: str, directory_fd: int) -> str | None:
    try:
        status = os.stat(name, dir_fd=directory_fd, follow_symlinks=False)
    except FileNotFoundError:
        return None
    return _etag(status) if stat.S_ISREG(status.st_mode) else None


def _reason(error: OSError) -> str:
    """The system's words for an error, without the path that `str(error)` would show."""
    return os.strerror(error.errno) + "." if error.errno else "unknown error."
