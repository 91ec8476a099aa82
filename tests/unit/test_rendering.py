"""From stored values to a picture: every step of the pipeline against the formulas of the standard, written out here
once more in plain Python; parameters, geometry, encoding, and what is refused.
"""

from __future__ import annotations

import io
import math
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.pixels.processing import apply_color_lut, convert_color_space

from dicom_depot.codec.colour import expanded
from dicom_depot.codec.media_types import JPEG, PNG, choose_rendered
from dicom_depot.codec.render_parameters import (
    DEFAULT_THUMBNAIL,
    SIDE_MAX,
    Region,
    Rendition,
    Viewport,
    Window,
    WindowFunction,
    parse_quality,
    parse_viewport,
    parse_window,
)
from dicom_depot.codec.rendering import fitted_size, render
from dicom_depot.codec.transcode import FrameNotFound, frames, transcode
from dicom_depot.domain.errors import InvalidRequest, NotAcceptable, NotTranscodable
from dicom_depot.services.transcoding import Transcoding
from dicom_depot.testing.samples import structured_report
from tests.support.pictures import BIG, DEFLATED, EXPLICIT, IMPLICIT, Array, encapsulated, instance, item, opened, shown

RLE, JPEG_LS, JPEG_2000 = "1.2.840.10008.1.2.5", "1.2.840.10008.1.2.4.80", "1.2.840.10008.1.2.4.90"
LINEAR, EXACT, SIGMOID = WindowFunction.LINEAR, WindowFunction.LINEAR_EXACT, WindowFunction.SIGMOID


def grey_of(share: float) -> int:
    return math.floor(min(max(share, 0.0), 1.0) * 255 + 0.5)


def by_the_standard(x: float, c: float, w: float, function: WindowFunction) -> int:
    """PS3.3 section C.11.2.1.2.1 and C.11.2.1.3, with ymin 0 and ymax 255, as the pseudo code stands there."""
    match function:
        case WindowFunction.LINEAR:
            if x <= c - 0.5 - (w - 1) / 2:
                return 0
            if x > c - 0.5 + (w - 1) / 2:
                return 255
            return grey_of((x - (c - 0.5)) / (w - 1) + 0.5)
        case WindowFunction.LINEAR_EXACT:
            if x <= c - w / 2:
                return 0
            if x > c + w / 2:
                return 255
            return grey_of((x - c) / w + 0.5)
        case WindowFunction.SIGMOID:
            try:
                return grey_of(1 / (1 + math.exp(-4 * (x - c) / w)))
            except OverflowError:
                return 0


def over_range(values: list[float]) -> list[int]:
    low, high = min(values), max(values)
    return [grey_of((value - low) / (high - low)) for value in values]


def row(values: list[int], dtype: str = "<i2") -> Array:
    return np.array([values], dtype)


# --- windows ----------------------------------------------------------------------------------------------------------

VALUES = [-32768, -1100, -1025, -1024, -1, 0, 1, 39, 40, 41, 239, 240, 241, 32767]


@settings(max_examples=150, deadline=None)
@given(
    values=st.lists(st.integers(-32768, 32767), min_size=1, max_size=30),
    center=st.one_of(st.integers(-2000, 2000), st.floats(-1e5, 1e5)),
    width=st.one_of(st.integers(1, 4000), st.floats(1, 1e5), st.floats(1e-3, 1)),
    function=st.sampled_from(WindowFunction),
    slope=st.sampled_from([1, 0.5, -2]),
    intercept=st.sampled_from([0, -1024, 0.25]),
)
def test_a_window_is_applied_as_the_standard_writes_it(
    values: list[int], center: float, width: float, function: WindowFunction, slope: float, intercept: float
) -> None:
    if function is LINEAR:
        width = max(width, 1)
    content = instance(row(values), RescaleSlope=str(slope), RescaleIntercept=str(intercept))
    got = shown(content, window=Window(center, width, function))[0].tolist()
    expected = [by_the_standard(value * slope + intercept, center, width, function) for value in values]
    assert all(abs(one - other) <= 1 for one, other in zip(got, expected, strict=True))
    assert sum(one != other for one, other in zip(got, expected, strict=True)) <= 1, "but for rounding, the same"


@pytest.mark.parametrize("function", WindowFunction)
def test_the_objects_first_window_is_used_with_its_function(function: WindowFunction) -> None:
    content = instance(row(VALUES), WindowCenter=["40", "9999"], WindowWidth=["400", "1"], VOILUTFunction=function)
    assert shown(content)[0].tolist() == [by_the_standard(value, 40, 400, function) for value in VALUES]


def test_a_window_asked_for_wins_over_the_objects_and_over_tables() -> None:
    lut = item(LUTDescriptor=[2, 0, 8], LUTData=b"\0\xff")
    content = instance(row(VALUES), WindowCenter="0", WindowWidth="10", VOILUTSequence=[lut])
    wanted = Window(100, 50, EXACT)
    assert shown(content, window=wanted)[0].tolist() == [by_the_standard(value, 100, 50, EXACT) for value in VALUES]


def test_a_linear_window_of_width_1_is_a_threshold() -> None:
    assert shown(instance(row([9, 10, 11])), window=Window(10.5, 1))[0].tolist() == [0, 0, 255]


@pytest.mark.parametrize(
    ("center", "width"), [("40", "0"), ("40", "-5"), ("", ""), ("x", "400"), ("nan", "400"), ("40", "inf"), ("40", "")]
)
def test_a_window_of_the_object_that_is_none_is_passed_over(center: str, width: str) -> None:
    data_set = pydicom.dcmread(io.BytesIO(instance(row([0, 100, 200]))))
    raw = b"".join(
        struct.pack("<HH2sH", 0x28, number, b"DS", len(text)) + text
        for number, text in (
            (0x1050, center.encode() + b" " * (len(center) % 2)),
            (0x1051, width.encode() + b" " * (len(width) % 2)),
        )
    )
    content = instance(row([0, 100, 200]))
    place = content.index(b"\xe0\x7f\x10\0")
    assert data_set.get("WindowCenter") is None
    assert shown(content[:place] + raw + content[place:])[0].tolist() == [0, 128, 255]


def test_a_window_narrower_than_1_that_calls_itself_linear_is_exact() -> None:
    cells = np.array([[0.0, 0.25, 0.5]], "<f4")
    content = instance(cells, pixels="FloatPixelData", WindowCenter="0.25", WindowWidth="0.5")
    assert shown(content)[0].tolist() == [0, 128, 255]


# --- stored values ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["u1", "i1", "<u2", "<i2", "<u4", "<i4", "<u8", "<i8"])
@pytest.mark.parametrize("syntax", [IMPLICIT, EXPLICIT, BIG, DEFLATED])
def test_integers_of_every_size_and_sign_are_read(dtype: str, syntax: str) -> None:
    low = -100 if dtype[-2] == "i" else 0
    values = [low, low + 1, 0, 17, 99]
    content = instance(row(values, dtype), syntax=syntax)
    assert shown(content)[0].tolist() == over_range(list(map(float, values)))


@pytest.mark.parametrize("is_signed", [False, True])
@pytest.mark.parametrize(("stored", "high_bit"), [(12, 11), (12, 15), (12, 13), (10, 9), (20, 19), (20, 30)])
def test_bits_around_the_stored_ones_do_not_matter(stored: int, high_bit: int, is_signed: bool) -> None:
    allocated = 16 if high_bit < 16 else 32
    values = [-(1 << stored - 1), -1, 0, 1, (1 << stored - 1) - 1] if is_signed else [0, 1, 77, (1 << stored) - 1]
    shift = high_bit + 1 - stored
    junk = ~(((1 << stored) - 1) << shift) & ((1 << allocated) - 1)
    cells = [((value & ((1 << stored) - 1)) << shift) | junk for value in values]
    content = instance(
        np.array([cells], f"<u{allocated // 8}"), stored=stored, HighBit=high_bit, PixelRepresentation=int(is_signed)
    )
    assert shown(content)[0].tolist() == over_range(list(map(float, values)))


@pytest.mark.parametrize("high_bit", [0, 3, 40])
def test_a_high_bit_that_cannot_be_meant_is_passed_over(high_bit: int) -> None:
    assert shown(instance(row([0, 50, 100], "<u2"), stored=12, HighBit=high_bit))[0].tolist() == [0, 128, 255]


def test_single_bits_are_black_and_white_and_frames_need_not_begin_at_bytes() -> None:
    bits = np.arange(3 * 5 * 5).reshape(3, 5, 5) % 3 == 0
    value = np.packbits(bits.ravel(), bitorder="little").tobytes()
    content = instance(np.zeros((3, 5, 5), "u1"), frames=3, BitsAllocated=1, BitsStored=1, HighBit=0, PixelData=value)
    for number in (1, 2, 3):
        assert np.array_equal(shown(content, number), bits[number - 1] * 255)


@pytest.mark.parametrize("value", [0, 1])
def test_an_empty_mask_is_black_and_a_full_one_white(value: int) -> None:
    content = instance(
        np.zeros((1, 8, 8), "u1"), BitsAllocated=1, BitsStored=1, HighBit=0, PixelData=bytes([255 * value] * 8)
    )
    assert (shown(content) == 255 * value).all()


@pytest.mark.parametrize(("keyword", "dtype"), [("FloatPixelData", "<f4"), ("DoubleFloatPixelData", "<f8")])
@pytest.mark.parametrize("syntax", [EXPLICIT, BIG])
def test_floats_are_shown_and_what_is_no_number_is_black(keyword: str, dtype: str, syntax: str) -> None:
    cells = np.array([[-1.5, 0.0, 1.5, np.nan, np.inf, -np.inf]], dtype)
    assert shown(instance(cells, pixels=keyword, syntax=syntax))[0].tolist() == [0, 128, 255, 0, 255, 0]
    named: dict[str, Any] = {f"{keyword.removesuffix('Data')}PaddingValue": -9.0}
    padded = instance(np.array([[-9.0, 0.0, 1.0]], dtype), pixels=keyword, syntax=syntax, **named)
    assert shown(padded)[0].tolist() == [0, 0, 255]


def test_floats_of_one_value_are_shown() -> None:
    assert shown(instance(np.full((2, 2), 7.5, "<f4"), pixels="FloatPixelData")).tolist() == [[0, 0], [0, 0]]


# --- without a window -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limit", "expected"), [(None, [0, 0, 0, 128, 255]), (-1900, [0, 0, 0, 128, 255]), (-2100, [0, 0, 0, 128, 255])]
)
def test_padding_is_no_part_of_the_range(limit: int | None, expected: list[int]) -> None:
    values = [-2000, -1950 if limit == -1900 else -2000, -100, 0, 100]
    attributes: dict[str, Any] = {"PixelPaddingValue": -2000}
    if limit is not None:
        attributes["PixelPaddingRangeLimit"] = limit
    assert shown(instance(row(values), **attributes))[0].tolist() == expected


def test_padding_written_as_unsigned_is_understood() -> None:
    data_set = pydicom.dcmread(io.BytesIO(instance(row([-2000, 0, 100]))))
    data_set.add_new(0x00280120, "US", 65536 - 2000)
    buffer = io.BytesIO()
    data_set.save_as(buffer)
    assert shown(buffer.getvalue())[0].tolist() == [0, 0, 255]


def test_what_consists_of_padding_and_one_value_is_still_told_apart() -> None:
    assert shown(instance(row([0, 9], "u1"), PixelPaddingValue=0))[0].tolist() == [0, 255]
    assert shown(instance(row([0, 9], "<u4"), PixelPaddingValue=0))[0].tolist() == [0, 255]
    assert shown(instance(row([5, 5], "u1"), PixelPaddingValue=5))[0].tolist() == [5, 5]


def test_one_value_is_shown_at_its_place_among_all() -> None:
    assert shown(instance(row([2048, 2048], "<u2"), stored=12))[0].tolist() == [128, 128]
    assert shown(instance(row([0, 0], "<i2")))[0].tolist() == [128, 128]


def test_the_range_is_the_frames_own() -> None:
    cells = np.array([[[0, 10]], [[100, 300]]], "<u2")
    content = instance(cells, frames=2)
    assert shown(content, 1)[0].tolist() == shown(content, 2)[0].tolist() == [0, 255]


# --- tables -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("syntax", [IMPLICIT, EXPLICIT, BIG])
def test_a_modality_table_is_applied_and_ends_go_on(syntax: str) -> None:
    order = ">" if syntax == BIG else "<"
    lut = item(
        LUTDescriptor=[4, 10, 16], ModalityLUTType="US", LUTData=np.array([100, 300, 200, 400], f"{order}u2").tobytes()
    )
    lut["LUTData"].VR = "OW"
    content = instance(row([0, 10, 11, 12, 13, 99], "<u2"), ModalityLUTSequence=[lut], syntax=syntax)
    assert shown(content)[0].tolist() == over_range([100, 100, 300, 200, 400, 400])


@pytest.mark.parametrize(
    ("bits", "data"), [(8, bytes([0, 10, 200, 255])), (12, np.array([0, 160, 3212, 4095], "<u2").tobytes())]
)
def test_a_voi_table_is_applied_in_its_own_bits(bits: int, data: bytes) -> None:
    lut = item(LUTDescriptor=[4, -2, bits], LUTData=data)
    lut["LUTDescriptor"].VR, lut["LUTData"].VR = "SS", "OW"
    content = instance(row([-50, -2, -1, 0, 1, 50]), VOILUTSequence=[lut])
    assert shown(content)[0].tolist() == [0, 0, 10, 200, 255, 255]


def test_a_table_of_65536_entries_says_0() -> None:
    entries = np.arange(65536, dtype="<u2")
    lut = item(LUTDescriptor=[0, 0, 16], LUTData=entries.tobytes())
    lut["LUTData"].VR = "OW"
    assert shown(instance(row([0, 32768, 65535], "<u2"), VOILUTSequence=[lut]))[0].tolist() == [0, 128, 255]


def test_a_table_that_is_none_is_passed_over() -> None:
    for lut in (item(), item(LUTDescriptor=[0, 0, 16]), item(LUTDescriptor=[4, 0], LUTData=b"\0\0")):
        assert shown(instance(row([0, 1]), VOILUTSequence=[lut], ModalityLUTSequence=[lut]))[0].tolist() == [0, 255]


# --- functional groups ------------------------------------------------------------------------------------------------


def groups(center: int, slope: float | None = None) -> Any:
    group = item(FrameVOILUTSequence=[item(WindowCenter=center, WindowWidth=100)])
    if slope is not None:
        group.PixelValueTransformationSequence = [item(RescaleSlope=slope, RescaleIntercept=0)]
    return group


@pytest.mark.parametrize("syntax", [IMPLICIT, EXPLICIT, BIG, DEFLATED])
def test_functional_groups_of_the_frame_win_over_shared_ones_and_those_over_the_data_set(syntax: str) -> None:
    cells = np.array([[[40, 60]], [[140, 160]], [[240, 260]]], "<u2")
    content = instance(
        cells,
        frames=3,
        syntax=syntax,
        WindowCenter=9999,
        WindowWidth=1,
        SharedFunctionalGroupsSequence=[groups(250, 1)],
        PerFrameFunctionalGroupsSequence=[groups(50), groups(300, 2), item()],
    )
    expected = [by_the_standard(value, 50, 100, LINEAR) for value in (40, 60)]
    assert shown(content, 1)[0].tolist() == expected
    assert shown(content, 2)[0].tolist() == [by_the_standard(value, 300, 100, LINEAR) for value in (280, 320)]
    assert shown(content, 3)[0].tolist() == [by_the_standard(value, 250, 100, LINEAR) for value in (240, 260)]


def test_a_sequence_that_leads_out_of_the_file_is_refused() -> None:
    content = instance(row([0, 1]), SharedFunctionalGroupsSequence=[groups(0)])
    place = content.index(b"\x28\0\x32\x91SQ") + 8
    with pytest.raises(NotTranscodable):
        render(content[:place] + b"\xf0\xff\xff\x7f" + content[place + 4 :], 1, Rendition(PNG))


# --- presentation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("photometric", "shape", "expected"),
    [
        ("MONOCHROME2", None, [0, 128, 255]),
        ("MONOCHROME2", "IDENTITY", [0, 128, 255]),
        ("MONOCHROME2", "INVERSE", [255, 128, 0]),
        ("MONOCHROME1", None, [255, 128, 0]),
        ("MONOCHROME1", "INVERSE", [255, 128, 0]),
        ("MONOCHROME1", "IDENTITY", [255, 128, 0]),
    ],
)
@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
def test_what_is_inverted_is_inverted_once(
    photometric: str, shape: str | None, expected: list[int], dtype: str
) -> None:
    attributes: dict[str, Any] = {} if shape is None else {"PresentationLUTShape": shape}
    got = shown(instance(row([0, 100, 200], dtype), photometric=photometric, **attributes))[0].tolist()
    assert all(abs(one - other) <= 1 for one, other in zip(got, expected, strict=True))


# --- colour -----------------------------------------------------------------------------------------------------------

COLOURS = (np.arange(16 * 16 * 3, dtype=np.int64) * 37 % 256).astype("u1").reshape(16, 16, 3)


@pytest.mark.parametrize("planar", [0, 1])
@pytest.mark.parametrize("syntax", [IMPLICIT, EXPLICIT, BIG, DEFLATED])
def test_rgb_is_shown_as_it_is_by_pixel_and_by_plane(planar: int, syntax: str) -> None:
    assert np.array_equal(shown(instance(COLOURS, photometric="RGB", planar=planar, syntax=syntax)), COLOURS)


@pytest.mark.parametrize(("dtype", "stored", "factor"), [("<u2", 16, 257), ("<u2", 12, 16), ("<u4", 32, 1 << 24)])
def test_deep_colours_become_8_bits(dtype: str, stored: int, factor: int) -> None:
    got = shown(instance(COLOURS.astype(dtype) * factor, photometric="RGB", stored=stored))
    assert np.abs(got.astype(int) - COLOURS).max() <= 1


@pytest.mark.parametrize("planar", [0, 1])
def test_ybr_full_becomes_rgb_as_pydicom_makes_it(planar: int) -> None:
    got = shown(instance(COLOURS, photometric="YBR_FULL", planar=planar))
    assert np.abs(got.astype(int) - convert_color_space(COLOURS, "YBR_FULL", "RGB")).max() <= 1


def test_ybr_full_422_is_spread() -> None:
    pairs = COLOURS[:, ::2]
    full = np.repeat(pairs, 2, axis=1).copy()
    full[..., 0] = COLOURS[..., 0]
    packed = np.stack([full[:, ::2, 0], full[:, 1::2, 0], full[:, ::2, 1], full[:, ::2, 2]], -1).tobytes()
    got = shown(instance(COLOURS, photometric="YBR_FULL_422", PixelData=packed))
    assert np.abs(got.astype(int) - convert_color_space(full, "YBR_FULL", "RGB")).max() <= 1


INDEXES = np.arange(256, dtype="u1").reshape(16, 16)


def with_palette(cells: Array, tables: list[bytes], descriptor: list[int], **named: Any) -> bytes:
    attributes: dict[str, Any] = {}
    for colour, table in zip(("Red", "Green", "Blue"), tables, strict=True):
        attributes[f"{colour}PaletteColorLookupTableDescriptor"] = descriptor
        attributes[f"{colour}PaletteColorLookupTableData"] = table
    return instance(cells, photometric="PALETTE COLOR", **attributes, **named)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("count", [256, 200])
@pytest.mark.parametrize("first", [0, 20])
def test_a_palette_is_applied_as_pydicom_does(bits: int, count: int, first: int) -> None:
    entries = [(np.arange(count) * factor % 256) for factor in (1, 3, 7)]
    tables = [each.astype("u1").tobytes() if bits == 8 else (each * 256).astype("<u2").tobytes() for each in entries]
    content = with_palette(INDEXES, tables, [count, first, bits])
    expected = apply_color_lut(INDEXES, pydicom.dcmread(io.BytesIO(content)))
    assert np.array_equal(shown(content), expected >> (bits - 8))


def test_a_palette_in_big_endian() -> None:
    tables = [(np.arange(256) * factor % 256 * 256).astype(">u2").tobytes() for factor in (1, 3, 7)]
    content = with_palette(INDEXES, tables, [256, 0, 16], syntax=BIG)
    assert shown(content)[0, 5].tolist() == [5, 15, 35]


def test_a_palette_that_calls_8_bits_16_is_understood() -> None:
    tables = [(np.arange(256) * factor % 256).astype("<u2").tobytes() for factor in (1, 3, 7)]
    assert shown(with_palette(INDEXES, tables, [256, 0, 16]))[0, 5].tolist() == [5, 15, 35]


def test_a_segmented_palette_is_expanded_as_pydicom_does() -> None:
    segments = np.array([0, 2, 0, 100 << 8, 1, 100, 200 << 8, 0, 1, 7 << 8, 1, 153, 0], "<u2").tobytes()
    attributes: dict[str, Any] = {}
    for colour in ("Red", "Green", "Blue"):
        attributes[f"{colour}PaletteColorLookupTableDescriptor"] = [256, 0, 16]
        attributes[f"Segmented{colour}PaletteColorLookupTableData"] = segments
    content = instance(INDEXES, photometric="PALETTE COLOR", **attributes)
    expected = apply_color_lut(INDEXES, pydicom.dcmread(io.BytesIO(content)))
    assert np.abs(shown(content).astype(int) - (expected >> 8)).max() <= 1


def test_segments_repeat_others_and_never_more_than_there_should_be() -> None:
    discrete = [0, 2, 5, 9]
    assert expanded([*discrete, 1, 3, 12], 99, is_wide=True) == [5, 9, 10, 11, 12]
    assert expanded([*discrete, 2, 1, 0, 0], 99, is_wide=True) == [5, 9, 5, 9]
    assert expanded([*discrete, 2, 1, 0, 0, 0, 0], 99, is_wide=False) == [5, 9, 5, 9]
    assert expanded([0, 1, 1, 1, 1, 3, 2, 1, 6, 0, 0, 1, 8], 99, is_wide=True) == [1, 3, 3, 8], "offset 6: bytes"
    assert expanded([0, 1, 7, 1, 65535, 7], 4, is_wide=True) == [7, 7, 7, 7]
    for broken in ([1, 2, 3], [2, 1, 0, 0, 2, 1, 0, 0], [9, 1, 1], [0, 1, 5, 2, 65535, 6, 0]):
        with pytest.raises(NotTranscodable):
            expanded(broken, 99, is_wide=True)


@pytest.mark.parametrize("photometric", ["ARGB", "CMYK"])
def test_four_samples_are_refused(photometric: str) -> None:
    with pytest.raises(NotTranscodable, match="photometric interpretation"):
        shown(instance(np.zeros((4, 4, 4), "u1"), photometric=photometric))


@pytest.mark.parametrize("photometric", ["HSV", "YBR_PARTIAL_420", "ICTCP", "", "MONOCHROME2", "PALETTE COLOR"])
def test_other_kinds_of_three_samples_are_refused(photometric: str) -> None:
    with pytest.raises(NotTranscodable, match="photometric interpretation"):
        shown(instance(COLOURS, photometric="RGB", PhotometricInterpretation=photometric))


def test_a_palette_that_is_missing_or_broken_is_refused() -> None:
    with pytest.raises(NotTranscodable, match="palette"):
        shown(instance(INDEXES, photometric="PALETTE COLOR"))
    with pytest.raises(NotTranscodable, match="palette"):
        shown(with_palette(INDEXES, [b"", b"", b""], [256, 0, 8]))


# --- every transfer syntax --------------------------------------------------------------------------------------------

SQUARE = (np.arange(40 * 40) * 41 % 4096).astype("<u2").reshape(40, 40)
COLOUR_SQUARE = (np.arange(40 * 40 * 3) * 41 % 256).astype("u1").reshape(40, 40, 3)
KINDS = {
    "MONOCHROME1": instance(SQUARE, photometric="MONOCHROME1", stored=12),
    "MONOCHROME2": instance(SQUARE, stored=12),
    "MONOCHROME2 signed": instance((SQUARE.astype("i4") - 2000).astype("<i2")),
    "PALETTE COLOR": with_palette(
        COLOUR_SQUARE[..., 0], [bytes(range(256)), bytes(range(255, -1, -1)), bytes(256)], [256, 0, 8]
    ),
    "RGB": instance(COLOUR_SQUARE, photometric="RGB"),
    "RGB planes": instance(COLOUR_SQUARE, photometric="RGB", planar=1),
    "YBR_FULL": instance(COLOUR_SQUARE, photometric="YBR_FULL"),
}


@pytest.mark.parametrize("syntax", [IMPLICIT, DEFLATED, RLE, JPEG_LS, JPEG_2000])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_compressed_without_loss_looks_the_same(kind: str, syntax: str) -> None:
    assert np.array_equal(shown(transcode(KINDS[kind], syntax)), shown(KINDS[kind]))


def test_jpeg_looks_as_another_decoder_shows_it() -> None:
    smooth = np.stack([np.add.outer(np.arange(64), np.arange(64))] * 3, -1).astype("u1")
    smooth[..., 1] = 255 - smooth[..., 0]
    buffer = io.BytesIO()
    PIL.Image.fromarray(smooth).save(buffer, "JPEG", quality=90)
    content = encapsulated(
        instance(smooth, photometric="RGB"),
        "1.2.840.10008.1.2.4.50",
        buffer.getvalue(),
        PhotometricInterpretation="YBR_FULL_422",
    )
    by_pillow = np.asarray(PIL.Image.open(buffer)).astype(int)
    assert np.abs(shown(content).astype(int) - by_pillow).max() <= 3, (
        "decoders may differ by a rounding before and after"
    )


# --- parameters -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "window"),
    [
        ("40,400", Window(40, 400)),
        ("40,400,LINEAR", Window(40, 400)),
        ("40,400,linear", Window(40, 400)),
        (" 40 , 400 , linear-exact ", Window(40, 400, EXACT)),
        ("-1e2,.5,LINEAR_EXACT", Window(-100, 0.5, EXACT)),
        ("0,1.,sigmoid", Window(0, 1, SIGMOID)),
        ("+40,1", Window(40, 1)),
    ],
)
def test_windows_are_read(text: str, window: Window) -> None:
    assert parse_window(text) == window


@pytest.mark.parametrize(
    "text",
    [
        *("", "40", "40,", ",400", "40,400,", "40,400,CUBIC", "40,400,LINEAR,1", "a,b", "40;400", "٤٠,400"),
        *("40,0", "40,-1", "40,0.5", "40,0.999,LINEAR", "40,0,LINEAR_EXACT", "40,0,SIGMOID"),
        *("nan,400", "inf,400", "40,inf", "40,1e999", "1e999,40", "0x10,40", "1_0,40", "4" * 65 + ",40"),
    ],
)
def test_other_windows_are_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match="window is center,width,function") as refused:
        parse_window(text)
    assert refused.value.target == "window"


@pytest.mark.parametrize(
    ("text", "viewport"),
    [
        ("64,32", Viewport(64, 32)),
        (f"1,{SIDE_MAX}", Viewport(1, SIDE_MAX)),
        ("64,32,1,2,3,4", Viewport(64, 32, Region(1, 2, 3, 4))),
        ("512,512,,,512,512", Viewport(512, 512, Region(0, 0, 512, 512))),
        ("64,32,1.5,,,-4", Viewport(64, 32, Region(1.5, 0, None, 4), flips_vertically=True)),
        ("64,32,-1,-2,-3,", Viewport(64, 32, Region(1, 2, 3, None), flips_horizontally=True)),
        ("64,32,,,,", Viewport(64, 32)),
        ("64,32,7", Viewport(64, 32, Region(7))),
    ],
)
def test_viewports_are_read(text: str, viewport: Viewport) -> None:
    assert parse_viewport(text) == viewport


@pytest.mark.parametrize(
    "text",
    [
        *("", "64", "64,", ",64", "0,64", "64,0", "-64,64", "64.0,64", "a,b", f"{SIDE_MAX + 1},1", f"1,{SIDE_MAX + 1}"),
        *("64,64,0,0,0,1", "64,64,0,0,1,0", "64,64,a", "64,64,,,nan", "64,64,,,inf", "64,64,1,2,3,4,5", "٦٤,64"),
    ],
)
def test_other_viewports_are_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match="viewport is width,height") as refused:
        parse_viewport(text)
    assert refused.value.target == "viewport"


def test_a_thumbnails_viewport_has_no_region() -> None:
    assert parse_viewport("64,32", has_region=False) == Viewport(64, 32)
    for text in ("64,32,", "64,32,,,1,1", "64"):
        with pytest.raises(InvalidRequest, match="thumbnail") as refused:
            parse_viewport(text, has_region=False)
        assert refused.value.target == "viewport"


def test_qualities_are_read_and_others_refused() -> None:
    assert [parse_quality(text) for text in ("1", "100", "075")] == [1, 100, 75]
    for text in ("0", "101", "-1", "", "a", "1.5", "1e1", " 5", "٥", "9" * 30):
        with pytest.raises(InvalidRequest, match="to 100") as refused:
            parse_quality(text)
        assert refused.value.target == "quality"


@pytest.mark.parametrize(
    ("accept", "one", "several"),
    [
        ([], JPEG, JPEG),
        ([""], JPEG, JPEG),
        ([" , "], JPEG, JPEG),
        (["image/jpeg"], JPEG, JPEG),
        (["IMAGE/PNG"], PNG, PNG),
        (["image/png; q=0.1"], PNG, PNG),
        (["image/jpeg; transfer-syntax=1.2.840.10008.1.2.4.50"], JPEG, JPEG),
        (["*/*"], JPEG, JPEG),
        (["image/*"], JPEG, JPEG),
        (["application/jpeg"], None, None),
        (["image/gif"], None, None),
        (["image/jpeg; q=0"], None, None),
        (["jpeg"], None, None),
        (["multipart/related; type=image/jpeg"], None, None),
        (["image/jpeg, image/png"], None, JPEG),
        (["image/jpeg; q=0.5", "image/png"], None, PNG),
        (["image/avif,image/webp,image/png,image/svg+xml,image/*;q=0.8,*/*;q=0.5"], None, PNG),
        (["image/gif, image/webp"], None, None),
        (["image/jpeg, ,"], JPEG, JPEG),
    ],
)
def test_accept_chooses_jpeg_or_png(accept: list[str], one: str | None, several: str | None) -> None:
    for takes_several, expected in ((False, one), (True, several)):
        if expected is not None:
            assert choose_rendered(accept, takes_several=takes_several) == expected
            continue
        with pytest.raises(NotAcceptable, match=r"image/jpeg .*image/png") as refused:
            choose_rendered(accept, takes_several=takes_several)
        assert refused.value.target == "Accept"


# --- geometry ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("width", "height", "viewport", "size"),
    [
        (100, 50, Viewport(200, 200), (200, 100)),
        (50, 100, Viewport(200, 200), (100, 200)),
        (100, 50, Viewport(10, 10), (10, 5)),
        (1000, 1, Viewport(10, 10), (10, 1)),
        (0.001, 0.001, Viewport(7, 9), (7, 7)),
        (60000, 3, Viewport(SIDE_MAX, SIDE_MAX), (SIDE_MAX, 1)),
        (50, 40, DEFAULT_THUMBNAIL, (50, 40)),
        (512, 256, DEFAULT_THUMBNAIL, (128, 64)),
    ],
)
def test_sizes_fit(width: float, height: float, viewport: Viewport, size: tuple[int, int]) -> None:
    assert fitted_size(width, height, viewport) == size


@given(
    width=st.integers(1, 70000),
    height=st.integers(1, 70000),
    wide=st.integers(1, SIDE_MAX),
    high=st.integers(1, SIDE_MAX),
)
def test_a_scaled_picture_fills_the_viewport_and_keeps_its_proportions(
    width: int, height: int, wide: int, high: int
) -> None:
    got = fitted_size(width, height, Viewport(wide, high))
    assert got[0] == wide or got[1] == high
    assert got[0] <= wide
    assert got[1] <= high
    scale = min(wide / width, high / height)
    assert abs(got[0] - width * scale) < 1
    assert abs(got[1] - height * scale) < 1


GRADIENT = np.add.outer(np.arange(0, 200, 10), np.arange(0, 40, 2)).astype("u1")  # 20 x 20


def test_without_a_viewport_it_is_pixel_for_pixel() -> None:
    assert shown(instance(GRADIENT, PixelSpacing=["2", "1"])).shape == (20, 20)


def test_a_region_is_cut_out_and_flipped() -> None:
    plain = shown(instance(GRADIENT))
    region = shown(instance(GRADIENT), viewport=parse_viewport("5,5,10,2,5,5"))
    assert np.array_equal(region, plain[2:7, 10:15])
    for text, expected in (
        ("5,5,10,2,-5,5", plain[2:7, 10:15][:, ::-1]),
        ("5,5,10,2,5,-5", plain[2:7, 10:15][::-1]),
        ("5,5,10,2,-5,-5", plain[2:7, 10:15][::-1, ::-1]),
        ("20,20,,,-20", plain[:, ::-1]),
        ("10,10,10,10", plain[10:, 10:]),
    ):
        assert np.array_equal(shown(instance(GRADIENT), viewport=parse_viewport(text)), expected), text


@pytest.mark.parametrize("text", ["5,5,20", "5,5,,20", "5,5,10,,11", "5,5,,,20.1", "5,5,,,,-21", "5,5,999999"])
def test_a_region_outside_is_refused_with_the_pictures_size(text: str) -> None:
    with pytest.raises(InvalidRequest, match="20 columns and 20 rows") as refused:
        shown(instance(GRADIENT), viewport=parse_viewport(text))
    assert refused.value.target == "viewport"


@pytest.mark.parametrize(
    ("attributes", "shape"),
    [
        ({"PixelAspectRatio": ["2", "1"]}, (100, 50)),
        ({"PixelSpacing": ["1", "2"]}, (50, 100)),
        ({"ImagerPixelSpacing": ["0.5", "0.25"]}, (100, 50)),
        ({"PixelSpacing": ["0", "2"]}, (100, 100)),
        ({"PixelSpacing": ["1", "1000"]}, (100, 100)),
        (
            {"SharedFunctionalGroupsSequence": [item(PixelMeasuresSequence=[item(PixelSpacing=["3", "6"])])]},
            (50, 100),
        ),
    ],
)
def test_a_scaled_picture_has_the_right_proportions(attributes: dict[str, Any], shape: tuple[int, int]) -> None:
    assert shown(instance(GRADIENT, **attributes), viewport=Viewport(100, 100)).shape == shape


def test_scaling_down_averages() -> None:
    stripes = np.tile(np.array([0, 255], "u1"), (64, 32))
    small = shown(instance(stripes), viewport=Viewport(16, 16))
    assert np.abs(small[2:-2, 2:-2].astype(int) - 128).max() < 16, "single columns may not be picked"


# --- encoding ---------------------------------------------------------------------------------------------------------


def test_quality_decides_about_size_and_loss() -> None:
    content = instance(COLOUR_SQUARE, photometric="RGB")
    found = {quality: render(content, 1, Rendition(JPEG, quality)) for quality in (1, 30, 75, 100)}
    sizes = [len(each) for each in found.values()]
    assert sizes == sorted(set(sizes))
    losses = [np.abs(np.asarray(opened(each)).astype(int) - COLOUR_SQUARE).mean() for each in found.values()]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 2
    assert render(content, 1, Rendition(PNG, 1)) == render(content, 1, Rendition(PNG, 100))


def test_jpeg_keeps_colours_of_single_pixels_and_grey_stays_grey() -> None:
    checks = np.zeros((16, 16, 3), "u1")
    checks[::2, ::2], checks[1::2, 1::2] = (255, 0, 0), (0, 0, 255)
    picture = opened(render(instance(checks, photometric="RGB"), 1, Rendition(JPEG)))
    assert (picture.mode, picture.size) == ("RGB", (16, 16))
    assert np.abs(np.asarray(picture).astype(int) - checks).max() < 20
    assert opened(render(instance(SQUARE), 1, Rendition(JPEG))).mode == "L"


def test_more_columns_than_jpeg_holds_are_refused_and_png_takes_them() -> None:
    content = instance(np.zeros((1, 65501), "u1"))
    with pytest.raises(NotTranscodable, match="image/png or a viewport"):
        render(content, 1, Rendition(JPEG))
    assert shown(content).shape == (1, 65501)
    assert opened(render(content, 1, Rendition(JPEG, viewport=Viewport(100, 100)))).size == (100, 1)


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_frames_that_are_not_there_are_not_found() -> None:
    for content, number in ((instance(SQUARE), 2), (instance(SQUARE), 0), (structured_report().content, 1)):
        with pytest.raises(FrameNotFound) as missing:
            render(content, number, Rendition(PNG))
        assert missing.value.target == "frames"


def test_too_many_pixels_are_refused_before_they_are_decoded() -> None:
    stream = frames(transcode(instance(SQUARE), JPEG_LS), [1], JPEG_LS)[0]
    huge = encapsulated(instance(SQUARE), JPEG_LS, stream, Rows=60000, Columns=60000)
    with pytest.raises(NotTranscodable, match="larger than the limit"):
        render(huge, 1, Rendition(PNG))


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_whatever_the_bytes_are_there_is_a_picture_or_a_reason(data: st.DataObject) -> None:
    content = bytearray(data.draw(st.sampled_from(MUTABLE)))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(132, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        picture = render(bytes(content), 1, Rendition(PNG), bytes_max=1 << 22)
    except (NotTranscodable, FrameNotFound):
        return
    opened(picture)


MUTABLE = [
    instance(row([1, 2, 3]), WindowCenter="1", WindowWidth="2", SharedFunctionalGroupsSequence=[groups(1, 2)]),
    with_palette(INDEXES, [bytes(256)] * 3, [256, 0, 8]),
    instance(row([1, 2]), VOILUTSequence=[item(LUTDescriptor=[2, 0, 8], LUTData=b"\0\xff")]),
    instance(COLOURS, photometric="YBR_FULL"),
]


# --- processes --------------------------------------------------------------------------------------------------------


@pytest.fixture
def transcoding() -> Iterator[Transcoding]:
    running = Transcoding()
    yield running
    running.close()


def test_rendering_runs_in_a_process_of_its_own(transcoding: Transcoding) -> None:
    picture = transcoding.render(instance(SQUARE), 1, Rendition(PNG))
    assert picture == render(instance(SQUARE), 1, Rendition(PNG))
    with pytest.raises(FrameNotFound):
        transcoding.render(instance(SQUARE), 2, Rendition(PNG))
    with pytest.raises(InvalidRequest, match="40 columns") as refused:
        transcoding.render(instance(SQUARE), 1, Rendition(PNG, viewport=Viewport(9, 9, Region(99))))
    assert refused.value.target == "viewport"
    assert len(_children()) == 1


def test_a_process_that_dies_is_a_reason(transcoding: Transcoding) -> None:
    large = instance(np.random.default_rng(1).integers(0, 65535, (6000, 4000), "<u2"))
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(transcoding.render, large, 1, Rendition(PNG))
        while not _children():
            time.sleep(0.01)
        time.sleep(0.5)
        [victim] = _children()
        os.kill(victim, signal.SIGKILL)
        with pytest.raises(NotTranscodable):
            running.result(timeout=30)
    assert transcoding.render(instance(SQUARE), 1, Rendition(PNG)), "the next one has another process"


def _children() -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            is_child = int((path / "stat").read_text().rpartition(")")[2].split()[1]) == os.getpid()
            if is_child and b"transcode_process" in (path / "cmdline").read_bytes():
                found.append(int(path.name))
        except OSError:
            continue
    return found


_MEASURED = """
import re, sys
from pathlib import Path
from dicom_depot.codec.rendering import render
from dicom_depot.codec.render_parameters import Rendition, Viewport
def peak():  # Unlike ru_maxrss, this begins anew with the program.
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
content = Path(sys.argv[1]).read_bytes()
before = peak()
picture = render(content, 1, Rendition(sys.argv[2], viewport=Viewport(512, 512) if sys.argv[3] == "small" else None))
print(peak() - before)
"""


@pytest.mark.parametrize(
    ("kind", "media_type", "size", "times_max"),
    [
        ("grey", JPEG, "full", 3.0),
        ("grey", JPEG, "small", 3.0),
        ("wide", JPEG, "small", 2.5),
        ("rgb", JPEG, "full", 3.3),
    ],
)
def test_memory_stays_within_a_few_times_the_frame(
    tmp_path: Path, kind: str, media_type: str, size: str, times_max: float
) -> None:
    side = 3000
    cells = np.add.outer(np.arange(side), np.arange(side))
    match kind:
        case "grey":
            content = transcode(instance((cells % 4096).astype("<u2"), stored=12), JPEG_LS)
            frame_bytes = side * side * 2
        case "wide":
            content, frame_bytes = instance(cells.astype("<u4")), side * side * 4
        case _:
            content = transcode(instance(np.stack([cells % 256] * 3, -1).astype("u1"), photometric="YBR_FULL"), JPEG_LS)
            frame_bytes = side * side * 3
    path = tmp_path / "large.dcm"
    path.write_bytes(content)
    done = subprocess.run(
        [sys.executable, "-c", _MEASURED, str(path), media_type, size], capture_output=True, text=True, check=True
    )
    peak_kib = int(done.stdout)
    print(f"{kind} {size}: {peak_kib * 1024 / frame_bytes:.1f} times the frame of {frame_bytes >> 20} MiB")
    assert peak_kib * 1024 < times_max * frame_bytes
