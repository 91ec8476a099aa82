"""A file read forward through a window: its size costs no memory. A deflated data set is inflated on the way."""

from __future__ import annotations

import io
from typing import BinaryIO

from dicom_depot.codec.inflate import Inflater

INFLATED_BYTES_MAX = 256 << 20
"""How much of a deflated data set is looked at."""
WINDOW_BYTES = 64 << 10
SKIP_WINDOW_BYTES = 4 << 10
"""For a look at what stands before much that is skipped."""


class StopWalk(Exception):
    """The rest of the file is not understood, or not there, or too much."""


class Window:
    """A part of a file in memory: `buffer`, which begins at the position `base` of the file. The file ends at `end`.

    A place is where a position lies in the buffer. Of a source that is bytes, the window is all.
    """

    def __init__(self, source: bytes | BinaryIO, size: int) -> None:
        self._stream: BinaryIO | None = None if isinstance(source, bytes) else source
        self._inflating: _Inflating | None = None
        self.buffer = source if isinstance(source, bytes) else b""
        self.base = 0
        self.end = size

    @property
    def deflated_at(self) -> int | None:
        """Where the deflated data set begins; None where nothing is deflated."""
        return self._inflating.start if self._inflating is not None else None

    def inflate(self, start: int) -> None:
        """Go on with what the file's bytes from `start` on inflate to; positions count from there."""
        stream = self._stream if self._stream is not None else io.BytesIO(self.buffer)
        self._inflating = _Inflating(stream, start)
        self.buffer, self.base, self.end = b"", 0, INFLATED_BYTES_MAX

    def at(self, position: int, length: int, window: int = WINDOW_BYTES) -> int:
        """The place in the buffer of `length` bytes at `position`. Raises StopWalk when it has fewer."""
        place = position - self.base
        if place >= 0 and place + length <= len(self.buffer):
            return place
        if position + length > self.end:
            raise StopWalk
        wanted = max(length, window)
        if self._inflating is not None:
            self.buffer = self._inflating.read(position, wanted)
        elif self._stream is not None:
            self._stream.seek(position)
            self.buffer = self._stream.read(wanted)
        else:
            raise StopWalk
        self.base = position
        if len(self.buffer) < length:
            raise StopWalk
        return 0

    def has(self, position: int, length: int) -> bool:
        """Whether the file has so many bytes there."""
        try:
            self.at(position, length)
        except StopWalk:
            return False
        return True

    def fill(self, position: int) -> int:
        """Look at what is at `position`, however little; returns its place in the buffer."""
        if self._inflating is not None:
            self.buffer, self.base = self._inflating.read(position, WINDOW_BYTES), position
        elif self._stream is not None:
            self._stream.seek(position)
            self.buffer, self.base = self._stream.read(WINDOW_BYTES), position
        return position - self.base


class _Inflating:
    """A deflated data set, read forward: what lies before the place asked for is dropped."""

    def __init__(self, stream: BinaryIO, start: int) -> None:
        self.start = start
        stream.seek(start)
        self._inflater = Inflater(stream.read)
        self._held = b""
        self._held_at = 0

    def read(self, position: int, length: int) -> bytes:
        """Up to `length` bytes at `position`, which must not lie before what was read last."""
        if position < self._held_at:
            raise StopWalk
        while self._held_at + len(self._held) < position + length:
            inflated = self._inflater.next(4 * WINDOW_BYTES)
            if not inflated:
                break
            surplus = position - self._held_at
            if surplus >= len(self._held):
                self._held_at += len(self._held)
                self._held = inflated
            else:
                self._held = self._held[surplus:] + inflated
                self._held_at = position
        surplus = position - self._held_at
        return self._held[surplus : surplus + length] if surplus >= 0 else b""
