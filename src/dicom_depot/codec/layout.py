"""Where bulk data lies in an instance's file: values that DICOM JSON leaves out, and the frames of its pixel data.

A layout is made once, when the file is read, and kept packed in the index; bulk data and frames are then read by byte
ranges. Offsets count from the beginning of the file, or of the inflated data set where that is deflated.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from dicom_depot.domain.errors import NotFound

PIXEL_PATHS = ("7FE00010", "7FE00008", "7FE00009")
"""Pixel Data, Float Pixel Data, Double Float Pixel Data (PS3.3 section C.7.6.3)."""


_COMPRESSED_FROM_BYTES = 512
"""Compressing less saves no page of a database, and takes longer than everything else here."""


class ByteRange(NamedTuple):
    """`length` bytes from `offset` on."""

    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class NativeFrames:
    """Frames of native pixel data, one behind the other without padding (PS3.5 section 8.1.1): of `bits` bits each."""

    value: ByteRange
    bits: int
    count: int

    def range_of(self, number: int) -> tuple[ByteRange, int]:
        """The bytes that hold frame `number` (from 1), and in which bit of the first of them it begins.

        Raises NotFound where the file ends before the frame does.
        """
        first_bit = (number - 1) * self.bits
        offset, shift = divmod(first_bit, 8)
        length = -(-(shift + self.bits) // 8)
        if number > self.count or offset + length > self.value.length:
            raise _no_frame(number, self.available)
        return ByteRange(self.value.offset + offset, length), shift

    @property
    def available(self) -> int:
        return min(self.count, self.value.length * 8 // self.bits) if self.bits else 0


@dataclass(frozen=True, slots=True)
class EncapsulatedFrames:
    """Frames of encapsulated pixel data (PS3.5 section A.4): each the fragments that hold its code stream."""

    fragments: tuple[tuple[ByteRange, ...], ...]

    def ranges_of(self, number: int) -> tuple[ByteRange, ...]:
        """The fragments of frame `number` (from 1). Raises NotFound."""
        if number > len(self.fragments):
            raise _no_frame(number, len(self.fragments))
        return self.fragments[number - 1]


Frames = NativeFrames | EncapsulatedFrames


@dataclass(frozen=True, slots=True)
class Layout:
    """`values`: path of a bulk value (tags and item numbers, `00409096/0/00409212`) to its VR and place.

    `deflated_at`: where the deflated data set begins; None in all other transfer syntaxes. `is_complete`: whether the
    whole file could be read.
    """

    values: Mapping[str, tuple[str, ByteRange]] = field(default_factory=dict)
    frames: Frames | None = None
    is_little_endian: bool = True
    deflated_at: int | None = None
    is_complete: bool = True


def pack(layout: Layout) -> bytes:
    match layout.frames:
        case NativeFrames(value, bits, count):
            frames: object = [[value.offset, value.length], bits, count]
        case EncapsulatedFrames(fragments):
            frames = [[part for piece in frame for part in piece] for frame in fragments]
        case None:
            frames = None
    content = {
        "values": {path: [vr, *place] for path, (vr, place) in layout.values.items()},
        "kind": type(layout.frames).__name__[:1] if layout.frames is not None else "",
        "frames": frames,
        "little": layout.is_little_endian,
        "deflated": layout.deflated_at,
        "complete": layout.is_complete,
    }
    packed = json.dumps(content, separators=(",", ":")).encode()
    return packed if len(packed) < _COMPRESSED_FROM_BYTES else zlib.compress(packed, 1)


def unpack(packed: bytes) -> Layout:
    content = json.loads(packed if packed[:1] == b"{" else zlib.decompress(packed))
    frames: Frames | None = None
    match content["kind"], content["frames"]:
        case "N", [[offset, length], bits, count]:
            frames = NativeFrames(ByteRange(offset, length), bits, count)
        case "E", numbers:
            frames = EncapsulatedFrames(tuple(_pairs(frame) for frame in numbers))
    values = {path: (vr, ByteRange(offset, length)) for path, (vr, offset, length) in content["values"].items()}
    return Layout(values, frames, content["little"], content["deflated"], content["complete"])


def group_fragments(
    fragments: Sequence[ByteRange], starts: Sequence[int], frame_count: int, *, begins_frame: Sequence[bool]
) -> EncapsulatedFrames:
    """Put fragments together to frames (PS3.5 section A.4).

    starts: offsets of the frames from an offset table, counted from the first fragment's item; empty without one.
    begins_frame: for each fragment, whether it starts like a code stream; used only where no table tells.
    """
    if len(fragments) == frame_count:
        return EncapsulatedFrames(tuple((fragment,) for fragment in fragments))
    if frame_count <= 1:
        return EncapsulatedFrames((tuple(fragments),) if fragments else ())
    if len(starts) > 1 and fragments:
        first_item = fragments[0].offset - 8
        marks = frozenset(first_item + start + 8 for start in starts)
        if marks <= {fragment.offset for fragment in fragments}:
            return _split(fragments, [fragment.offset in marks for fragment in fragments])
    return _split(fragments, begins_frame)


def _split(fragments: Sequence[ByteRange], begins: Sequence[bool]) -> EncapsulatedFrames:
    frames: list[list[ByteRange]] = []
    for fragment, is_first in zip(fragments, begins, strict=True):
        if is_first or not frames:
            frames.append([])
        frames[-1].append(fragment)
    return EncapsulatedFrames(tuple(tuple(frame) for frame in frames))


def shifted(content: bytes, shift: int, bits: int) -> bytes:
    """The `bits` bits of `content` that begin at bit `shift` (least significant first, PS3.5 section 8.1.1)."""
    if shift:
        number = int.from_bytes(content, "little") >> shift
        content = number.to_bytes(len(content), "little")
    length = -(-bits // 8)
    content = content[:length]
    if rest := bits % 8:
        content = content[:-1] + bytes([content[-1] & ((1 << rest) - 1)])
    return content


def _pairs(numbers: Sequence[int]) -> tuple[ByteRange, ...]:
    return tuple(ByteRange(numbers[n], numbers[n + 1]) for n in range(0, len(numbers), 2))


def _no_frame(number: int, count: int) -> NotFound:
    return NotFound(f"There is no frame {number}: this instance has {count}.", target="frames")
