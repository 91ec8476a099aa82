"""Pixels: from encapsulated code streams to pixel cells and back, without loss. No data sets here, no I/O, no logs.

Each library is called by itself. pydicom's decoders would try every plugin in turn, warn and log with values in the
text, and silence them only for the whole process: `warnings.catch_warnings` is not safe in threads.

| transfer syntax | decoded by | encoded by |
|---|---|---|
| JPEG baseline, extended, lossless | gdcm: the one decoder with a licence like ours | |
| JPEG-LS | CharLS (pyjpegls) | CharLS |
| JPEG 2000, high throughput too | OpenJPEG (pylibjpeg-openjpeg) | OpenJPEG |
| RLE | this module: pydicom's decoder is not bounded, and warns | this module |
| deflated image frames, encapsulated uncompressed | this module | |

Colours are never converted, for that loses values: JPEG's components leave as they are, up to the full grid
(YBR_FULL_422 becomes YBR_FULL). Only JPEG 2000's own transforms are undone by its decoder (YBR_RCT, YBR_ICT: RGB).

The C libraries trust their input. What a code stream says of its size, components and precision is compared with the
data set before it is decoded, which bounds the memory too. What was encoded is decoded again and compared: a code
stream that does not give the same values never leaves.
"""

from __future__ import annotations

import itertools
import logging
import re
import struct
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import gdcm  # type: ignore[import-untyped]  # gdcm has no types
import jpeg_ls  # type: ignore[import-untyped]  # nor has pyjpegls
import numpy as np
from openjpeg.utils import decode_pixel_data, encode_pixel_data

from dicom_depot.domain.errors import NotTranscodable

RLE_LOSSLESS = "1.2.840.10008.1.2.5"
JPEG_LS_LOSSLESS = "1.2.840.10008.1.2.4.80"
JPEG_2000_LOSSLESS = "1.2.840.10008.1.2.4.90"

ENCODED = frozenset({RLE_LOSSLESS, JPEG_LS_LOSSLESS, JPEG_2000_LOSSLESS})
"""The encapsulated transfer syntaxes that `encode` makes."""

Cells = np.ndarray[tuple[int, ...], np.dtype[Any]]
"""One frame as integers of the image's `dtype`: rows x columns x samples."""

# The libraries' own logs tell what code streams hold, and come for every image.
for _name in ("openjpeg", "jpeg_ls"):
    logging.getLogger(_name).setLevel(logging.CRITICAL)
gdcm.Trace.DebugOff()
gdcm.Trace.WarningOff()
gdcm.Trace.ErrorOff()


@dataclass(frozen=True, slots=True)
class Image:
    """What the Image Pixel module says of one instance's pixel data (PS3.3 section C.7.6.3)."""

    rows: int
    columns: int
    samples: int
    bits_allocated: int
    bits_stored: int
    high_bit: int
    is_signed: bool
    photometric: str
    planar: int
    """Planar Configuration: 0 is colour by pixel, 1 is colour by plane."""
    frames: int

    @property
    def frame_cells(self) -> int:
        return self.rows * self.columns * self.samples

    @property
    def frame_bits(self) -> int:
        """One frame in native encoding, where YBR_FULL_422 has two samples a pixel (PS3.3 section C.7.6.3.1.2)."""
        if self.is_subsampled:
            return self.rows * self.columns * 2 * self.bits_allocated
        return self.frame_cells * self.bits_allocated

    @property
    def decoded_bytes(self) -> int:
        """One frame as `Cells`."""
        return self.frame_cells * max(1, self.bits_allocated // 8)

    @property
    def is_subsampled(self) -> bool:
        return self.photometric == "YBR_FULL_422" and self.samples == 3

    @property
    def dtype(self) -> np.dtype[Any]:
        """The little endian integers that hold one cell. Raises NotTranscodable when no integer does."""
        if self.bits_allocated not in (1, 8, 16, 32, 64):
            raise NotTranscodable("Bits Allocated is neither 1, 8, 16, 32 nor 64")
        return np.dtype(f"<{'i' if self.is_signed else 'u'}{max(1, self.bits_allocated // 8)}")

    @property
    def decoded(self) -> Image:
        """The image that `decode` gives: colour by pixel, on the full grid, JPEG 2000's transforms undone."""
        if self.samples == 1:
            return self
        photometric = {"YBR_FULL_422": "YBR_FULL", "YBR_RCT": "RGB", "YBR_ICT": "RGB"}.get(self.photometric)
        return replace(self, photometric=photometric or self.photometric, planar=0)

    def encoded_in(self, syntax: str) -> Image:
        """The image as `encode` leaves it, this one being decoded (PS3.5 sections 8.2.2 to 8.2.4)."""
        if self.samples == 1:
            return self
        photometric = self.photometric
        if syntax == JPEG_2000_LOSSLESS and photometric == "RGB":
            photometric = "YBR_RCT"  # The reversible transform, exact in integers; it makes colours much smaller.
        return replace(self, photometric=photometric, planar=1 if syntax == RLE_LOSSLESS else 0)


# --- native pixel data ------------------------------------------------------------------------------------------------


def native_frame(value: bytes, index: int, image: Image) -> bytes:
    """The pixel cells of one frame of little endian native pixel data. Bits are moved to begin at a byte's start."""
    start = index * image.frame_bits
    end = start + image.frame_bits
    if end > len(value) * 8:
        raise NotTranscodable("the pixel data is shorter than its description")
    if start % 8 == 0 and end % 8 == 0:
        return value[start // 8 : end // 8]
    if image.bits_allocated != 1:
        raise NotTranscodable("frames do not begin at whole bytes")
    packed = np.frombuffer(value, np.uint8, offset=start // 8, count=-(-end // 8) - start // 8)
    bits = np.unpackbits(packed, bitorder="little")[start % 8 : start % 8 + image.frame_bits]
    return np.packbits(bits, bitorder="little").tobytes()


def native_cells(frame: bytes, image: Image) -> Cells:
    """A native frame as cells, whatever its planar configuration; YBR_FULL_422 is spread to the full grid."""
    if image.bits_allocated == 1:
        bits = np.unpackbits(np.frombuffer(frame, np.uint8), bitorder="little")[: image.frame_cells]
        return bits.reshape(image.rows, image.columns, image.samples)
    flat = np.frombuffer(frame, image.dtype)
    if image.is_subsampled:
        pairs = flat.reshape(-1, 4)  # Y1 Y2 Cb Cr
        return pairs[:, [0, 2, 3, 1, 2, 3]].reshape(image.rows, image.columns, 3)
    if image.samples > 1 and image.planar == 1:
        return flat.reshape(image.samples, image.rows, image.columns).transpose(1, 2, 0)
    return flat.reshape(image.rows, image.columns, image.samples)


def native_value(frames: Iterable[Cells], image: Image) -> list[bytes]:
    """Native pixel data in pieces, colour by pixel, padded to even length (PS3.5 section 8.1.1); single bits of all
    frames without gaps.
    """
    if image.bits_allocated == 1:
        pieces = [np.packbits(np.concatenate([frame.ravel() for frame in frames]), bitorder="little").tobytes()]
    else:
        pieces = [frame.tobytes() for frame in frames]
    return [*pieces, b"\0" * (sum(map(len, pieces)) % 2)]


# --- encapsulation ----------------------------------------------------------------------------------------------------


def split_frames(value: bytes, image: Image, extended_offsets: Sequence[int] = ()) -> list[bytes]:
    """The code stream of each frame of encapsulated pixel data, given without its sequence delimiter (PS3.5 section
    A.4). Which fragments make a frame is told by the extended or the basic offset table, by their number, or by
    where code streams end; raises NotTranscodable when none of these gives as many frames as the image has.
    """
    (table, _), *fragments = _items(value)
    places = [place for _, place in fragments]
    contents = [content for content, _ in fragments]
    if image.frames == 1 and contents:
        return [b"".join(contents)]
    basic_offsets = struct.unpack(f"<{len(table) // 4}L", table[: len(table) // 4 * 4])
    for offsets in (extended_offsets, basic_offsets):
        if len(offsets) == image.frames and (starts := _starts_at(offsets, places)) is not None:
            return _joined(contents, starts)
    if len(contents) == image.frames:
        return contents
    ends = [index + 1 for index, content in enumerate(contents) if b"\xff\xd9" in content[-10:]]
    if len(ends) == image.frames and ends[-1] == len(contents):
        return _joined(contents, [0, *ends[:-1]])
    raise NotTranscodable("the fragments of the pixel data are not as many frames as it should have")


def _items(value: bytes) -> list[tuple[bytes, int]]:
    """Each item and its offset from the first fragment; the basic offset table comes first."""
    items: list[tuple[bytes, int]] = []
    at = first = 0
    while at + 8 <= len(value):
        group, element, length = struct.unpack_from("<HHL", value, at)
        if (group, element) != (0xFFFE, 0xE000) or at + 8 + length > len(value):
            break
        items.append((value[at + 8 : at + 8 + length], at - first))
        at += 8 + length
        if len(items) == 1:
            first = at
    if not items or at != len(value):
        raise NotTranscodable("the encapsulated pixel data is broken")
    return items


def _starts_at(offsets: Sequence[int], places: list[int]) -> list[int] | None:
    """The indexes of the fragments at `offsets`; None unless each is one, in order, from the first on."""
    index_at = {place: index for index, place in enumerate(places)}
    starts = [index_at.get(offset, -1) for offset in offsets]
    is_valid = starts[0] == 0 and all(one < other for one, other in itertools.pairwise(starts))
    return starts if is_valid else None


def _joined(contents: list[bytes], starts: list[int]) -> list[bytes]:
    return [b"".join(contents[start:end]) for start, end in zip(starts, [*starts[1:], len(contents)], strict=True)]


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


# --- decoding ---------------------------------------------------------------------------------------------------------


def decode(stream: bytes, syntax: str, image: Image) -> Cells:
    """One frame's code stream as cells. What they are in colour is `image.decoded`.

    Raises NotTranscodable for what no decoder here reads, and whatever the decoder raises for broken streams.
    """
    decoder = _DECODERS.get(syntax)
    if decoder is None:
        raise NotTranscodable("no decoder for the transfer syntax that it is stored in")
    if image.samples not in (1, 3) or image.photometric not in _PHOTOMETRICS[image.samples]:
        raise NotTranscodable("its photometric interpretation is not one of encapsulated images")
    return decoder(stream, syntax, image)


_PHOTOMETRICS = {
    1: ("MONOCHROME1", "MONOCHROME2", "PALETTE COLOR"),
    3: ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_RCT", "YBR_ICT"),
}


def colour_of(stream: bytes, syntax: str, image: Image) -> Image:
    """The image with the photometric interpretation that its code stream shows, where that is known to outweigh the
    data set's: JPEG's and JPEG-LS's component names, JFIF's and Adobe's markers.
    """
    if image.samples != 3 or _DECODERS.get(syntax) not in (_decode_jpeg, _decode_jpeg_ls):
        return image
    header = _jpeg_header(stream)
    if header.component_ids in (b"RGB", b"rgb"):
        return replace(image, photometric="RGB")
    if (header.is_jfif or header.is_adobe_ybr) and not image.photometric.startswith("YBR"):
        return replace(image, photometric="YBR_FULL")
    return image


class _StreamHeader(NamedTuple):
    columns: int
    rows: int
    components: int
    precision: int
    component_ids: bytes = b""
    is_jfif: bool = False
    is_adobe_ybr: bool = False
    essence: bytes = b""
    """The stream without its application segments and comments."""


def _jpeg_header(stream: bytes) -> _StreamHeader:
    """What stands before the first scan of a JPEG or JPEG-LS stream (ISO/IEC 10918-1 section B.2, 14495-1 annex C).

    Raises ValueError, struct.error or IndexError unless marker follows marker: gdcm ends the process when libjpeg
    warns of anything there, of bytes between segments as of an unknown JFIF version.
    """
    if stream[:2] != b"\xff\xd8":
        raise ValueError
    header, kept = _StreamHeader(0, 0, 0, 0), [b"\xff\xd8"]
    at, is_jfif, is_adobe_ybr = 2, False, False
    while True:
        marker, length = struct.unpack_from(">HH", stream, at)
        if marker == 0xFFFF:  # a fill byte
            at += 1
            continue
        if marker == 0xFFDA:
            return header._replace(is_jfif=is_jfif, is_adobe_ybr=is_adobe_ybr, essence=b"".join([*kept, stream[at:]]))
        if length < 2:
            raise ValueError
        segment = stream[at + 4 : at + 2 + length]
        if marker in _FRAME_MARKERS:
            precision, rows, columns, components = struct.unpack_from(">BHHB", segment)
            header = _StreamHeader(columns, rows, components, precision, segment[6 : 6 + 3 * components : 3])
        is_jfif = is_jfif or (marker == 0xFFE0 and segment.startswith(b"JFIF"))
        is_adobe_ybr = is_adobe_ybr or (marker == 0xFFEE and segment[:5] == b"Adobe" and segment[11:12] == b"\1")
        if marker in _FRAME_MARKERS or marker in _TABLE_MARKERS:
            if marker == 0xFFDB and not _is_quantization(segment):
                raise ValueError
            kept.append(stream[at : at + 2 + length])
        elif not 0xFFE0 <= marker <= 0xFFEF and marker != 0xFFFE:
            raise ValueError
        at += 2 + length


def _is_quantization(segment: bytes) -> bool:
    """Whether whole tables of 64 bytes or words fill the segment: libjpeg would read beyond it."""
    at = 0
    while at < len(segment):
        at += 129 if segment[at] >> 4 else 65
    return at == len(segment)


_FRAME_MARKERS = frozenset({*range(0xFFC0, 0xFFD0), 0xFFF7} - {0xFFC4, 0xFFC8, 0xFFCC})
_TABLE_MARKERS = frozenset({0xFFC4, 0xFFDB, 0xFFDD, 0xFFF8})
"""Huffman and quantization tables, restart intervals, JPEG-LS parameters."""


def _jpeg_2000_header(stream: bytes) -> _StreamHeader:
    """The image and tile size of a JPEG 2000 stream, be it in a JP2 file (ISO/IEC 15444-1 section A.5.1)."""
    at = stream.index(b"\xff\x4f\xff\x51") + 4
    right, lower, left, upper, _, _, _, _, components = struct.unpack_from(">8LH", stream, at + 4)
    sizes = {stream[place : place + 3] for place in range(at + 38, at + 38 + 3 * components, 3)}
    if len(sizes) != 1 or not next(iter(sizes)).endswith(b"\x01\x01"):
        raise NotTranscodable("the components of its code stream differ in size or precision")
    return _StreamHeader(right - left, lower - upper, components, (next(iter(sizes))[0] & 0x7F) + 1)


def _check(header: _StreamHeader, image: Image) -> None:
    if (header.columns, header.rows, header.components) != (image.columns, image.rows, image.samples):
        raise NotTranscodable("its code stream and its attributes differ in rows, columns or samples")
    if not 0 < header.precision <= image.bits_allocated:
        raise NotTranscodable("its code stream has more bits than Bits Allocated")


def _widened(buffer: bytes | bytearray | Cells, precision: int, image: Image) -> Cells:
    """Cells from the smallest integers that hold `precision` bits. Whether they are signed is the data set's to say:
    JPEG-LS cannot, and JPEG 2000 encoders often say it wrongly.
    """
    size = 1 if precision <= 8 else 2 if precision <= 16 else 4
    values = np.frombuffer(buffer, f"<u{size}").astype(f"<u{image.dtype.itemsize}")
    unused = 8 * image.dtype.itemsize - precision
    cells = values.view(image.dtype)
    np.left_shift(cells, unused, out=cells)
    np.right_shift(cells, unused, out=cells)  # Of signed integers this extends the sign.
    return cells


def _decode_jpeg_2000(stream: bytes, syntax: str, image: Image) -> Cells:
    header = _jpeg_2000_header(stream)
    _check(header, image)
    buffer = decode_pixel_data(stream, version=2)
    return _widened(buffer, header.precision, image).reshape(image.rows, image.columns, image.samples)


def _decode_jpeg_ls(stream: bytes, syntax: str, image: Image) -> Cells:
    header = _jpeg_header(stream)
    _check(header, image)
    if not stream.rstrip(b"\0").endswith(b"\xff\xd9"):
        raise ValueError  # CharLS takes minutes for streams that are cut off.
    buffer, info = jpeg_ls.decode_pixel_data(stream)
    cells = _widened(buffer, header.precision, image)
    if image.samples > 1 and info["interleave_mode"] == 0:
        return cells.reshape(image.samples, image.rows, image.columns).transpose(1, 2, 0)
    return cells.reshape(image.rows, image.columns, image.samples)


def _decode_jpeg(stream: bytes, syntax: str, image: Image) -> Cells:
    header = _jpeg_header(stream)
    _check(header, image)
    bits = 8 if header.precision <= 8 else 16
    fragment = gdcm.Fragment()
    fragment.SetByteStringValue(header.essence)
    fragments = gdcm.SequenceOfFragments.New()
    fragments.AddFragment(fragment)
    element = gdcm.DataElement(gdcm.Tag(0x7FE0, 0x0010))
    element.SetValue(fragments.__ref__())
    picture = gdcm.Image()
    picture.SetNumberOfDimensions(2)
    picture.SetDimensions((image.columns, image.rows, 1))
    picture.SetDataElement(element)
    kind = gdcm.PhotometricInterpretation.GetPIType(image.decoded.photometric)  # YBR_FULL: no conversion
    picture.SetPhotometricInterpretation(gdcm.PhotometricInterpretation(kind))
    if image.samples > 1:
        picture.SetPlanarConfiguration(0)
    picture.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.GetTSType(syntax)))
    stored = header.precision
    picture.SetPixelFormat(gdcm.PixelFormat(image.samples, bits, stored, stored - 1, int(image.is_signed)))
    buffer = picture.GetBuffer().encode("utf-8", "surrogateescape")  # gdcm gives bytes as text
    cells = np.frombuffer(buffer, f"<u{bits // 8}")
    if bits < image.bits_allocated:
        cells = _widened(buffer, header.precision, image)
    return cells.view(image.dtype).reshape(image.rows, image.columns, image.samples)


def _decode_plain(stream: bytes, syntax: str, image: Image) -> Cells:
    return native_cells(native_frame(stream, 0, image), image)


def _decode_deflated(stream: bytes, syntax: str, image: Image) -> Cells:
    frame = zlib.decompressobj(-zlib.MAX_WBITS).decompress(stream, -(-image.frame_bits // 8))
    return _decode_plain(frame, syntax, image)


def _decode_rle(stream: bytes, syntax: str, image: Image) -> Cells:
    """PS3.5 annex G: a header of 16 little endian words, then a segment for each byte of each sample, the most
    significant one first.
    """
    size = image.dtype.itemsize
    if image.bits_allocated < 8:
        raise NotTranscodable("no decoder for RLE of single bits")
    count, *offsets = struct.unpack_from("<16L", stream)
    if count != image.samples * size:
        raise NotTranscodable("its code stream and its attributes differ in rows, columns or samples")
    ends = [*offsets[1:count], len(stream)]
    plane = image.rows * image.columns
    planes = np.empty((image.rows, image.columns, image.samples, size), np.uint8)
    for index, (start, end) in enumerate(zip(offsets[:count], ends, strict=True)):
        segment = _unpack_bits(stream, start, end, plane)
        sample, byte = divmod(index, size)
        planes[:, :, sample, size - 1 - byte] = np.frombuffer(segment, np.uint8, plane).reshape(planes.shape[:2])
    return planes.view(image.dtype)[..., 0]


def _unpack_bits(stream: bytes, at: int, end: int, wanted: int) -> bytearray:
    """At least `wanted` bytes of a segment, and hardly more (PS3.5 section G.3.2). Raises IndexError, ValueError."""
    out = bytearray()
    while len(out) < wanted and at < end:
        count = stream[at]
        if count < 128:
            out += stream[at + 1 : at + 2 + count]
            at += 2 + count
        else:
            if count > 128:
                out += stream[at + 1 : at + 2] * (257 - count)
            at += 2 if count > 128 else 1
    if len(out) < wanted:
        raise ValueError
    return out


_DECODERS: dict[str, Callable[[bytes, str, Image], Cells]] = {
    "1.2.840.10008.1.2.1.98": _decode_plain,
    "1.2.840.10008.1.2.8.1": _decode_deflated,
    RLE_LOSSLESS: _decode_rle,
    **dict.fromkeys([f"1.2.840.10008.1.2.4.{number}" for number in (50, 51, 57, 70)], _decode_jpeg),
    **dict.fromkeys([f"1.2.840.10008.1.2.4.{number}" for number in (80, 81)], _decode_jpeg_ls),
    **dict.fromkeys([f"1.2.840.10008.1.2.4.{number}" for number in (90, 91, 201, 202, 203)], _decode_jpeg_2000),
}

DECODED = frozenset(_DECODERS)
"""The encapsulated transfer syntaxes that `decode` reads."""


# --- encoding ---------------------------------------------------------------------------------------------------------


def check_encodable(image: Image, syntax: str) -> None:
    """Raises NotTranscodable unless a decoded image like this may be in the syntax (PS3.5 tables 8.2.2-1, 8.2.3-1,
    8.2.4-1) and the encoder takes it.
    """
    if image.samples not in (1, 3) or image.photometric not in _PHOTOMETRICS[image.samples]:
        raise NotTranscodable("its photometric interpretation is not one of encapsulated images")
    if image.is_signed and (image.samples == 3 or image.photometric == "PALETTE COLOR"):
        raise NotTranscodable("signed colours are not allowed in the transfer syntax")
    allocated, stored_min, stored_max = _DEPTHS[syntax]
    if image.bits_allocated not in allocated or not stored_min <= image.bits_stored <= stored_max:
        raise NotTranscodable("its bits allocated and stored are not allowed in the transfer syntax")
    if image.photometric == "YBR_FULL" and image.bits_allocated != 8 and syntax != JPEG_2000_LOSSLESS:
        raise NotTranscodable("its bits allocated and stored are not allowed in the transfer syntax")
    if not image.bits_stored <= image.bits_allocated:
        raise NotTranscodable("Bits Stored is more than Bits Allocated")
    if syntax == JPEG_2000_LOSSLESS and min(image.rows, image.columns) < _JPEG_2000_SIDE_MIN:
        raise NotTranscodable("the encoder takes no image with fewer than 32 rows or columns")
    if syntax != RLE_LOSSLESS and image.high_bit != image.bits_stored - 1:
        raise NotTranscodable("High Bit is not Bits Stored less one")


_DEPTHS = {
    RLE_LOSSLESS: ((8, 16), 1, 16),
    JPEG_LS_LOSSLESS: ((8, 16), 2, 16),
    JPEG_2000_LOSSLESS: ((8, 16, 32), 1, 24),  # OpenJPEG takes 24 bits
}


_JPEG_2000_SIDE_MIN = 32  # pylibjpeg-openjpeg always asks for six resolutions.


def encode(cells: Cells, syntax: str, image: Image) -> bytes:
    """One code stream that decodes to exactly these cells of an image that is decoded and `check_encodable`.

    RLE keeps every bit. The others keep Bits Stored bits; when more are in use (overlays in unused bits, say), the
    image is refused with NotTranscodable rather than robbed of them.
    """
    encoder = {RLE_LOSSLESS: _encode_rle, JPEG_LS_LOSSLESS: _encode_jpeg_ls, JPEG_2000_LOSSLESS: _encode_jpeg_2000}
    stream = encoder[syntax](cells, image)
    if not np.array_equal(decode(stream, syntax, image.encoded_in(syntax)), cells):
        raise NotTranscodable("the encoder would change pixel values")
    return stream


def _narrowed(cells: Cells, image: Image) -> bytes:
    """The cells in the smallest integers for Bits Stored, with nothing above it but the sign."""
    unused = 8 * cells.dtype.itemsize - image.bits_stored
    if not np.array_equal(cells << unused >> unused, cells):
        raise NotTranscodable("bits above Bits Stored are in use, which the transfer syntax cannot keep")
    size = 1 if image.bits_stored <= 8 else 2 if image.bits_stored <= 16 else 4
    return cells.astype(f"<{cells.dtype.kind}{size}").tobytes()


def _encode_jpeg_2000(cells: Cells, image: Image) -> bytes:
    return bytes(
        encode_pixel_data(
            _narrowed(cells, image),
            rows=image.rows,
            columns=image.columns,
            samples_per_pixel=image.samples,
            bits_stored=image.bits_stored,
            pixel_representation=int(image.is_signed),
            photometric_interpretation=image.encoded_in(JPEG_2000_LOSSLESS).photometric,
        )
    )


def _encode_jpeg_ls(cells: Cells, image: Image) -> bytes:
    narrow = np.frombuffer(_narrowed(cells, image), np.uint8 if image.bits_stored <= 8 else "<u2")
    narrow = narrow & ((1 << image.bits_stored) - 1)  # JPEG-LS knows no sign.
    return bytes(
        jpeg_ls.encode_pixel_data(
            narrow.tobytes(),
            rows=image.rows,
            columns=image.columns,
            samples_per_pixel=image.samples,
            bits_stored=image.bits_stored,
            planar_configuration=0,
        )
    )


def _encode_rle(cells: Cells, image: Image) -> bytes:
    size = cells.dtype.itemsize
    planes = np.ascontiguousarray(cells).view(np.uint8).reshape(image.rows, image.columns, image.samples, size)
    segments = [
        _pack_bits(planes[:, :, sample, byte]) for sample in range(image.samples) for byte in reversed(range(size))
    ]
    offsets = [64]
    for segment in segments[:-1]:
        offsets.append(offsets[-1] + len(segment))
    return struct.pack("<16L", len(segments), *offsets, *[0] * (15 - len(offsets))) + b"".join(segments)


_RUN = re.compile(rb"(.)\1{2,127}", re.DOTALL)


def _pack_bits(plane: Cells) -> bytes:
    """One RLE segment of even length. Runs do not cross rows (PS3.5 section G.3.1)."""
    out = bytearray()
    for row in plane:
        line, at = row.tobytes(), 0
        for run in _RUN.finditer(line):
            start, end = run.span()
            if start > at:
                _add_literals(out, line[at:start])
            out.append(257 - end + start)
            out.append(line[start])
            at = end
        _add_literals(out, line[at:])
    return bytes(out + b"\0" * (len(out) % 2))


def _add_literals(out: bytearray, literals: bytes) -> None:
    for start in range(0, len(literals), 128):
        part = literals[start : start + 128]
        out.append(len(part) - 1)
        out += part
