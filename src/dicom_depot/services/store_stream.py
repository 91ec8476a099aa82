"""A stored object as a seekable file, read by ranges: for looking into objects that are too large to be read whole."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, BinaryIO

from dicom_depot.ports import BlobStore

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

_BUFFER_BYTES = 64 << 10


class _Ranges(io.RawIOBase):
    def __init__(self, store: BlobStore, key: str, size: int) -> None:
        super().__init__()
        self._store = store
        self._key = key
        self._size = size
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = start + offset
        return self._position

    def readinto(self, buffer: WriteableBuffer) -> int:
        view = memoryview(buffer).cast("B")
        wanted = min(len(view), self._size - self._position)
        if wanted <= 0:
            return 0
        content = self._store.read_range(self._key, self._position, wanted)
        view[: len(content)] = content
        self._position += len(content)
        return len(content)


def open_stored(store: BlobStore, key: str, size: int) -> BinaryIO:
    """The object, of `size` bytes, as a file. Reading raises SourceFault."""
    return io.BufferedReader(_Ranges(store, key, size), _BUFFER_BYTES)
