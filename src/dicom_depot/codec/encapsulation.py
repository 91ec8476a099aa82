"""Encapsulated pixel data: from items to the code stream of each frame, and back (PS3.5 section A.4)."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Sequence

from dicom_depot.codec.layout import ByteRange, group_fragments
from dicom_depot.domain.errors import NotTranscodable


def split_frames(value: bytes, frame_count: int, extended_offsets: Sequence[int] = ()) -> list[bytes]:
    """The code stream of each frame of encapsulated pixel data, given without its sequence delimiter. Which fragments
    make a frame is told by the extended or the basic offset table, by their number, or by where code streams end;
    raises NotTranscodable when none of these gives `frame_count` frames.
    """
    table, *fragments = _items(value)
    count = table.length // 4
    basic_offsets = struct.unpack_from(f"<{count}L", value, table.offset)
    tables = (each for each in (extended_offsets, basic_offsets) if _is_usable(each, fragments, frame_count))
    ends = [b"\xff\xd9" in value[max(at, at + length - 10) : at + length] for at, length in fragments]
    begins = [True, *ends][:-1] if ends and ends[-1] else [False] * len(ends)  # A frame begins behind another's end.
    frames = group_fragments(fragments, next(tables, ()), frame_count, begins_frame=begins).fragments
    if len(frames) != frame_count:
        raise NotTranscodable("the fragments of the pixel data are not as many frames as it should have")
    return [b"".join(value[at : at + length] for at, length in frame) for frame in frames]


def _items(value: bytes) -> list[ByteRange]:
    """What each item holds; the basic offset table comes first."""
    items: list[ByteRange] = []
    at = 0
    while at + 8 <= len(value):
        group, element, length = struct.unpack_from("<HHL", value, at)
        if (group, element) != (0xFFFE, 0xE000) or at + 8 + length > len(value):
            break
        items.append(ByteRange(at + 8, length))
        at += 8 + length
    if not items or at != len(value):
        raise NotTranscodable("the encapsulated pixel data is broken")
    return items


def _is_usable(offsets: Sequence[int], fragments: Sequence[ByteRange], frame_count: int) -> bool:
    """Whether an offset table has a fragment for each frame, in order, from the first on. Some are all zeros."""
    if len(offsets) != frame_count or not fragments or offsets[0] != 0:
        return False
    places = {fragment.offset - fragments[0].offset for fragment in fragments}
    return places.issuperset(offsets) and all(one < other for one, other in itertools.pairwise(offsets))


def encapsulated(frames: Sequence[bytes]) -> list[bytes]:
    """In pieces: one fragment a frame, behind a basic offset table, which is left empty when an offset does not fit."""
    offsets, place = [], 0
    fragments = []
    for frame in frames:
        padded = len(frame) + len(frame) % 2
        offsets.append(place)
        place += 8 + padded
        fragments += [struct.pack("<HHL", 0xFFFE, 0xE000, padded), frame, b"\0" * (len(frame) % 2)]
    table = struct.pack(f"<{len(offsets)}L", *offsets) if offsets and offsets[-1] <= 0xFFFFFFFF else b""
    return [struct.pack("<HHL", 0xFFFE, 0xE000, len(table)), table, *fragments]
