"""A local folder as an export's destination. How a file is written: `folder_files`."""

from __future__ import annotations

import errno
import os
import stat
import unicodedata
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Lock

from dicom_depot.adapters.folder_files import (
    COPY_BLOCK_BYTES,
    BlocksFailed,
    open_part,
    own_errors_apart,
    part_name,
    reason_of,
    renamed_when_whole,
    sync_directory,
    sync_files,
    write_blocks,
)
from dicom_depot.domain.errors import (
    DestinationFault,
    DestinationRefused,
    FaultKind,
    Obstacle,
)
from dicom_depot.ports import LogOutdated

FOLDER_LENGTH_MAX = 1024
COMPONENT_BYTES_MAX = 255

_NO_UNNAMED_FILES = frozenset({errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOSYS})


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
            self._write(directory, name, own_errors_apart(blocks))
        except OSError as error:
            raise _destination_fault(error, self._shown(key)) from error
        except BlocksFailed as failed:
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
                    sync_files(sorted(wanted), directory_fd)
                    sync_directory(directory_fd)
            for at in _ancestors(names):
                with self._opened(at, create=False) as directory_fd:
                    sync_directory(directory_fd)
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
                sync_directory(directory_fd)
            for ancestor in _ancestors([directory]):
                with self._opened(ancestor, create=False) as directory_fd:
                    sync_directory(directory_fd)
        except FileExistsError as error:
            raise DestinationFault(
                "DestinationLogExists", f"{self._shown(key)} exists already.", FaultKind.PERMANENT
            ) from error
        except OSError as error:
            raise _destination_fault(error, self._shown(key)) from error
        return etag

    def write_log(self, key: str, blocks: Iterable[bytes], *, if_match: str | None) -> str | None:
        directory, name = self._place(key)
        content = own_errors_apart(blocks)
        try:
            with self._opened(directory, create=True) as directory_fd:
                part = open_part("", name, 0o640, directory_fd)
                # The part's lock is held from the comparison until after the rename: of two processes that
                # hold the same ETag only one can replace the log.
                with renamed_when_whole(part, "", name, directory_fd):
                    if if_match is not None and if_match != _etag_of(name, directory_fd):
                        raise LogOutdated(f"{self._shown(key)} was written by somebody else.")
                    write_blocks(part, content)
                    os.fsync(part)
                    etag = _etag(os.fstat(part))
                sync_directory(directory_fd)
        except OSError as error:
            raise _destination_fault(error, self._shown(key)) from error
        except BlocksFailed as failed:
            raise failed.error from None
        return etag

    def remove_log(self, key: str) -> bool:
        is_removed = False
        with suppress(OSError, DestinationFault):
            directory, name = self._place(key)
            with self._opened(directory, create=False) as directory_fd:
                for leftover in (part_name(name), name):
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
        part = open_part("", name, 0o640, directory_fd)
        with renamed_when_whole(part, "", name, directory_fd):
            write_blocks(part, blocks)

    def _link(self, unnamed: int, name: str, directory_fd: int, blocks: Iterable[bytes]) -> None:
        write_blocks(unnamed, blocks)
        try:
            os.link(f"/proc/self/fd/{unnamed}", name, dst_dir_fd=directory_fd, follow_symlinks=True)
        except OSError as error:
            # Most likely the name is taken. Whatever it is, a renamed part works or tells the true reason.
            part = open_part("", name, 0o640, directory_fd)
            with renamed_when_whole(part, "", name, directory_fd):
                os.lseek(unnamed, 0, os.SEEK_SET)
                write_blocks(part, iter(lambda: os.read(unnamed, COPY_BLOCK_BYTES), b""))
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
                f"The root of {self._shown('')} is gone: {reason_of(error)}",
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
    return DestinationFault(code, f"{shown}: {reason_of(error)}", kind, obstacle=obstacle.get(code, Obstacle.WRITE))


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
