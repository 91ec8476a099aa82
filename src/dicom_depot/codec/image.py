"""One image: what the Image Pixel module says of it, and its frames in native encoding. No code streams here."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dicom_depot.codec.layout import ByteRange, NativeFrames, shifted
from dicom_depot.domain.errors import NotTranscodable

Cells = np.ndarray[tuple[int, ...], np.dtype[Any]]
"""One frame as integers of the image's `dtype`: rows x columns x samples."""


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


def native_frame(value: bytes, index: int, image: Image) -> bytes:
    """The pixel cells of one frame of little endian native pixel data. Bits are moved to begin at a byte's start."""
    frames = NativeFrames(ByteRange(0, len(value)), image.frame_bits, image.frames)
    if index >= frames.available:
        raise NotTranscodable("the pixel data is shorter than its description")
    place, shift = frames.range_of(index + 1)
    content = value[place.offset : place.offset + place.length]
    if shift == 0 and frames.bits % 8 == 0:
        return content
    if image.bits_allocated != 1:
        raise NotTranscodable("frames do not begin at whole bytes")
    return shifted(content, shift, frames.bits)


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
