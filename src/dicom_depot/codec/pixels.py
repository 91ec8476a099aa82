"""Pixels: from encapsulated code streams to pixel cells and back, without loss. No data sets here, no I/O, no logs.

Each library is called by itself. pydicom's decoders would try every plugin in turn, warn and log with values in the
text, and silence them only for the whole process: `warnings.catch_warnings` is not safe in threads.

| transfer syntax | decoded by | encoded by |
|---|---|---|
| JPEG baseline, extended, lossless | gdcm: the one decoder with a licence like ours | |
| JPEG-LS | CharLS (pyjpegls) | CharLS |
| JPEG 2000, high throughput too | OpenJPEG (pylibjpeg-openjpeg) | OpenJPEG |
| RLE | `codec.rle` | `codec.rle` |
| deflated image frames, encapsulated uncompressed | this module | |

Colours are never converted, for that loses values: JPEG's components leave as they are, up to the full grid
(YBR_FULL_422 becomes YBR_FULL). Only JPEG 2000's own transforms are undone by its decoder (YBR_RCT, YBR_ICT: RGB).

The C libraries trust their input. What a code stream says of its size, components and precision is compared with the
data set before it is decoded, which bounds the memory too. What was encoded is decoded again and compared: a code
stream that does not give the same values never leaves.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Callable
from dataclasses import replace

import gdcm  # type: ignore[import-untyped]  # gdcm has no types
import jpeg_ls  # type: ignore[import-untyped]  # nor has pyjpegls
import numpy as np
from openjpeg.utils import decode_pixel_data, encode_pixel_data

from dicom_depot.codec.image import Cells, Image, native_cells, native_frame
from dicom_depot.codec.rle import decode_rle, encode_rle
from dicom_depot.codec.stream_headers import StreamHeader, jpeg_2000_header, jpeg_header
from dicom_depot.domain.errors import NotTranscodable

RLE_LOSSLESS = "1.2.840.10008.1.2.5"
JPEG_LS_LOSSLESS = "1.2.840.10008.1.2.4.80"
JPEG_2000_LOSSLESS = "1.2.840.10008.1.2.4.90"

ENCODED = frozenset({RLE_LOSSLESS, JPEG_LS_LOSSLESS, JPEG_2000_LOSSLESS})
"""The encapsulated transfer syntaxes that `encode` makes."""

# The libraries' own logs tell what code streams hold, and come for every image.
for _name in ("openjpeg", "jpeg_ls"):
    logging.getLogger(_name).setLevel(logging.CRITICAL)
gdcm.Trace.DebugOff()
gdcm.Trace.WarningOff()
gdcm.Trace.ErrorOff()


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
    header = jpeg_header(stream)
    if header.component_ids in (b"RGB", b"rgb"):
        return replace(image, photometric="RGB")
    if (header.is_jfif or header.is_adobe_ybr) and not image.photometric.startswith("YBR"):
        return replace(image, photometric="YBR_FULL")
    return image


def _check(header: StreamHeader, image: Image) -> None:
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
    header = jpeg_2000_header(stream)
    _check(header, image)
    buffer = decode_pixel_data(stream, version=2)
    return _widened(buffer, header.precision, image).reshape(image.rows, image.columns, image.samples)


def _decode_jpeg_ls(stream: bytes, syntax: str, image: Image) -> Cells:
    header = jpeg_header(stream)
    _check(header, image)
    if not stream.rstrip(b"\0").endswith(b"\xff\xd9"):
        raise ValueError  # CharLS takes minutes for streams that are cut off.
    buffer, info = jpeg_ls.decode_pixel_data(stream)
    cells = _widened(buffer, header.precision, image)
    if image.samples > 1 and info["interleave_mode"] == 0:
        return cells.reshape(image.samples, image.rows, image.columns).transpose(1, 2, 0)
    return cells.reshape(image.rows, image.columns, image.samples)


def _decode_jpeg(stream: bytes, syntax: str, image: Image) -> Cells:
    header = jpeg_header(stream)
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
    return decode_rle(stream, image)


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


def encoded_image(image: Image, syntax: str) -> Image:
    """The image as `encode` leaves it, this one being decoded (PS3.5 sections 8.2.2 to 8.2.4)."""
    if image.samples == 1:
        return image
    photometric = image.photometric
    if syntax == JPEG_2000_LOSSLESS and photometric == "RGB":
        photometric = "YBR_RCT"  # The reversible transform, exact in integers; it makes colours much smaller.
    return replace(image, photometric=photometric, planar=1 if syntax == RLE_LOSSLESS else 0)


def encode(cells: Cells, syntax: str, image: Image) -> bytes:
    """One code stream that decodes to exactly these cells of an image that is decoded and `check_encodable`.

    RLE keeps every bit. The others keep Bits Stored bits; when more are in use (overlays in unused bits, say), the
    image is refused with NotTranscodable rather than robbed of them.
    """
    encoder = {RLE_LOSSLESS: encode_rle, JPEG_LS_LOSSLESS: _encode_jpeg_ls, JPEG_2000_LOSSLESS: _encode_jpeg_2000}
    stream = encoder[syntax](cells, image)
    if not np.array_equal(decode(stream, syntax, encoded_image(image, syntax)), cells):
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
            photometric_interpretation=encoded_image(image, JPEG_2000_LOSSLESS).photometric,
        )
    )


def _encode_jpeg_ls(cells: Cells, image: Image) -> bytes:
    narrow = np.frombuffer(_narrowed(cells, image), np.uint8 if image.bits_stored <= 8 else "<u2")
    narrow = narrow & ((1 << image.bits_stored) - 1)  # JPEG-LS knows no sign.
    try:
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
    except RuntimeError:  # the room that it gives itself does not hold the headers of a tiny image
        raise NotTranscodable("the encoder takes no image as small as this") from None
