"""Where an import finds its files: folders, single files, members of zip archives. Finds and opens; reads no DICOM."""

from __future__ import annotations

import os
import stat
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from dicom_depot.domain.errors import InvalidRequest

MEMBER_SEPARATOR = "!"
"""Stands between an archive's path and its member's name: `scans.zip!a/1.dcm`."""

_ZIP_SIGNATURES = (b"PK\x03\x04", b"PK\x05\x06")
_COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
_ENCRYPTED_FLAG = 0x1


@dataclass(frozen=True, slots=True)
class Candidate:
    """A file, or a member of an archive, that an import looks at.

    `size` is in bytes, as it was when it was found. `member` is the place in the archive's directory (names repeat in
    real archives). `problem` is set for what is known to be unreadable already.
    """

    path: str
    size: int
    archive: str | None = None
    member: int | None = None
    problem: str | None = None


def find_files(paths: Iterable[str | os.PathLike[str]]) -> Iterator[Candidate]:
    """Every file below `paths`, which are taken in the order given; each folder in the order of its paths as text.

    Nothing is passed over in silence: what cannot be read or is not followed (links to folders, devices) comes as a
    candidate with a problem. A path that is itself a link is followed. Zip archives are known by their content; their
    members come in the order of their names.

    Raises InvalidRequest, before anything is read, when one of `paths` does not exist.
    """
    roots = [os.fspath(path) for path in paths]
    for root in roots:
        try:
            Path(root).stat()
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not a path"
            raise InvalidRequest(f"{root!r} cannot be imported: {reason}.", target=root) from None
    return _walk(roots)


def reason_of(error: BaseException) -> str:
    """Why something cannot be read, without the path, which stands beside it."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _walk(roots: list[str]) -> Iterator[Candidate]:
    for root in roots:
        if not Path(root).is_dir():
            yield from _examine(root)
            continue
        pending = [_listing(root)]
        while pending:
            entry = next(pending[-1], None)
            if entry is None:
                pending.pop()
            elif isinstance(entry, Candidate):
                yield entry
            elif _is_folder(entry):
                pending.append(_listing(entry.path))
            else:
                yield from _examine(entry.path)


def _listing(folder: str) -> Iterator[os.DirEntry[str] | Candidate]:
    """A folder's entries in the order of their paths as text: `a.dcm` comes before `a/1.dcm`."""
    try:
        with os.scandir(folder) as entries:
            listed = list(entries)
    except OSError as error:
        return iter([Candidate(folder, 0, problem=f"the folder cannot be read: {reason_of(error)}")])
    listed.sort(key=lambda entry: entry.name + "/" if _is_folder(entry) else entry.name)
    return iter(listed)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir(follow_symlinks=False)
    except OSError:
        return False  # Looking at it as a file finds and reports the reason.


def _examine(path: str) -> Iterator[Candidate]:
    """The file at `path`, or the members when it is a zip archive."""
    try:
        status = Path(path).stat()
        if stat.S_ISDIR(status.st_mode):
            yield Candidate(path, 0, problem="a link to a folder is not followed")
            return
        if not stat.S_ISREG(status.st_mode):
            yield Candidate(path, 0, problem="not a regular file")
            return
        with Path(path).open("rb", buffering=0) as file:
            head = file.read(132)
        is_archive = head[:4] in _ZIP_SIGNATURES and head[128:] != b"DICM" and zipfile.is_zipfile(path)
    except OSError as error:
        yield Candidate(path, 0, problem=reason_of(error))
        return
    if is_archive:
        yield from _members(path)
    else:
        yield Candidate(path, status.st_size)


def _members(path: str) -> Iterator[Candidate]:
    try:
        with zipfile.ZipFile(path) as archive:
            directory = archive.infolist()
    except Exception as error:
        yield Candidate(path, 0, problem=f"the archive cannot be read: {reason_of(error)}")
        return
    for place in sorted(range(len(directory)), key=lambda place: directory[place].filename):
        info = directory[place]
        if info.is_dir():
            continue
        problem = None
        if info.flag_bits & _ENCRYPTED_FLAG:
            problem = "the archive member is encrypted"
        elif info.compress_type not in _COMPRESSIONS:
            problem = f"the archive member is compressed by method {info.compress_type}, which is not supported"
        shown = f"{path}{MEMBER_SEPARATOR}{info.filename}"
        yield Candidate(shown, info.file_size, archive=path, member=place, problem=problem)


class UnreadableError(Exception):
    """A candidate's bytes cannot be had; the message is the reason."""


class Opener:
    """Opens candidates, and keeps the last archive open: reading its directory again for each member is slow."""

    def __init__(self) -> None:
        self._path: str | None = None
        self._archive: zipfile.ZipFile | None = None
        self._directory: list[zipfile.ZipInfo] = []

    def open(self, candidate: Candidate) -> BinaryIO:
        """The candidate's bytes as a seekable stream. Raises UnreadableError."""
        try:
            if candidate.archive is None or candidate.member is None:
                return Path(candidate.path).open("rb")
            archive = self._archive_at(candidate.archive)
            return cast("BinaryIO", archive.open(self._directory[candidate.member]))
        except Exception as error:
            raise UnreadableError(reason_of(error)) from None

    def _archive_at(self, path: str) -> zipfile.ZipFile:
        if self._archive is None or self._path != path:
            self.close()
            self._archive = zipfile.ZipFile(path)
            self._path, self._directory = path, self._archive.infolist()
        return self._archive

    def close(self) -> None:
        if self._archive is not None:
            self._archive.close()
        self._archive = self._path = None
        self._directory = []


def read_blocks(stream: BinaryIO, block_bytes: int) -> Iterator[bytes]:
    """The rest of the stream in blocks of at most `block_bytes`. Raises UnreadableError."""
    while True:
        try:
            block = stream.read(block_bytes)
        except Exception as error:
            raise UnreadableError(reason_of(error)) from None
        if not block:
            return
        yield block
