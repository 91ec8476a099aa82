"""Greyscale: from stored values to 8 bits, through modality LUT, VOI LUT and presentation (PS3.4 section N.2.1).

`Pipeline` computes it for any values. Where stored values have up to 16 bits it does so once for each value that there
can be, and the pixels are looked up; strips of rows keep the memory at the frame's size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from dicom_depot.codec.attributes import Attributes, FrameAttributes
from dicom_depot.codec.image import Cells, Image
from dicom_depot.codec.render_parameters import Window, WindowFunction

Values = np.ndarray[Any, np.dtype[np.float64]]
Bytes = np.ndarray[Any, np.dtype[np.uint8]]

STRIP_CELLS = 1 << 20
TABLE_BITS_MAX = 16

_INTERCEPT, _SLOPE = 0x00281052, 0x00281053
_CENTER, _WIDTH, _FUNCTION = 0x00281050, 0x00281051, 0x00281056
_MODALITY_LUT, _VOI_LUT = 0x00283000, 0x00283010
_DESCRIPTOR, _DATA = 0x00283002, 0x00283006
_SHAPE = 0x20500020
_PADDING, _PADDING_LIMIT = 0x00280120, 0x00280121
_FLOAT_PADDINGS = {4: (0x00280122, 0x00280124), 8: (0x00280123, 0x00280125)}
_FRAME_VOI_LUT, _PIXEL_VALUE_TRANSFORMATION = 0x00289132, 0x00289145


def grey(cells: Cells, image: Image, attributes: FrameAttributes, window: Window | None) -> Bytes:
    """A monochrome frame as rows x columns of 8 bits. `cells` are integers, or floats as they stand in float pixel
    data; `window` takes the place of what the object says.
    """
    frame = cells.reshape(image.rows, image.columns)
    padding = _padding(frame, image, attributes.data_set)
    modality = _modality(attributes)
    voi = _voi(attributes, window)
    if frame.dtype.kind != "f" and bits_of(image) <= TABLE_BITS_MAX:
        possible = modality.apply(possible_values(image).astype(np.float64))
        if voi is None:
            voi = _range_of_codes(frame, image, possible, padding)
        table = _presented(voi.apply(possible), image, attributes)
        return looked_up(frame, image, table)
    shown = np.empty(frame.shape, np.uint8)
    voi = voi or _range_of_values(frame, image, modality, padding)
    for rows in strips(frame):
        values = modality.apply(_wide_values(frame[rows], image))
        shown[rows] = _presented(voi.apply(values), image, attributes)
    return shown


# --- stored values ----------------------------------------------------------------------------------------------------


def bits_of(image: Image) -> int:
    return max(1, min(image.bits_stored, image.bits_allocated))


def _shift(image: Image) -> int:
    """How far the stored bits stand from the lowest one; 0 where High Bit cannot be meant."""
    shift = image.high_bit + 1 - bits_of(image)
    return shift if shift >= 0 and image.high_bit < image.bits_allocated else 0


def strips(frame: np.ndarray[Any, Any]) -> Iterator[slice]:
    """The rows of a frame, some at a time."""
    step = max(1, STRIP_CELLS // max(1, frame[:1].size))
    for start in range(0, len(frame), step):
        yield slice(start, start + step)


def codes(cells: Cells, image: Image) -> Cells:
    """The stored bits of each cell as an unsigned number, whatever stands in the bits around them."""
    unsigned = cells.view(f"<u{cells.dtype.itemsize}")
    bits, shift = bits_of(image), _shift(image)
    if bits == 8 * cells.dtype.itemsize:
        return unsigned
    return (unsigned >> shift) & ((1 << bits) - 1)


def possible_values(image: Image) -> np.ndarray[Any, np.dtype[np.int64]]:
    """What each code stands for."""
    values = np.arange(1 << bits_of(image), dtype=np.int64)
    if image.is_signed and image.bits_allocated > 1:
        values[len(values) // 2 :] -= len(values)
    return values


def looked_up(frame: Cells, image: Image, table: np.ndarray[Any, np.dtype[np.uint8]]) -> Bytes:
    shown = np.empty((*frame.shape, *table.shape[1:]), np.uint8)
    for rows in strips(frame):
        np.take(table, codes(frame[rows], image), axis=0, out=shown[rows], mode="clip")
    return shown


def _wide_values(cells: Cells, image: Image) -> Values:
    """Stored values of more than 16 bits, and floats."""
    if cells.dtype.kind == "f":
        return cells.astype(np.float64)
    values = codes(cells, image)
    bits = bits_of(image)
    if not image.is_signed:
        return values.astype(np.float64)
    unused = 8 * cells.dtype.itemsize - bits
    return (np.left_shift(values, unused).view(f"<i{cells.dtype.itemsize}") >> unused).astype(np.float64)


# --- modality LUT -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Table:
    """A lookup table: values below the first that is mapped give the first entry, values above the last the last."""

    first: int
    entries: Values
    highest: int
    """The greatest output that its bits can have."""

    def apply(self, values: Values) -> Values:
        indexes = np.clip(np.floor(values) - self.first, 0, len(self.entries) - 1)
        found: Values = self.entries[np.nan_to_num(indexes).astype(np.intp)]
        return found


@dataclass(frozen=True, slots=True)
class _Rescale:
    slope: float = 1.0
    intercept: float = 0.0

    def apply(self, values: Values) -> Values:
        return values if (self.slope, self.intercept) == (1, 0) else values * self.slope + self.intercept


def read_table(attributes: Attributes | None) -> Table | None:
    """The LUT of an item (PS3.3 section C.11.1.1.1); None where it holds none."""
    descriptor = [] if attributes is None else attributes.integers(_DESCRIPTOR)
    if attributes is None or len(descriptor) < 3:
        return None
    count, first, bits = descriptor[0] % (1 << 16) or 1 << 16, descriptor[1], descriptor[2]
    entries = attributes.table(_DATA, count)
    if entries is None or not len(entries):
        return None
    highest = (1 << bits) - 1 if 1 <= bits <= 16 else int(entries.max())
    return Table(first, entries.astype(np.float64), max(highest, 1))


def _modality(attributes: FrameAttributes) -> Table | _Rescale:
    transformation = attributes.macro(_PIXEL_VALUE_TRANSFORMATION)
    slope, intercept = transformation.numbers(_SLOPE), transformation.numbers(_INTERCEPT)
    if not slope and not intercept:
        return read_table(attributes.data_set.item(_MODALITY_LUT)) or _Rescale()
    # A slope of 0 makes one value of all; it is a mistake wherever it stands.
    return _Rescale((slope or [1.0])[0] or 1.0, (intercept or [0.0])[0])


# --- VOI LUT ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Windowed:
    """PS3.3 sections C.11.2.1.2 and C.11.2.1.3, from 0 to 1."""

    window: Window

    def apply(self, values: Values) -> Values:
        center, width = self.window.center, self.window.width
        match self.window.function:
            case WindowFunction.LINEAR if width <= 1:
                return np.where(values > center - 0.5, 1.0, 0.0)
            case WindowFunction.LINEAR:
                return (values - (center - 0.5)) / (width - 1) + 0.5
            case WindowFunction.LINEAR_EXACT:
                return (values - center) / width + 0.5
            case WindowFunction.SIGMOID:
                exponent: Values = np.clip(-4 * ((values - center) / width), -700, 700)
                return 1 / (1 + np.exp(exponent))


@dataclass(frozen=True, slots=True)
class _Looked:
    table: Table

    def apply(self, values: Values) -> Values:
        return self.table.apply(values) / self.table.highest


@dataclass(frozen=True, slots=True)
class _Range:
    """From `lowest` to `highest`, both shown as they are: black and white."""

    lowest: float
    highest: float

    def apply(self, values: Values) -> Values:
        extent = self.highest - self.lowest
        return (values - self.lowest) / (extent if extent > 0 else 1.0)


_Voi = _Windowed | _Looked | _Range


def _voi(attributes: FrameAttributes, window: Window | None) -> _Voi | None:
    """None: nobody says what is of interest."""
    macro = attributes.macro(_FRAME_VOI_LUT)
    window = window or _window(macro)
    if window is not None:
        return _Windowed(window)
    table = read_table(attributes.data_set.item(_VOI_LUT))
    return None if table is None else _Looked(table)


def _window(attributes: Attributes) -> Window | None:
    """The first window of an object, as far as it is one."""
    centers, widths = attributes.numbers(_CENTER), attributes.numbers(_WIDTH)
    if not centers or not widths or widths[0] <= 0:
        return None
    text = attributes.text(_FUNCTION)
    function = WindowFunction(text) if text in WindowFunction.__members__ else WindowFunction.LINEAR
    if function is WindowFunction.LINEAR and widths[0] < 1:
        function = WindowFunction.LINEAR_EXACT  # Not allowed, but there are such: PET in SUV, floats.
    return Window(centers[0], widths[0], function)


@dataclass(frozen=True, slots=True)
class _Padding:
    """Stored values, both included, that are no part of the picture (PS3.3 section C.7.5.1.1.2)."""

    lowest: float
    highest: float

    def holds(self, values: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.bool_]]:
        return (values >= self.lowest) & (values <= self.highest)


def _padding(frame: Cells, image: Image, attributes: Attributes) -> _Padding | None:
    is_float = frame.dtype.kind == "f"
    tag, limit_tag = _FLOAT_PADDINGS[frame.dtype.itemsize] if is_float else (_PADDING, _PADDING_LIMIT)
    numbers = [*attributes.numbers(tag)[:1], *attributes.numbers(limit_tag)[:1]]
    if not numbers or not attributes.numbers(tag):
        return None
    if not is_float and image.is_signed:  # US where SS was meant
        numbers = [number - 65536 if number >= 32768 else number for number in numbers]
    return _Padding(min(numbers), max(numbers))


def _range_of_codes(frame: Cells, image: Image, possible: Values, padding: _Padding | None) -> _Range:
    present = np.zeros(len(possible), np.bool_)
    for rows in strips(frame):
        present[codes(frame[rows], image)] = True
    if padding is not None:
        unpadded = present & ~padding.holds(possible_values(image))
        if np.count_nonzero(unpadded) > 1:  # else nothing would be left to tell apart
            present = unpadded
    found = possible[present]
    lowest, highest = float(found.min()), float(found.max())
    if lowest == highest:  # Its place among all values says more than none.
        lowest, highest = float(possible.min()), float(possible.max())
    return _Range(lowest, highest)


def _range_of_values(frame: Cells, image: Image, modality: Table | _Rescale, padding: _Padding | None) -> _Range:
    unpadded, everything = _Extremes(), _Extremes()
    for rows in strips(frame):
        stored = _wide_values(frame[rows], image)
        stored = stored[np.isfinite(stored)]
        everything.add(modality.apply(stored))
        if padding is not None:
            unpadded.add(modality.apply(stored[~padding.holds(stored)]))
    found = unpadded if unpadded.lowest < unpadded.highest else everything
    return _Range(found.lowest, found.highest) if found.lowest <= found.highest else _Range(0, 0)


@dataclass(slots=True)
class _Extremes:
    lowest: float = np.inf
    highest: float = -np.inf

    def add(self, values: Values) -> None:
        if values.size:
            self.lowest = min(self.lowest, float(values.min()))
            self.highest = max(self.highest, float(values.max()))


# --- presentation -----------------------------------------------------------------------------------------------------


def _presented(shares: Values, image: Image, attributes: FrameAttributes) -> Bytes:
    """8 bits of what lies between 0 and 1. What is not a number is black."""
    shares = np.clip(np.nan_to_num(shares, nan=0.0), 0, 1)
    if image.photometric == "MONOCHROME1" or attributes.data_set.text(_SHAPE) == "INVERSE":
        shares = 1 - shares
    return np.floor(shares * 255 + 0.5).astype(np.uint8)
