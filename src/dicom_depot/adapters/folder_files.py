"""How a file is written into a local folder (Linux): by the store and by folder destinations alike.

Nothing under its final name is ever partial, and a process killed at any moment leaves
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
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress

COPY_BLOCK_BYTES = 1 << 20
_PART_WAIT_SECONDS = 2.0
_SYNC_BATCH_FILES = 64


class BlocksFailed(Exception):
    """The caller's blocks raised an OSError, which must not be taken for one of ours."""

    def __init__(self, error: OSError) -> None:
        super().__init__()
        self.error = error


def own_errors_apart(blocks: Iterable[bytes]) -> Iterator[bytes]:
    try:
        yield from blocks
    except OSError as error:
        raise BlocksFailed(error) from error


def write_blocks(file: int, blocks: Iterable[bytes]) -> None:
    for block in blocks:
        written = os.write(file, block)
        if written < len(block):
            rest = memoryview(block)[written:]
            while rest:
                rest = rest[os.write(file, rest) :]


def read_whole(path: str, size: int | None) -> bytes:
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
        while part := os.read(file, COPY_BLOCK_BYTES):
            parts.append(part)
        return b"".join(parts)
    finally:
        os.close(file)


def part_name(name: str) -> str:
    return f".{name}.part"


def open_part(prefix: str, name: str, mode: int, directory_fd: int | None) -> int:
    """Create and lock the part for `name`, after removing one whose writer is dead.

    `prefix` is put before the name; with `directory_fd` the path is relative to it. A part that exists is
    never written to: it could be a hard link to something else. A living writer's part is waited for; EBUSY
    after 2 s.
    """
    path = prefix + part_name(name)
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
def renamed_when_whole(part: int, prefix: str, name: str, directory_fd: int | None) -> Iterator[None]:
    """Rename the locked part over `name` when the body ends, or remove it when that raises; then close it."""
    path = prefix + part_name(name)
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
def opened_directory(path: str) -> Iterator[int]:
    directory_fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield directory_fd
    finally:
        os.close(directory_fd)


def sync_files(names: Sequence[str], directory_fd: int) -> None:
    """Sync files, a batch at a time: the disk works on all of a batch before the first one is waited for."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    for start in range(0, len(names), _SYNC_BATCH_FILES):
        files: list[int] = []
        try:
            for name in names[start : start + _SYNC_BATCH_FILES]:
                file = os.open(name, flags, dir_fd=directory_fd)
                files.append(file)
                if len(names) > 1:
                    with suppress(OSError):  # advice only; on Linux it starts writing dirty pages, without waiting
                        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            for file in files:
                os.fsync(file)
        finally:
            for file in files:
                os.close(file)


def sync_directory(directory_fd: int) -> None:
    try:
        os.fsync(directory_fd)
    except OSError as error:
        if error.errno != errno.EINVAL:  # EINVAL: this file system has no sync of directories and needs none
            raise


def reason_of(error: OSError) -> str:
    """The system's words for an error, without the path that `str(error)` would show."""
    return os.strerror(error.errno) + "." if error.errno else "unknown error."
