"""Colour: from decoded cells to 8-bit RGB. RGB, YBR_FULL and PALETTE COLOR (PS3.3 sections C.7.6.3.1.2 and C.7.9)."""

from __future__ import annotations

from typing import Any

import numpy as np

from dicom_depot.codec.attributes import Attributes
from dicom_depot.codec.greyscale import TABLE_BITS_MAX, Bytes, bits_of, codes, looked_up, possible_values, strips
from dicom_depot.codec.image import Cells, Image
from dicom_depot.domain.errors import NotTranscodable

_DESCRIPTORS = (0x00281101, 0x00281102, 0x00281103)
_TABLES = (0x00281201, 0x00281202, 0x00281203)
_SEGMENTED = (0x00281221, 0x00281222, 0x00281223)
_BROKEN_PALETTE = "its palette is broken"

_RED_OF_CR, _GREEN_OF_CB, _GREEN_OF_CR, _BLUE_OF_CB = 1.402, 0.344136, 0.714136, 1.772


def rgb(cells: Cells, image: Image) -> Bytes:
    """Cells of RGB or YBR_FULL as rows x columns x 3 of 8 bits."""
    if bits_of(image) != 8 or image.bits_allocated != 8:
        cells = _eight_bits(cells, image)
    shown: Bytes = np.ascontiguousarray(cells.view(np.uint8))
    if image.photometric != "YBR_FULL":
        return shown
    result = np.empty(shown.shape, np.uint8)
    for rows in strips(shown):
        y, cb, cr = np.moveaxis(shown[rows].astype(np.float32), -1, 0)
        cb -= 128
        cr -= 128
        strip = result[rows]
        strip[..., 0] = _rounded(y + _RED_OF_CR * cr)
        strip[..., 1] = _rounded(y - _GREEN_OF_CB * cb - _GREEN_OF_CR * cr)
        strip[..., 2] = _rounded(y + _BLUE_OF_CB * cb)
    return result


def _eight_bits(cells: Cells, image: Image) -> Bytes:
    bits = bits_of(image)
    if bits <= TABLE_BITS_MAX:
        highest = (1 << bits) - 1
        table = ((np.arange(highest + 1) * 510 + highest) // (2 * highest)).astype(np.uint8)
        return looked_up(cells, image, table)
    shown = np.empty(cells.shape, np.uint8)
    for rows in strips(cells):
        shown[rows] = codes(cells[rows], image) >> (bits - 8)
    return shown


def _rounded(values: np.ndarray[Any, np.dtype[np.float32]]) -> Bytes:
    rounded: Bytes = np.clip(np.floor(values + np.float32(0.5)), 0, 255).astype(np.uint8)
    return rounded


def palette(cells: Cells, image: Image, attributes: Attributes) -> Bytes:
    """Indexes as rows x columns x 3 of 8 bits. Raises NotTranscodable where there is no palette for them."""
    if bits_of(image) > TABLE_BITS_MAX:
        raise NotTranscodable("its palette indexes have more than 16 bits")
    descriptors = [attributes.integers(tag)[:3] for tag in _DESCRIPTORS]
    if not all(len(descriptor) == 3 for descriptor in descriptors):
        raise NotTranscodable("it has no palette")
    values = possible_values(image)
    channels = []
    tables = [_table(attributes, index, descriptor) for index, descriptor in enumerate(descriptors)]
    is_deep = any(int(table.max()) > 255 for table in tables)
    for table, (_, first, bits) in zip(tables, descriptors, strict=True):
        unused = min(bits - 8, 8) if bits > 8 and is_deep else 0  # Some call tables of 8 bits 16 bits wide.
        channel = np.minimum(table >> unused, 255).astype(np.uint8)
        channels.append(channel[np.clip(values - first, 0, len(table) - 1)])
    return looked_up(cells.reshape(image.rows, image.columns), image, np.stack(channels, axis=1))


def _table(attributes: Attributes, index: int, descriptor: list[int]) -> np.ndarray[Any, np.dtype[np.uint16]]:
    count, bits = descriptor[0] % (1 << 16) or 1 << 16, descriptor[2]
    table = attributes.table(_TABLES[index], count)
    if table is None:
        segments = attributes.value(_SEGMENTED[index])
        if segments is None:
            raise NotTranscodable("it has no palette")
        is_wide = bits > 8
        words = attributes.words(_SEGMENTED[index]) if is_wide else np.frombuffer(segments, np.uint8)
        table = np.array(expanded(words.tolist(), count, is_wide=is_wide), np.uint16)
    if not len(table):
        raise NotTranscodable(_BROKEN_PALETTE)
    return table


def expanded(segments: list[int], count: int, *, is_wide: bool) -> list[int]:
    """A segmented table (PS3.3 section C.7.9.2), at most `count` entries of it. Raises NotTranscodable.

    An indirect segment repeats segments that stand at a byte offset; it does not repeat an indirect one.
    """
    entries: list[int] = []
    at, turns = 0, len(segments)
    repeats: list[tuple[int, int]] = []  # Where to go on, and behind how many segments.
    while len(entries) < count and turns > 0:
        turns -= 1
        if repeats and repeats[-1][1] == 0:
            at = repeats.pop()[0]
            continue
        if at + 1 >= len(segments):
            break
        if repeats:
            repeats[-1] = (repeats[-1][0], repeats[-1][1] - 1)
        kind, length = segments[at], segments[at + 1]
        at += 2
        match kind:
            case 0:
                entries += segments[at : at + length]
                at += length
            case 1 if entries and at < len(segments):
                begin, end = entries[-1], segments[at]
                entries += [
                    begin + ((end - begin) * step * 2 + length) // (2 * length) for step in range(1, length + 1)
                ]
                at += 1
            case 2 if not repeats and at + (2 if is_wide else 4) <= len(segments):
                if is_wide:
                    target = (segments[at] | segments[at + 1] << 16) // 2
                    at += 2
                else:
                    target = int.from_bytes(bytes(segments[at : at + 4]), "little")
                    at += 4
                repeats.append((at, length))
                at = target
            case _:
                raise NotTranscodable(_BROKEN_PALETTE)
    return entries[:count]
