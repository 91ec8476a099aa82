"""What is hashed of every instance on its way in: SHA-256 to tell contents apart, XXH3 to check each later read."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

import xxhash


class Hashes:
    """Both hashes and the length, in bytes, of what passes by."""

    def __init__(self) -> None:
        self._sha256, self._xxh3 = hashlib.sha256(), xxhash.xxh3_64()
        self.size = 0

    def update(self, block: bytes) -> None:
        self._sha256.update(block)
        self._xxh3.update(block)
        self.size += len(block)

    def through(self, blocks: Iterable[bytes]) -> Iterator[bytes]:
        for block in blocks:
            self.update(block)
            yield block

    def sha256(self) -> bytes:
        return self._sha256.digest()

    def xxh3(self) -> int:
        return self._xxh3.intdigest()
