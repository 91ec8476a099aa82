"""Values of a data set, and of the items of its sequences, as rendering needs them: numbers, text, tables.

The elements are `codec.elements`'s, so that what describes a picture is found where its pixels are. Nothing here is
recursive; an item is looked at when it is asked for.
"""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Iterable
from typing import Any

import numpy as np

from dicom_depot.codec.elements import IMPLICIT, ITEM, Element, File, explicit_vr, read_elements
from dicom_depot.codec.part10 import Encoding

_BINARY = {b"US": "H", b"SS": "h", b"UL": "L", b"SL": "l", b"FL": "f", b"FD": "d"}


class Attributes:
    """One data set or item. Of elements that stand twice the first counts. `is_signed`: what the pixels are, which
    decides about integers that the file gives no VR.
    """

    def __init__(self, data: bytes, elements: Iterable[Element], encoding: Encoding, *, is_signed: bool) -> None:
        self._data, self._encoding, self._is_signed = data, encoding, is_signed
        self._elements: dict[int, Element] = {}
        for element in elements:
            self._elements.setdefault(element.tag, element)

    @classmethod
    def of_file(cls, file: File, *, is_signed: bool) -> Attributes:
        return cls(file.data, file.elements, file.encoding, is_signed=is_signed)

    def value(self, tag: int) -> bytes | None:
        """The bytes as they stand, None also where there are none."""
        element = self._elements.get(tag)
        return (element and self._data[element.value_start : element.end]) or None

    def text(self, tag: int) -> str:
        return (self.value(tag) or b"").decode("latin-1").strip(" \0")

    def numbers(self, tag: int) -> list[float]:
        """All values of a decimal or integer string or of a binary number; empty where one of them is no number."""
        value = self.value(tag)
        if value is None:
            return []
        code = _BINARY.get(explicit_vr(self._elements[tag], is_signed=self._is_signed))
        try:
            if code is not None:
                numbers: list[float] = list(self._unpacked(value, code))
            else:
                numbers = [float(part) for part in value.decode("latin-1").strip(" \0").split("\\")]
        except ValueError:
            return []
        return numbers if all(map(math.isfinite, numbers)) else []

    def integers(self, tag: int) -> list[int]:
        """All values of US or SS, by the VR of the file or, where that has none, by the pixels' sign."""
        value = self.value(tag)
        if value is None:
            return []
        vr = explicit_vr(self._elements[tag], is_signed=self._is_signed)
        return [int(number) for number in self._unpacked(value, "h" if vr == b"SS" else "H")]

    def table(self, tag: int, count: int) -> np.ndarray[Any, np.dtype[np.uint16]] | None:
        """A lookup table of `count` entries: words, or bytes where it is just long enough for those. It may be
        shorter; None where there is none.
        """
        value = self.value(tag)
        if value is None:
            return None
        if len(value) < 2 * count and len(value) - count in (0, 1):
            return np.frombuffer(value, np.uint8)[:count].astype(np.uint16)
        return self.words(tag)[:count]

    def words(self, tag: int) -> np.ndarray[Any, np.dtype[np.uint16]]:
        value = self.value(tag) or b""
        return np.frombuffer(value[: len(value) // 2 * 2], "<u2" if self._encoding.is_little else ">u2").astype("u2")

    def item(self, tag: int, index: int = 0) -> Attributes | None:
        """The item with this index, from 0, of a sequence."""
        element = self._elements.get(tag)
        if element is None:
            return None
        # Unknown values of undefined length hold implicit VR little endian (PS3.5 section 6.2.2).
        encoding = IMPLICIT if element.vr == b"UN" else self._encoding
        value = self._data[element.value_start : element.end]
        items = (each for each in read_elements(value, 0, encoding) if each.tag == ITEM)
        found = next(itertools.islice(items, index, None), None)
        if found is None:
            return None
        content = value[found.value_start : found.end]
        return Attributes(content, read_elements(content, 0, encoding), encoding, is_signed=self._is_signed)

    def _unpacked(self, value: bytes, code: str) -> tuple[Any, ...]:
        packed = struct.Struct(("<" if self._encoding.is_little else ">") + code)
        return tuple(each for (each,) in packed.iter_unpack(value[: len(value) // packed.size * packed.size]))


class FrameAttributes:
    """What holds for one frame: functional groups of the frame, then shared ones (PS3.3 section C.7.6.16), then the
    data set itself, as in objects that have none.
    """

    def __init__(self, data_set: Attributes, number: int) -> None:
        groups = (data_set.item(_PER_FRAME, number - 1), data_set.item(_SHARED))
        self.data_set = data_set
        self._groups = [group for group in groups if group is not None]

    def macro(self, tag: int) -> Attributes:
        """The item of a functional group's sequence, or the data set."""
        found = (group.item(tag) for group in self._groups)
        return next((item for item in found if item is not None), self.data_set)


_PER_FRAME, _SHARED = 0x52009230, 0x52009229
