"""Inflating deflated data sets (PS3.5 section A.5) piece by piece, never more at once than is asked for."""

from __future__ import annotations

import zlib
from collections.abc import Callable

_READ_BYTES = 64 << 10


class Inflater:
    """What the bytes that `read` gives inflate to. Raises zlib.error where they are damaged."""

    def __init__(self, read: Callable[[int], bytes]) -> None:
        self._read = read
        self._inflater = zlib.decompressobj(-zlib.MAX_WBITS)
        self._is_drained = False

    def next(self, bytes_max: int) -> bytes:
        """The next 1 to `bytes_max` bytes; none at the end."""
        while not self._inflater.eof and not self._is_drained:
            block = self._inflater.unconsumed_tail or self._read(_READ_BYTES)
            inflated = self._inflater.decompress(block, bytes_max)
            if inflated:
                return inflated
            # Even without input there may have been output that waited inside; only now there is not.
            self._is_drained = not block
        return b""
