"""Instances and frames in other transfer syntaxes: what changes, what does not, and what is refused."""

from __future__ import annotations

import base64
import io
import logging
import struct
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ParamSpec

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate, encapsulate_extended, generate_fragments, generate_frames
from pydicom.pixels.encoders.base import get_encoder
from pydicom.pixels.utils import pixel_array
from pydicom.sequence import Sequence
from pydicom.uid import UID

from dicom_depot.codec.transcode import OFFERED, FrameNotFound, can_decode, frames, transcode
from dicom_depot.domain.errors import NotFound, NotTranscodable
from dicom_depot.testing.samples import ct_volume, make_uid, multiframe, structured_report

IMPLICIT, EXPLICIT, BIG = "1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2"
DEFLATED, RLE = "1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.5"
JPEG_LS, JPEG_2000 = "1.2.840.10008.1.2.4.80", "1.2.840.10008.1.2.4.90"
NATIVE = (EXPLICIT, IMPLICIT, DEFLATED)
ENCAPSULATED = (RLE, JPEG_LS, JPEG_2000)
ALL = (*NATIVE, *ENCAPSULATED)
SIDE = 40
Arguments = ParamSpec("Arguments")


def read(content: bytes) -> Dataset:
    return pydicom.dcmread(io.BytesIO(content))


def pixels(content: bytes) -> np.ndarray[Any, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pixel_array(read(content), raw=True)


def written(data_set: Dataset, syntax: str = EXPLICIT) -> bytes:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = data_set.SOPClassUID, data_set.SOPInstanceUID
    meta.TransferSyntaxUID = UID(syntax)
    meta.FileMetaInformationVersion, meta.ImplementationClassUID = b"\0\1", UID(make_uid("implementation"))
    meta.FileMetaInformationGroupLength = 0
    data_set.file_meta, data_set.preamble = meta, bytes(128)
    buffer = io.BytesIO()
    is_implicit, is_little = syntax == IMPLICIT, syntax != BIG
    pydicom.dcmwrite(buffer, data_set, implicit_vr=is_implicit, little_endian=is_little, force_encoding=True)
    return buffer.getvalue()


def image(
    cells: np.ndarray[Any, Any],
    *,
    photometric: str = "MONOCHROME2",
    samples: int = 1,
    frame_count: int = 1,
    stored: int | None = None,
    planar: int = 0,
    syntax: str = EXPLICIT,
    **attributes: object,
) -> bytes:
    """An instance with these cells, of the shape (frames x) rows x columns (x samples)."""
    bits = cells.dtype.itemsize * 8
    data_set = Dataset()
    data_set.SOPClassUID, data_set.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.7", make_uid("transcode")
    data_set.SamplesPerPixel, data_set.PhotometricInterpretation = samples, photometric
    data_set.Rows, data_set.Columns = cells.shape[-2:] if samples == 1 else cells.shape[-3:-1]
    if samples > 1:
        data_set.PlanarConfiguration = planar
        if planar:
            cells = np.moveaxis(cells, -1, -3)
    if frame_count > 1:
        data_set.NumberOfFrames = frame_count
    data_set.BitsAllocated, data_set.BitsStored = bits, stored or bits
    data_set.HighBit = data_set.BitsStored - 1
    data_set.PixelRepresentation = int(cells.dtype.kind == "i")
    value = cells.astype(cells.dtype.newbyteorder(">" if syntax == BIG else "<")).tobytes()
    data_set.PixelData = value + b"\0" * (len(value) % 2)
    data_set["PixelData"].VR = "OB" if bits == 8 and syntax != IMPLICIT else "OW"
    for keyword, attribute in attributes.items():
        setattr(data_set, keyword, attribute)
    return written(data_set, syntax)


def ramp(dtype: str, *shape: int, low: int = 0, high: int = 255) -> np.ndarray[Any, Any]:
    return np.linspace(low, high, int(np.prod(shape))).astype(dtype).reshape(shape)


def encapsulated(source: bytes, syntax: str, value: bytes, **attributes: object) -> bytes:
    """The instance with another, encapsulated, pixel data value."""
    data_set = read(source)
    data_set.PixelData = value
    data_set["PixelData"].VR, data_set["PixelData"].is_undefined_length = "OB", True
    for keyword, attribute in attributes.items():
        setattr(data_set, keyword, attribute)
    return written(data_set, syntax)


def message_of(function: Callable[Arguments, object], *values: Arguments.args, **named: Arguments.kwargs) -> str:
    """Why the call is refused."""
    with pytest.raises(NotTranscodable) as refused:
        function(*values, **named)
    return refused.value.message


CT = ct_volume(slices=1)[0].content
IMAGES = {
    "8 bits": image(ramp("u1", SIDE, SIDE)),
    "an odd number of 8-bit cells": image(ramp("u1", 33, 33)),
    "16 bits": CT,
    "12 of 16 bits": image(ramp("u2", SIDE, SIDE, high=4095), stored=12),
    "signed 12 of 16 bits": image(ramp("i2", SIDE, SIDE, low=-2048, high=2047), stored=12),
    "signed 16 bits": image(ramp("i2", SIDE, SIDE, low=-32768, high=32767)),
    "signed 8 bits": image(ramp("i1", SIDE, SIDE, low=-128, high=127)),
    "6 of 16 bits": image(ramp("u2", SIDE, SIDE, high=63), stored=6),
    "frames": image(ramp("u1", 5, SIDE, 41), frame_count=5),
    "inverted": image(ramp("u1", SIDE, SIDE), photometric="MONOCHROME1"),
    "palette": image(ramp("u1", SIDE, SIDE), photometric="PALETTE COLOR"),
    "colour by pixel": image(ramp("u1", SIDE, SIDE, 3), photometric="RGB", samples=3),
    "colour by plane": image(ramp("u1", SIDE, SIDE, 3), photometric="RGB", samples=3, planar=1),
    "colour frames by plane": image(ramp("u1", 3, SIDE, 33, 3), photometric="RGB", samples=3, planar=1, frame_count=3),
    "YBR_FULL": image(ramp("u1", SIDE, SIDE, 3), photometric="YBR_FULL", samples=3),
    "big endian": image(ramp("u2", SIDE, SIDE, high=65535), syntax=BIG),
    "implicit": image(ramp("u2", SIDE, SIDE, high=65535), syntax=IMPLICIT),
}


@pytest.mark.parametrize("target", ALL)
@pytest.mark.parametrize("name", IMAGES)
def test_pixels_are_the_same_in_every_syntax_and_on_the_way_back(name: str, target: str) -> None:
    source = IMAGES[name]
    there = transcode(source, target)
    assert read(there).file_meta.TransferSyntaxUID == target
    assert np.array_equal(pixels(there), pixels(source))
    back = transcode(there, EXPLICIT)
    assert np.array_equal(pixels(back), pixels(source))
    assert len(read(back).PixelData) % 2 == 0
    if name != "big endian" and not read(source).get("PlanarConfiguration"):
        assert read(back).PixelData == read(transcode(source, EXPLICIT)).PixelData


@pytest.mark.parametrize("target", ALL)
@pytest.mark.parametrize("name", IMAGES)
def test_a_frame_is_what_stands_in_the_transcoded_instance(name: str, target: str) -> None:
    data_set = read(transcode(IMAGES[name], target))
    count = int(data_set.get("NumberOfFrames", 1))
    answer = frames(IMAGES[name], range(1, count + 1), target)
    if target in ENCAPSULATED:
        whole = list(generate_frames(data_set.PixelData, number_of_frames=count))
        assert [frame + b"\0" * (len(frame) % 2) for frame in answer] == whole
    else:
        value = b"".join(answer)
        assert value + b"\0" * (len(value) % 2) == data_set.PixelData


def test_what_is_offered_is_known() -> None:
    assert set(ALL) == OFFERED
    assert "not one" in message_of(transcode, CT, BIG)
    assert "not one" in message_of(frames, CT, [1], "1.2.840.10008.1.2.4.50")


def test_content_that_is_in_the_syntax_already_is_returned_as_it_is() -> None:
    for target in ALL:
        there = transcode(CT, target)
        assert transcode(there, target) is there
    assert transcode(CT[:-100], EXPLICIT) == CT[:-100]


def test_the_file_meta_information_keeps_what_it_had() -> None:
    data_set = read(CT)
    data_set.file_meta.SourceApplicationEntityTitle = "SOURCE"
    data_set.preamble = b"II*\0" + bytes(124)
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, data_set, enforce_file_format=True)
    there = transcode(buffer.getvalue(), JPEG_LS)
    before, after = read(buffer.getvalue()).file_meta, read(there).file_meta
    assert there[:4] == b"II*\0"
    assert after.SourceApplicationEntityTitle == "SOURCE"
    for meta in (before, after):
        del meta.TransferSyntaxUID, meta.FileMetaInformationGroupLength
    assert before == after
    length = struct.unpack("<L", there[140:144])[0]
    assert there[144 + length : 146 + length] == b"\x08\0"  # where the data set begins


def test_a_bare_data_set_becomes_a_file() -> None:
    buffer = io.BytesIO()
    data_set = Dataset()
    data_set.update(read(CT))
    pydicom.dcmwrite(buffer, data_set, implicit_vr=True, little_endian=True)
    assert buffer.getvalue()[128:132] != b"DICM"
    there = read(transcode(buffer.getvalue(), EXPLICIT))
    assert there.file_meta.MediaStorageSOPInstanceUID == data_set.SOPInstanceUID
    assert there.file_meta.MediaStorageSOPClassUID == data_set.SOPClassUID
    assert there == read(CT)


def odd_element(tag: tuple[int, int], vr: bytes, value: bytes) -> bytes:
    if vr in (b"OB", b"UN", b"SQ"):
        return struct.pack("<HH2s2xL", *tag, vr, len(value)) + value
    return struct.pack("<HH2sH", *tag, vr, len(value)) + value


ODD = (
    odd_element((0x0008, 0x0020), b"DA", b"not a date at all ")
    + odd_element((0x0010, 0x0010), b"PN", b"\xff\xfe^odd=\x1b$)C=three")
    + odd_element((0x0018, 0x0050), b"DS", b"12,5\0")
    + odd_element((0x0018, 0x0088), b"UN", b"1.0 ")
    + odd_element((0x0019, 0x0010), b"LO", b"CREATOR ")
    + odd_element((0x0019, 0x1001), b"UN", b"\1\2\3")
    + odd_element((0x0020, 0x0013), b"IS", b"99999999999999999999")
)


@pytest.mark.parametrize("target", ALL)
def test_odd_and_invalid_values_keep_their_bytes_without_a_word(target: str, caplog: pytest.LogCaptureFixture) -> None:
    data_set = read(IMAGES["8 bits"])
    start = IMAGES["8 bits"].index(b"\x28\0\2\0US")
    content = IMAGES["8 bits"][:start] + ODD + IMAGES["8 bits"][start:]
    with warnings.catch_warnings(), caplog.at_level(logging.DEBUG):
        warnings.simplefilter("error")
        there = transcode(content, target)
        back = transcode(there, EXPLICIT)
    assert not caplog.records
    assert data_set.PixelData == read(back).PixelData
    if target == IMPLICIT:
        assert b"\x18\0\x50\0\5\0\0\0" + b"12,5\0" in there
        assert b"\x19\0\1\x10\3\0\0\0\1\2\3" in there
        assert b"\x18\0\x88\0DS\4\0" + b"1.0 " in back  # implicit VR cannot say UN
    elif target != DEFLATED:
        assert ODD in there
        assert ODD in back


def nested(depth: int) -> Dataset:
    item = Dataset()
    item.CodeValue = str(depth)
    item.add_new((0x0009, 0x0010), "LO", "CREATOR")
    item.add_new((0x0009, 0x1001), "US", 513)
    if depth:
        item.ConceptNameCodeSequence = Sequence([nested(depth - 1), Dataset()])
    return item


@pytest.mark.parametrize("syntax", [EXPLICIT, IMPLICIT, BIG])
@pytest.mark.parametrize("is_undefined", [True, False])
def test_sequences_are_rewritten_at_every_depth(syntax: str, is_undefined: bool) -> None:
    data_set = read(structured_report().content)
    data_set.ContentSequence.append(nested(5))
    data_set.ContentSequence.append(Dataset())
    for element in data_set.iterall():
        if element.VR == "SQ":
            element.is_undefined_length = is_undefined
    little = written(data_set, EXPLICIT)
    source = written(read(little), syntax) if syntax != BIG else big_endian(little)
    for target in NATIVE:
        there = read(transcode(source, target))
        if IMPLICIT in (syntax, target):  # which does not know the representation of private elements
            for known in (there, expected := read(little)):
                known.walk(without_private)
            assert there == expected
        else:
            assert there == read(little)


def without_private(data_set: Dataset, element: pydicom.DataElement) -> None:
    if element.tag.is_private:
        del data_set[element.tag]


def big_endian(content: bytes) -> bytes:
    return written(read(content), BIG)


def test_depth_costs_no_recursion() -> None:
    depth = 20_000
    items = b"\x40\0\x30\xa7SQ\0\0\xff\xff\xff\xff\xfe\xff\0\xe0\xff\xff\xff\xff" * depth
    ends = b"\xfe\xff\x0d\xe0\0\0\0\0\xfe\xff\xdd\xe0\0\0\0\0" * depth
    report = structured_report().content
    there = transcode(report + items + ends, IMPLICIT)
    assert there.endswith(b"\x40\0\x30\xa7\xff\xff\xff\xff\xfe\xff\0\xe0\xff\xff\xff\xff" + ends)


def test_big_endian_values_are_swapped_by_their_representation() -> None:
    data_set = read(IMAGES["8 bits"])
    data_set.ExposureTimeInuS = "1"
    data_set.RecommendedDisplayFrameRateInFloat = 1.5
    data_set.add_new("RedPaletteColorLookupTableDescriptor", "US", [256, 0, 16])
    data_set.FrameIncrementPointer = 0x00181063
    data_set.ReferencedWaveformChannels = [1, 2]
    data_set.SimpleFrameList = [70000]
    data_set.DoubleFloatRealWorldValueFirstValueMapped = 2.25
    little = written(data_set)
    assert read(transcode(big_endian(little), EXPLICIT)) == read(little)
    data_set.RedPaletteColorLookupTableData = b"\1\0\2\0"  # pydicom writes words as they are given
    assert read(transcode(written(data_set, BIG), EXPLICIT)).RedPaletteColorLookupTableData == b"\0\1\0\2"


def test_eight_bit_cells_in_big_endian_words_come_out_in_order() -> None:
    cells = ramp("u1", 3, 33, 33)
    data_set = read(image(cells, frame_count=3))
    value = np.frombuffer(data_set.PixelData, "<u2").astype(">u2").tobytes()
    data_set.PixelData = value
    data_set["PixelData"].VR = "OW"
    source = written(data_set, BIG)
    assert np.array_equal(pixels(transcode(source, EXPLICIT)), cells)
    assert frames(source, [2], EXPLICIT) == [cells[1].tobytes()]
    assert np.array_equal(pixels(transcode(source, RLE)), cells)


def test_without_pixels_only_the_encoding_changes_and_encapsulation_is_refused() -> None:
    report = structured_report().content
    for target in NATIVE:
        assert read(transcode(report, target)) == read(report)
    for target in ENCAPSULATED:
        assert message_of(transcode, report, target) == "it has no pixel data"
    with pytest.raises(FrameNotFound):
        frames(report, [1], EXPLICIT)


def test_single_bits_stay_bits_and_frames_begin_at_whole_bytes() -> None:
    bits = (np.arange(3 * 33 * 35) % 7 == 0).astype(np.uint8).reshape(3, 33, 35)
    value = np.packbits(bits.ravel(), bitorder="little").tobytes()
    data_set = read(image(bits, frame_count=3))
    data_set.BitsAllocated, data_set.BitsStored, data_set.HighBit = 1, 1, 0
    data_set.PixelData = value + b"\0" * (len(value) % 2)
    source = written(data_set)
    for target in NATIVE:
        assert np.array_equal(pixels(transcode(source, target)), bits)
    packed = [np.packbits(frame.ravel(), bitorder="little").tobytes() for frame in bits]
    assert frames(source, [2, 3, 2], EXPLICIT) == [packed[1], packed[2], packed[1]]
    for target in ENCAPSULATED:
        assert "bits allocated and stored" in message_of(transcode, source, target)


def test_deflated_image_frames_are_inflated() -> None:
    import zlib

    bits = (np.arange(2 * 33 * 35) % 5 == 0).astype(np.uint8).reshape(2, 33, 35)
    streams = []
    for frame in bits:
        deflater = zlib.compressobj(wbits=-15)
        packed = np.packbits(frame.ravel(), bitorder="little").tobytes()
        streams.append(deflater.compress(packed) + deflater.flush())
    source = encapsulated(
        image(bits, frame_count=2), "1.2.840.10008.1.2.8.1", encapsulate(streams), BitsAllocated=1, BitsStored=1
    )
    assert np.array_equal(pixels(transcode(source, EXPLICIT)), bits)


@pytest.mark.parametrize(("dtype", "keyword"), [("<f4", "FloatPixelData"), ("<f8", "DoubleFloatPixelData")])
def test_floats_are_kept_in_native_syntaxes_and_refused_in_others(dtype: str, keyword: str) -> None:
    data_set = read(IMAGES["8 bits"])
    cells = np.linspace(-1, 1, 2 * SIDE * SIDE).astype(dtype)
    del data_set.PixelData, data_set.BitsStored, data_set.HighBit, data_set.PixelRepresentation
    data_set.NumberOfFrames, data_set.BitsAllocated = 2, cells.itemsize * 8
    setattr(data_set, keyword, cells.tobytes())
    source = written(data_set)
    for content in (source, big_endian_floats(source, keyword, dtype)):
        for target in NATIVE:
            assert read(transcode(content, target))[keyword].value == cells.tobytes()
        assert frames(content, [2], IMPLICIT) == [cells[SIDE * SIDE :].tobytes()]
        for target in ENCAPSULATED:
            assert "floating point" in message_of(transcode, content, target)
            assert "floating point" in message_of(frames, content, [1], target)


def big_endian_floats(content: bytes, keyword: str, dtype: str) -> bytes:
    data_set = read(content)
    setattr(data_set, keyword, np.frombuffer(data_set[keyword].value, dtype).astype(dtype.replace("<", ">")).tobytes())
    return written(data_set, BIG)


def test_overlays_in_unused_bits_survive_or_are_refused() -> None:
    cells = ramp("u2", SIDE, SIDE, high=4095) | 0x8000
    source = image(cells, stored=12)
    for target in (*NATIVE, RLE):
        there = transcode(source, target)
        assert read(transcode(there, EXPLICIT)).PixelData == cells.tobytes()
    for target in (JPEG_LS, JPEG_2000):
        assert "above Bits Stored" in message_of(transcode, source, target)


def test_subsampled_colour_is_kept_natively_and_spread_when_encoded() -> None:
    data_set = read(IMAGES["YBR_FULL"])
    value = ramp("u1", SIDE * SIDE * 2).tobytes()
    data_set.PhotometricInterpretation, data_set.PixelData = "YBR_FULL_422", value
    source = written(data_set)
    for target in NATIVE:
        there = read(transcode(source, target))
        assert (there.PhotometricInterpretation, there.PixelData) == ("YBR_FULL_422", value)
    assert frames(source, [1], EXPLICIT) == [value]
    for target in ENCAPSULATED:
        spread = transcode(source, target)
        assert read(spread).PhotometricInterpretation == "YBR_FULL"
        assert np.array_equal(pixels(spread), pixels(source))


@pytest.mark.parametrize(
    ("target", "photometric", "planar"), [(RLE, "RGB", 1), (JPEG_LS, "RGB", 0), (JPEG_2000, "YBR_RCT", 0)]
)
def test_colour_is_described_as_it_is_encoded(target: str, photometric: str, planar: int) -> None:
    for name in ("colour by pixel", "colour by plane"):
        there = transcode(IMAGES[name], target)
        assert (read(there).PhotometricInterpretation, read(there).PlanarConfiguration) == (photometric, planar)
        back = read(transcode(there, EXPLICIT))
        assert (back.PhotometricInterpretation, back.PlanarConfiguration) == ("RGB", 0)
    data_set = read(transcode(IMAGES["colour by pixel"], target))
    del data_set.PlanarConfiguration
    assert read(transcode(written(data_set, target), EXPLICIT)).PlanarConfiguration == 0


def rle_frames() -> tuple[bytes, list[bytes], np.ndarray[Any, Any]]:
    source = IMAGES["frames"]
    streams = list(get_encoder(RLE).iter_encode(read(source)))
    return source, streams, pixels(source)


def halves(streams: list[bytes]) -> list[tuple[bytes, bytes]]:
    return [(stream[: len(stream) // 4 * 2], stream[len(stream) // 4 * 2 :]) for stream in streams]


def items(*contents: bytes) -> bytes:
    return b"".join(struct.pack("<HHL", 0xFFFE, 0xE000, len(content)) + content for content in contents)


def test_fragments_are_joined_by_either_offset_table() -> None:
    source, streams, cells = rle_frames()
    fragments = [half for pair in halves(streams) for half in pair]
    places = np.cumsum([0] + [8 + len(half) for half in fragments])[:-1:2]
    basic = encapsulated(source, RLE, items(places.astype("<u4").tobytes(), *fragments))
    extended = encapsulated(
        source,
        RLE,
        items(b"", *fragments),
        ExtendedOffsetTable=places.astype("<u8").tobytes(),
        ExtendedOffsetTableLengths=np.array([len(stream) for stream in streams], "<u8").tobytes(),
    )
    for content in (basic, extended, encapsulated(source, RLE, encapsulate(streams, has_bot=False))):
        for target in (EXPLICIT, JPEG_LS):
            there = transcode(content, target)
            assert np.array_equal(pixels(there), cells)
            assert "ExtendedOffsetTable" not in read(there)
            assert "ExtendedOffsetTableLengths" not in read(there)
        assert frames(content, [3], EXPLICIT) == [cells[2].tobytes()]
        assert frames(content, [2], RLE) == [streams[1]]


def test_fragments_without_a_table_are_joined_by_where_code_streams_end() -> None:
    there = read(transcode(IMAGES["frames"], JPEG_LS))
    streams = list(generate_frames(there.PixelData, number_of_frames=5))
    fragments = [half for pair in halves(streams) for half in pair]
    content = encapsulated(IMAGES["frames"], JPEG_LS, items(b"", *fragments))
    assert np.array_equal(pixels(transcode(content, EXPLICIT)), pixels(IMAGES["frames"]))
    single = transcode(CT, JPEG_LS)
    (stream,) = generate_frames(read(single).PixelData, number_of_frames=1)
    content = encapsulated(CT, JPEG_LS, items(b"", *halves([stream])[0]))
    assert np.array_equal(pixels(transcode(content, EXPLICIT)), pixels(CT))


def test_an_extended_offset_table_that_pydicom_made_is_understood() -> None:
    source, streams, cells = rle_frames()
    value, table, lengths = encapsulate_extended(streams)
    content = encapsulated(source, RLE, value, ExtendedOffsetTable=table, ExtendedOffsetTableLengths=lengths)
    assert np.array_equal(pixels(transcode(content, IMPLICIT)), cells)


def test_the_basic_offset_table_points_at_the_frames() -> None:
    value = read(transcode(IMAGES["frames"], JPEG_LS)).PixelData
    table, *fragments = [value[8:28], *generate_fragments(value[28:])]
    offsets = np.cumsum([0] + [8 + len(fragment) for fragment in fragments])[:-1]
    assert table == offsets.astype("<u4").tobytes()


def test_only_the_frames_that_are_asked_for_are_decoded() -> None:
    source, streams, cells = rle_frames()
    content = encapsulated(source, RLE, encapsulate([streams[0], b"broken", *streams[2:]]))
    assert frames(content, [5, 1], EXPLICIT) == [cells[4].tobytes(), cells[0].tobytes()]
    assert message_of(frames, content, [2], EXPLICIT) == "its pixel data or data set is broken"
    assert message_of(transcode, content, EXPLICIT) == "its pixel data or data set is broken"


@pytest.mark.parametrize("number", [0, -1, 11])
def test_a_frame_that_the_instance_does_not_have_is_not_found(number: int) -> None:
    with pytest.raises(NotFound, match="the instance has 10") as missing:
        frames(multiframe().content, [1, number], EXPLICIT)
    assert isinstance(missing.value, FrameNotFound)


@pytest.mark.parametrize("target", ENCAPSULATED)
def test_broken_code_streams_are_refused(target: str) -> None:
    there = transcode(IMAGES["16 bits"], target)
    (stream,) = generate_frames(read(there).PixelData, number_of_frames=1)
    for broken in (b"", stream[: len(stream) // 2], stream[:20], bytes(len(stream)), stream[::-1]):
        content = encapsulated(CT, target, items(b"", broken + b"\0" * (len(broken) % 2)))
        assert message_of(transcode, content, EXPLICIT)
        assert message_of(frames, content, [1], EXPLICIT)
    assert message_of(transcode, encapsulated(CT, target, items(b"")), EXPLICIT)
    assert message_of(transcode, encapsulated(CT, target, items(b"", stream) + b"more"), EXPLICIT)


def test_code_streams_that_differ_from_the_attributes_are_not_decoded() -> None:
    for target in (JPEG_LS, JPEG_2000):
        data_set = read(transcode(IMAGES["16 bits"], target))
        data_set.Rows = 32
        assert "differ in rows" in message_of(transcode, written(data_set, target), EXPLICIT)
        data_set = read(transcode(IMAGES["16 bits"], target))
        data_set.BitsAllocated, data_set.BitsStored = 8, 8
        assert "more bits" in message_of(transcode, written(data_set, target), EXPLICIT)


def test_headers_that_end_the_process_in_gdcm_are_refused_before() -> None:
    quantization = b"\xff\xdb\0\x06\0\1\2\3"  # shorter than a table: libjpeg would read on, and warn
    size = b"\xff\xc0\0\x0b\x08" + struct.pack(">HH", 64, 64) + b"\1\1\x11\0"
    scan = b"\xff\xda\0\x08\1\1\0\0\x3f\0"
    for between in (quantization, b"between", b"\xff\xd2\0\x02", b"\xff\xd8\xff\xd8\0\2"):
        stream = b"\xff\xd8" + between + size + scan + bytes(50) + b"\xff\xd9"
        content = encapsulated(CT, "1.2.840.10008.1.2.4.50", items(b"", stream + b"\0" * (len(stream) % 2)))
        assert message_of(transcode, content, EXPLICIT) == ("its pixel data or data set is broken")


def test_too_many_pixels_are_refused_before_they_are_decoded() -> None:
    source, streams, _ = rle_frames()
    limit = 5 * SIDE * 41
    content = encapsulated(source, RLE, encapsulate(streams))
    assert transcode(content, EXPLICIT, bytes_max=limit)
    assert "limit" in message_of(transcode, content, EXPLICIT, bytes_max=limit - 1)
    assert "limit" in message_of(transcode, source, RLE, bytes_max=limit - 1)
    assert len(frames(content, [1, 2, 3, 4], EXPLICIT, bytes_max=limit - 1)) == 4
    assert "limit" in message_of(frames, content, [1] * 6, EXPLICIT, bytes_max=limit)
    assert "limit" in message_of(transcode, transcode(source, DEFLATED), EXPLICIT, bytes_max=1000)
    huge = image(ramp("u2", 2, 2), NumberOfFrames=100_000_000)
    assert "limit" in message_of(transcode, huge, RLE, bytes_max=1 << 20)
    assert "shorter" in message_of(transcode, huge, RLE)
    assert "limit" in message_of(frames, huge, [1] * 1000, JPEG_LS, bytes_max=1000)
    many = encapsulated(source, RLE, encapsulate(streams), NumberOfFrames=100_000_000)
    assert "not as many frames" in message_of(transcode, many, EXPLICIT)


@pytest.mark.parametrize(
    ("syntax", "name"),
    [
        ("1.2.840.10008.1.2.4.102", "MPEG-4"),
        ("1.2.840.10008.1.2.4.107", "HEVC"),
        ("1.2.840.10008.1.2.4.94", "JPIP"),
        ("1.2.840.10008.9.9.9", "unknown"),
    ],
)
def test_sources_without_a_decoder_are_refused(syntax: str, name: str) -> None:
    content = encapsulated(CT, syntax, items(b"", b"stream"))
    assert message_of(transcode, content, EXPLICIT).startswith("no decoder"), name
    assert message_of(frames, content, [1], EXPLICIT).startswith("no decoder"), name


HIGH_THROUGHPUT = base64.b64decode(
    "/0//UQApQAAAAAAQAAAADAAAAAAAAAAAAAAAEAAAAAwAAAAAAAAAAAABDwEB/1AACAACAAAACf9SAAwAAgABAAEEBEAB/1wAByCIiIiI/5AACgAA"
    "AAAAvwAB/5PAAC9sBQAR/03/M/uX/GP8Df6MfiE/ct+oz8yX4GPu5fT4eYc/pb+8P57f00/il/Bj9p361HwpPvbeY0+q98sT5DX8kf3+/XV91X5I"
    "36NfydfiR++99tV6FX1oXhEfgAPXr9Zf16/WXQgAxkJAMzEBwAAupgABaADtbtu2bUMDJWW727Zt29BASdnutm3bNjRQUv4M7X6y+dr9ZcIrGzG+"
    "AHgcx3Ecx/oEIHv2EIHsugD/2Q=="
)
"""12 x 16 cells of 16 bits in high-throughput JPEG 2000, by OpenJPH 0.26: OpenJPEG reads it and does not write it."""

HIGH_THROUGHPUT_COLOUR = base64.b64decode(
    "/0//UQAvQAAAAAAQAAAADAAAAAAAAAAAAAAAEAAAAAwAAAAAAAAAAAADBwEBBwEBBwEB/1AACAACAAAAAv9SAAwAAgABAQEEBEAB/1wAByBQUFBQ"
    "/5AACgAAAAABGQAB/5PAF3L/c+/VbrE5241WkUzg0G7W9o5Wk00gEc9/z8/qbvO3aOe76eV1d0zV2Vj8AIzwL1lwAAqmAAAxvgDAF1pTGqkbRxcd"
    "u5iBP/t0pjQl3XR0MvSUd9HpM1UZTIg3AMdLL3hOlwRIapY9fgDAF3LHNbw2h9lncRs97KlYnvvncFx8FrfRY3c2JeD+LL9t/vXZPQunyC+lIf4A"
    "nDKL/OQLhAA1MAJEvwDAFVAFbAFcgKn+fU9OktUnALBKkvR4Se/ZJ7zyCQAAAAA666m666m/fvw7AMAVUAVgAAD854Cnp0J3AJkkSf76Env2Sey4"
    "AMAVUAVoZmZm54Cnp8J3AHNmZmb++nJ798nsuAD/2Q=="
)


@pytest.mark.parametrize("syntax", [f"1.2.840.10008.1.2.4.{number}" for number in (201, 202, 203)])
def test_high_throughput_jpeg_2000_is_decoded(syntax: str) -> None:
    y, x = np.mgrid[:12, :16]
    cells = ((x * x * 7 + y * 61) % 4096).astype("u2")
    content = encapsulated(image(cells), syntax, encapsulate([HIGH_THROUGHPUT]))
    assert np.array_equal(pixels(transcode(content, EXPLICIT)), cells)
    assert frames(content, [1], EXPLICIT) == [cells.tobytes()]
    broken = encapsulated(image(cells), syntax, encapsulate([HIGH_THROUGHPUT[:100]]))
    assert message_of(transcode, broken, EXPLICIT) == "its pixel data or data set is broken"

    colours = np.stack([x * 12, y * 10, (x + y) * 5], -1).astype("u1")
    source = image(colours, photometric="RGB", samples=3)
    content = encapsulated(source, syntax, encapsulate([HIGH_THROUGHPUT_COLOUR]), PhotometricInterpretation="YBR_RCT")
    there = transcode(content, EXPLICIT)
    assert read(there).PhotometricInterpretation == "RGB"
    assert np.array_equal(pixels(there), colours)


def test_what_can_be_decoded_is_known_before_anything_is_read() -> None:
    for syntax in (*ALL, BIG, *(f"1.2.840.10008.1.2.4.{number}" for number in (50, 51, 57, 70, 81, 91, 201, 202, 203))):
        assert can_decode(syntax)
    video = [f"1.2.840.10008.1.2.4.{number}" for number in range(100, 109)]
    for syntax in (*video, "1.2.840.10008.1.2.4.94", "1.2.840.10008.1.2.4.205", "1.2.840.10008.9.9.9"):
        assert not can_decode(syntax)
        assert "no decoder" in message_of(transcode, encapsulated(CT, syntax, items(b"", b"stream")), EXPLICIT)


def test_what_a_syntax_does_not_allow_is_refused() -> None:
    wide = image(ramp("u4", SIDE, SIDE, high=2**32 - 1))
    assert np.array_equal(pixels(transcode(wide, IMPLICIT)), pixels(wide))
    for target in ENCAPSULATED:
        assert "bits allocated and stored" in message_of(transcode, wide, target)
    for photometric, samples in (("ARGB", 4), ("HSV", 3), ("YBR_PARTIAL_422", 3)):
        odd = image(ramp("u1", SIDE, SIDE, samples), photometric=photometric, samples=samples)
        assert read(transcode(odd, IMPLICIT)).PixelData == read(odd).PixelData
        assert "photometric" in message_of(transcode, odd, RLE)
    assert "High Bit" in message_of(transcode, image(ramp("u2", SIDE, SIDE), stored=12, HighBit=15), JPEG_LS)
    assert "fewer than 32" in message_of(transcode, image(ramp("u1", 10, SIDE)), JPEG_2000)
    assert transcode(image(ramp("u1", 32, 32)), JPEG_2000)


def test_pixel_data_that_is_not_as_its_syntax_says_is_refused() -> None:
    named_wrongly = CT.replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.5\0", 1)
    assert "not encapsulated" in message_of(transcode, named_wrongly, EXPLICIT)
    short = image(ramp("u2", SIDE, SIDE), Rows=SIDE + 1)
    assert "shorter" in message_of(transcode, short, RLE)
    assert "shorter" in message_of(frames, short, [1], EXPLICIT)
    assert read(transcode(short, IMPLICIT)).PixelData == read(short).PixelData


def test_an_icon_that_is_encapsulated_is_refused() -> None:
    data_set = read(transcode(CT, RLE))
    icon = Dataset()
    icon.PixelData = items(b"", b"icon")
    icon["PixelData"].VR, icon["PixelData"].is_undefined_length = "OB", True
    data_set.IconImageSequence = Sequence([icon])
    content = written(data_set, RLE)
    for target in (EXPLICIT, IMPLICIT, JPEG_LS):
        assert "a sequence" in message_of(transcode, content, target)


def test_what_stands_behind_the_pixels_and_is_no_element_is_left_out() -> None:
    for garbage in (b"garbage garbage", b"\0", b"\x10\x20\x30\x40OB\0\0\xff\xff\xff\xff"):
        assert transcode(CT + garbage, IMPLICIT) == transcode(CT, IMPLICIT)
    length = len(read(CT).PixelData)
    header = b"\xe0\x7f\x10\0OW\0\0"
    longer = CT.replace(header + struct.pack("<L", length), header + b"\xf0\xff\xff\xff")
    assert transcode(longer, IMPLICIT) == transcode(CT, IMPLICIT)
    assert "ends within" in message_of(transcode, longer[:-2], IMPLICIT)


def test_a_file_that_is_cut_off_is_never_given_with_pixels() -> None:
    content = transcode(IMAGES["colour by pixel"], JPEG_LS)
    for size in range(0, len(content), 7):
        for target in (IMPLICIT, RLE):
            try:
                there = transcode(content[:size], target)
            except NotTranscodable:
                continue
            assert target == IMPLICIT
            assert b"\xe0\x7f\x10\0" not in there


def test_threads_do_not_disturb_each_other() -> None:
    work = [(content, target) for content in IMAGES.values() for target in ALL] * 2
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda pair: transcode(*pair), work))
    assert answers == [transcode(*pair) for pair in work]
