"""Transcode: whole instances and single frames in another transfer syntax, without loss. Bytes in, bytes out.

An element's value is never decoded. Where source and target encode alike, elements are copied as they stand; else
their headers are written anew, around the same value bytes (swapped for big endian), so that odd and invalid values
come out as they came in. Nested data is walked without recursion and gets undefined lengths when it is written anew.

What changes, besides the encoding: Transfer Syntax UID, the pixel data, Photometric Interpretation and Planar
Configuration where they describe it, the extended offset table (removed), group lengths (retired: removed, PS3.5
section 7.2), missing parts of the file meta information (added). Lossy Image Compression and its history stay.

Native to native copies the pixel cells, so that overlays in unused bits, single bits and floats survive. Encapsulated
to encapsulated goes through native. `codec.elements` finds the elements, `codec.rewriting` writes them,
`codec.encapsulation` knows the fragments and `codec.pixels` the code streams.
"""

from __future__ import annotations

import itertools
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from dicom_depot.codec import pixels
from dicom_depot.codec.elements import (
    BITS_ALLOCATED,
    CUT,
    DEFLATED,
    EXPLICIT,
    FLOATS,
    IMPLICIT,
    NUMBER_OF_FRAMES,
    PIXEL_DATA,
    PIXEL_REPRESENTATION,
    SEQUENCE_END,
    UNDEFINED,
    File,
    Head,
    element_header,
    read_elements,
    read_head,
)
from dicom_depot.codec.encapsulation import encapsulated, split_frames
from dicom_depot.codec.image import Cells, Image, native_cells, native_frame, native_value
from dicom_depot.codec.part10 import Encoding
from dicom_depot.codec.rewriting import BROKEN_SEQUENCE, Changes, file_meta, little_pixels, written
from dicom_depot.domain.errors import NotFound, NotTranscodable

IMPLICIT_LITTLE = "1.2.840.10008.1.2"
EXPLICIT_LITTLE = "1.2.840.10008.1.2.1"
_EXPLICIT_BIG = "1.2.840.10008.1.2.2"
_NATIVE = frozenset({IMPLICIT_LITTLE, EXPLICIT_LITTLE, DEFLATED, _EXPLICIT_BIG})

OFFERED = frozenset({IMPLICIT_LITTLE, EXPLICIT_LITTLE, DEFLATED}) | pixels.ENCODED
"""The transfer syntaxes that an instance can be transcoded to."""

BYTES_MAX = 2 << 30
"""How much one instance may be, inflated and with its pixels decoded."""

_PHOTOMETRIC, _PLANAR = 0x00280004, 0x00280006
_OFFSETS = 0x7FE00001
_OFFSET_TABLES = frozenset({0x7FE00001, 0x7FE00002, 0x7FE00003})


class FrameNotFound(NotFound):
    """The instance does not have the frame."""


def can_decode(transfer_syntax_uid: str) -> bool:
    """Whether instances that are stored in this syntax can be brought to Explicit VR Little Endian, if they are sound:
    not video, JPIP, and what is private or unknown.
    """
    return transfer_syntax_uid in _NATIVE or transfer_syntax_uid in pixels.DECODED


def transcode(content: bytes, target: str, *, bytes_max: int = BYTES_MAX) -> bytes:
    """The Part 10 file `content` in the transfer syntax `target`; unchanged when it is in it already.

    A file without preamble or file meta information gets them; what stands behind the pixel data and is no element is
    left out. Raises NotTranscodable, nothing else: for a target that is not OFFERED, a source without a decoder
    (video, private syntaxes), a target that cannot hold the pixels or needs some where there are none, broken data
    sets, and what would be more than `bytes_max`.
    """
    try:
        return _transcode(content, target, bytes_max)
    except NotTranscodable:
        raise
    except Exception:
        raise NotTranscodable("its pixel data or data set is broken") from None


def frames(content: bytes, numbers: Sequence[int], target: str, *, bytes_max: int = BYTES_MAX) -> list[bytes]:
    """The frames with these numbers, from 1, as they would stand in the instance transcoded to `target`: pixel cells,
    little endian, or one code stream without padding. Only these are decoded.

    Single bits begin at a byte's start. Raises FrameNotFound and, as `transcode` does, NotTranscodable.
    """
    try:
        return _frames(content, numbers, target, bytes_max)
    except (NotTranscodable, FrameNotFound):
        raise
    except Exception:
        raise NotTranscodable("its pixel data or data set is broken") from None


def decoded_frame(content: bytes, number: int, *, bytes_max: int = BYTES_MAX) -> tuple[File, Image, Cells]:
    """The data set, one frame's cells, and the image that they are: colour by pixel, on the full grid; floats as such.

    Raises FrameNotFound, NotTranscodable, and whatever decoders raise for broken data.
    """
    file = _read(read_head(content, bytes_max))
    if file.pixel_data is None:
        raise FrameNotFound("This instance has no pixel data.", target="frames")
    source = _Source(file, bytes_max)
    if not 1 <= number <= source.image.frames:
        raise FrameNotFound(f"There is no frame {number}: this instance has {source.image.frames}.", target="frames")
    cells = source.cells(number - 1)
    return file, source.image.decoded, cells.view(f"<f{cells.dtype.itemsize}") if source.is_float else cells


def _transcode(content: bytes, target: str, bytes_max: int) -> bytes:
    _check_target(target)
    head = read_head(content, bytes_max)
    encoding = IMPLICIT if target == IMPLICIT_LITTLE else EXPLICIT
    if head.syntax == target and head.encoding == encoding:
        return content
    file = _read(head)
    changes: Changes = {}
    if file.syntax not in _NATIVE or target in pixels.ENCODED:
        changes = _changed_pixels(file, target, encoding, bytes_max)
    data_set = written(file, encoding, changes)
    if target == DEFLATED:
        data_set = _deflated(data_set)
    return b"".join([head.preamble, b"DICM", file_meta(file, target), *data_set])


def _deflated(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """The data set deflated, and padded to even length (PS3.5 section A.5)."""
    deflater = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    length = 0
    for piece in itertools.chain(map(deflater.compress, pieces), map(deflater.flush, [zlib.Z_FINISH])):
        length += len(piece)
        yield piece
    yield b"\0" * (length % 2)


def _check_target(target: str) -> None:
    if target not in OFFERED:
        raise NotTranscodable("the transfer syntax is not one that instances are transcoded to")


def _read(head: Head) -> File:
    if not can_decode(head.syntax):
        raise NotTranscodable("no decoder for the transfer syntax that it is stored in")
    file = File(head, list(read_elements(head.data, head.start, head.encoding)))
    pixel_data = file.pixel_data
    if pixel_data is not None and pixel_data.is_undefined == (head.syntax in _NATIVE):
        raise NotTranscodable("its pixel data is not encapsulated as its transfer syntax says")
    if pixel_data is not None and pixel_data.is_cut:
        image = _image(file)
        if (pixel_data.end - pixel_data.value_start) * 8 < image.frame_bits * image.frames:
            raise NotTranscodable(CUT)
    return file


class _Source:
    """The pixel data of a file: frames by index, from 0, decoded when they are asked for."""

    def __init__(self, file: File, bytes_max: int) -> None:
        element = file.pixel_data
        if element is None:
            raise NotTranscodable("it has no pixel data")
        self.stored = self.image = _image(file)
        self.is_float = element.tag in FLOATS
        self.syntax = file.syntax
        self.is_native = file.syntax in _NATIVE
        if self.image.frame_cells * self.image.frames == 0:
            raise NotTranscodable("its pixel data has no pixels")
        if self.image.decoded_bytes > bytes_max:
            raise NotTranscodable("its pixels, decoded, are larger than the limit")
        if self.is_native:
            self._value = little_pixels(file, element, self.image.bits_allocated)
            return
        table = file.value(_OFFSETS) or b""
        extended = struct.unpack(f"<{len(table) // 8}Q", table[: len(table) // 8 * 8])
        if self.image.frames > element.end - element.value_start:
            raise NotTranscodable("the fragments of the pixel data are not as many frames as it should have")
        value = file.data[element.value_start : element.end - 8]
        self._streams = split_frames(value, self.image.frames, extended)
        self.image = pixels.colour_of(self._streams[0], file.syntax, self.image)

    def stream(self, index: int) -> bytes:
        return self._streams[index]

    def check_encodable(self, target: str) -> None:
        if self.is_float:
            raise NotTranscodable("its pixels are floating point numbers, which only native syntaxes hold")
        pixels.check_encodable(self.image.decoded, target)

    def native(self, index: int) -> bytes:
        return native_frame(self._value, index, self.image)

    def cells(self, index: int) -> Cells:
        if self.is_native:
            return native_cells(self.native(index), self.image)
        return pixels.decode(self._streams[index], self.syntax, self.image)


def _image(file: File) -> Image:
    rows, columns, allocated = (file.integer(tag) for tag in (0x00280010, 0x00280011, BITS_ALLOCATED))
    if rows is None or columns is None or allocated is None:
        raise NotTranscodable("its pixels are not described: rows, columns or bits allocated are missing")
    stored = file.integer(0x00280101) or allocated  # Floats have none.
    high_bit = file.integer(0x00280102)
    return Image(
        rows=rows,
        columns=columns,
        samples=file.integer(0x00280002) or 1,
        bits_allocated=allocated,
        bits_stored=stored,
        high_bit=stored - 1 if high_bit is None else high_bit,
        is_signed=file.integer(PIXEL_REPRESENTATION) == 1,
        photometric=(file.value(_PHOTOMETRIC) or b"").decode("latin-1").strip(" \0"),
        planar=file.integer(_PLANAR) or 0,
        frames=max(1, file.integer(NUMBER_OF_FRAMES) or 1),
    )


_ENCAPSULATED = b"\xe0\x7f\x10\0OB\0\0\xff\xff\xff\xff"
"""How encapsulated pixel data begins: an icon's, where it stands in a sequence."""


def _changed_pixels(file: File, target: str, encoding: Encoding, bytes_max: int) -> Changes:
    """The elements that hold and describe the pixels in `target`."""
    pixel_data = file.pixel_data
    if pixel_data is None and target not in pixels.ENCODED:
        return {}
    if file.syntax not in _NATIVE and _ENCAPSULATED in file.data[: pixel_data and pixel_data.start]:
        raise NotTranscodable(BROKEN_SEQUENCE)
    source = _Source(file, bytes_max)
    if source.image.decoded_bytes * source.image.frames > bytes_max:
        raise NotTranscodable("its pixels, decoded, are larger than the limit")
    if source.is_native:
        source.native(source.image.frames - 1)  # The last one: before any is encoded, all are known to be there.
    image, indexes = source.image.decoded, range(source.image.frames)
    changes: Changes = {tag: () for tag in _OFFSET_TABLES if file.find(tag) is not None}
    if target in pixels.ENCODED:
        source.check_encodable(target)
        value = encapsulated([pixels.encode(source.cells(index), target, image) for index in indexes])
        image = pixels.encoded_image(image, target)
        end = element_header(SEQUENCE_END, b"", 0, encoding)
        changes[PIXEL_DATA] = [element_header(PIXEL_DATA, b"OB", UNDEFINED, encoding), *value, end]
    else:
        value = native_value(map(source.cells, indexes), image)
        length = sum(map(len, value))
        vr = b"OW" if image.bits_allocated > 8 else b"OB"
        changes[PIXEL_DATA] = [element_header(PIXEL_DATA, vr, length, encoding), *value]
    if image.photometric != source.stored.photometric:
        text = image.photometric.encode()
        text += b" " * (len(text) % 2)
        changes[_PHOTOMETRIC] = [element_header(_PHOTOMETRIC, b"CS", len(text), encoding), text]
    if image.samples > 1:
        changes[_PLANAR] = [element_header(_PLANAR, b"US", 2, encoding), struct.pack("<H", image.planar)]
    return changes


def _frames(content: bytes, numbers: Sequence[int], target: str, bytes_max: int) -> list[bytes]:
    _check_target(target)
    file = _read(read_head(content, bytes_max))
    if file.pixel_data is None:
        raise FrameNotFound("the instance has no pixel data, and no frames")
    source = _Source(file, bytes_max)
    for number in numbers:
        if not 1 <= number <= source.image.frames:
            raise FrameNotFound(f"there is no frame {number}; the instance has {source.image.frames}")
    if source.image.decoded_bytes * len(numbers) > bytes_max:
        raise NotTranscodable("the frames, decoded, are larger than the limit")
    indexes = [number - 1 for number in numbers]
    if file.syntax == target and not source.is_native:
        return [source.stream(index) for index in indexes]
    image = source.image.decoded
    if target in pixels.ENCODED:
        source.check_encodable(target)
        return [pixels.encode(source.cells(index), target, image) for index in indexes]
    if source.is_native:
        return [source.native(index) for index in indexes]
    alone = replace(image, frames=1)
    length = -(-image.frame_bits // 8)
    return [b"".join(native_value([source.cells(index)], alone))[:length] for index in indexes]
