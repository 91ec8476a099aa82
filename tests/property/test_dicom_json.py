"""DICOM JSON of any data set in any encoding is what pydicom says; damage gives an error of ours, or a part of it."""

from __future__ import annotations

import io
import json
import struct
import zlib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom import Dataset, dcmread, dcmwrite
from pydicom.config import disable_value_validation
from pydicom.dataset import FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import UID

from dicom_depot.codec.checks import Check
from dicom_depot.codec.dicom_json import read_instance, unpack_json
from dicom_depot.codec.layout import EncapsulatedFrames, NativeFrames, unpack
from dicom_depot.codec.part10 import read_header
from dicom_depot.domain.errors import BrokenInstance, NotDicom
from dicom_depot.testing.samples import ct_volume, multiframe, structured_report

URL = "https://depot.test/v2/studies/1/series/2/instances/3"
ENCODINGS = {
    "implicit little": "1.2.840.10008.1.2",
    "explicit little": "1.2.840.10008.1.2.1",
    "explicit big": "1.2.840.10008.1.2.2",
    "deflated": "1.2.840.10008.1.2.1.99",
}
TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"], exclude_characters="\\^="), max_size=12)
SIMPLE: dict[str, tuple[int, st.SearchStrategy[Any]]] = {
    "LO": (0x00081030, TEXT),
    "LO many": (0x00181020, st.lists(TEXT, min_size=2, max_size=4)),
    "SH": (0x00080050, TEXT),
    "UT": (0x0040A160, st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), max_size=300)),
    "PN": (0x00100010, st.lists(TEXT, min_size=1, max_size=3).map("^".join)),
    "DA": (0x00080020, st.dates().map(lambda day: day.strftime("%Y%m%d"))),
    "CS many": (0x00080008, st.lists(st.sampled_from(["ORIGINAL", "PRIMARY", "AXIAL"]), min_size=2, max_size=4)),
    "DS many": (0x00280030, st.lists(st.floats(-1e6, 1e6).map(lambda number: f"{number:.6g}"), min_size=2, max_size=3)),
    "IS": (0x00200013, st.integers(-(2**31), 2**31 - 1).map(str)),
    "US": (0x00280010, st.integers(0, 65535)),
    "US or SS": (0x00280106, st.integers(0, 255)),
    "FD": (0x00186020, st.integers(0, 2**31 - 1)),
    "FL many": (0x00089459, st.floats(width=32, allow_nan=False, allow_infinity=False)),
    "AT": (0x00280009, st.integers(0, 0xFFFFFFFF)),
    "UL": (0x00081161, st.integers(0, 2**32 - 1)),
    "OB": (0x00282000, st.binary(max_size=200).map(lambda content: content + bytes(len(content) % 2))),
    "UI": (0x0008001A, st.sampled_from(["1.2.840.10008.1.2", "1.2.3.4"])),
}
VRS = {0x00186020: "SL", 0x00282000: "OB"}


@st.composite
def data_sets(draw: st.DrawFn, depth: int = 0) -> Dataset:
    data_set = Dataset()
    data_set.SpecificCharacterSet = "ISO_IR 192"
    for tag, values in draw(st.lists(st.sampled_from(list(SIMPLE.values())), unique_by=lambda entry: entry[0])):
        value = draw(values)
        if tag in VRS:
            data_set.add_new(tag, VRS[tag], value)
        else:
            with disable_value_validation():
                data_set.add_new(tag, _vr(tag), value)
    if depth < 3 and draw(st.booleans()):
        items = draw(st.lists(data_sets(depth + 1), max_size=2))
        for item in items:
            item.is_undefined_length_sequence_item = draw(st.booleans())
        sequence = Sequence(items)
        data_set.add_new(0x00081140, "SQ", sequence)
        data_set[0x00081140].is_undefined_length = draw(st.booleans())
    return data_set


def _vr(tag: int) -> str:
    from pydicom.datadict import dictionary_VR

    return dictionary_VR(tag).split(" or ", maxsplit=1)[0]


def file_of(data_set: Dataset, syntax: str) -> bytes:
    data_set.SOPClassUID, data_set.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.7", "1.2.3.4.5"
    data_set.StudyInstanceUID, data_set.SeriesInstanceUID = "1.2.3", "1.2.3.4"
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = UID(syntax)
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = data_set.SOPClassUID, data_set.SOPInstanceUID
    meta.ImplementationClassUID = UID("1.2.3.9")
    data_set.file_meta = meta
    buffer = io.BytesIO()
    with disable_value_validation():
        dcmwrite(buffer, data_set, enforce_file_format=True)
    return buffer.getvalue()


def simplified(found: Any) -> Any:
    """Empty values, and numbers as floats: what the two may write differently."""
    if isinstance(found, dict):
        if "vr" not in found:
            return {tag: simplified(element) for tag, element in found.items()}
        if "BulkDataURI" in found:
            return (found["vr"], "bulk")
        if found["vr"] in ("OB", "OW", "UN"):
            return (found["vr"], "bulk") if found.get("InlineBinary") else (found["vr"], None)
        values = found.get("Value")
        if found["vr"] == "SQ":
            return ("SQ", [simplified(item) for item in values or []])
        values = [_simple_value(value) for value in values or []]
        return (found["vr"], values if any(value is not None for value in values) else None)
    return found


def _simple_value(value: Any) -> Any:
    if isinstance(value, dict):
        return {kind: text.rstrip() for kind, text in value.items() if text.rstrip()} or None
    if isinstance(value, str):
        return value.rstrip(" ") or None
    return value if value is None else float(value)


@settings(max_examples=150, deadline=None)
@given(data_sets(), st.sampled_from(sorted(ENCODINGS)))
def test_json_says_what_pydicom_says(data_set: Dataset, encoding: str) -> None:
    content = file_of(data_set, ENCODINGS[encoding])
    read = read_instance(content, len(content))
    found = json.loads(unpack_json(read.metadata.dicom_json, URL))
    theirs = dcmread(io.BytesIO(content)).to_json_dict()
    assert simplified(found) == simplified(theirs)
    assert list(found) == sorted(found)
    assert unpack(read.metadata.layout).is_complete
    assert read.header == read_header(io.BytesIO(content), len(content))
    assert read_instance(io.BytesIO(content), len(content)) == read


@settings(max_examples=60, deadline=None)
@given(data_sets(), st.sampled_from(["implicit little", "explicit little", "explicit big"]))
def test_every_link_leads_to_the_bytes_of_its_element(data_set: Dataset, encoding: str) -> None:
    content = file_of(data_set, ENCODINGS[encoding])
    read = read_instance(content, len(content))
    layout = unpack(read.metadata.layout)

    def check(json_set: dict[str, Any], original: Dataset) -> int:
        count = 0
        for tag, element in json_set.items():
            if "BulkDataURI" in element:
                offset, length = layout.values[element["BulkDataURI"].removeprefix(f"{URL}/bulkdata/")][1]
                assert content[offset : offset + length] == bytes(original[int(tag, 16)].value)
                count += 1
            elif element["vr"] == "SQ":
                for item, of in zip(element.get("Value", []), original[int(tag, 16)].value, strict=True):
                    count += check(item, of)
        return count

    links = check(json.loads(unpack_json(read.metadata.dicom_json, URL)), dcmread(io.BytesIO(content)))
    assert links == len(layout.values)


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from([*ct_volume(1, 8, 8), multiframe(2, 4, 4), structured_report()]),
    st.data(),
    st.sampled_from(list(Check)),
)
def test_damage_gives_an_error_of_ours_or_a_part_of_the_truth(sample: Any, data: st.DataObject, check: Check) -> None:
    content = bytearray(sample.content)
    for _ in range(data.draw(st.integers(0, 4))):
        content[data.draw(st.integers(132, len(content) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        read = read_instance(cut, len(cut), check)
    except (NotDicom, BrokenInstance):
        return
    json.loads(unpack_json(read.metadata.dicom_json, URL))
    for _, place in unpack(read.metadata.layout).values.values():
        assert place.offset + place.length <= len(cut)


@pytest.mark.parametrize("name", sorted(ENCODINGS))
def test_values_may_lie_anywhere_in_the_window(name: str) -> None:
    """Long values push what follows over each edge of the 64 KiB through which a stream is read."""
    for length in (65_400, 65_500, 65_530, 65_534, 65_600, 131_000, 200_000):
        data_set = Dataset()
        data_set.add_new(0x00091002, "OB", b"\1" * length)
        data_set.add_new(0x00090010, "LO", "TEST")
        data_set.PatientID, data_set.StudyDescription = "P", "x" * 60
        content = file_of(data_set, ENCODINGS[name])
        streamed = read_instance(io.BytesIO(content), len(content))
        assert streamed == read_instance(content, len(content))
        assert streamed.header.attributes["patient_id"] == "P"
        assert unpack(streamed.metadata.layout).is_complete


def test_fragments_are_put_together_to_frames_by_each_kind_of_table() -> None:
    fragments = [b"\xff\xd8aa", b"bb", b"\xff\xd8cccc", b"dddd", b"\xff\xd8ee"]
    expected = [b"\xff\xd8aabb", b"\xff\xd8ccccdddd", b"\xff\xd8ee"]
    starts = [0, 12 + 10, 12 + 10 + 14 + 12]
    basic = struct.pack("<3L", *starts)
    extended = struct.pack("<3Q", *starts)
    for table, attribute in ((basic, b""), (b"", extended), (b"", b"")):
        content = _encapsulated(fragments, table, attribute, frames=3)
        layout = unpack(read_instance(content, len(content)).metadata.layout)
        assert isinstance(layout.frames, EncapsulatedFrames)
        found = [b"".join(content[at : at + size] for at, size in frame) for frame in layout.frames.fragments]
        assert found == expected


def _encapsulated(fragments: list[bytes], table: bytes, extended: bytes, *, frames: int) -> bytes:
    data_set = Dataset()
    data_set.NumberOfFrames = frames
    data_set.Rows = data_set.Columns = 4
    head = file_of(data_set, "1.2.840.10008.1.2.4.50")
    if extended:
        head += struct.pack("<HH2sHL", 0x7FE0, 1, b"OV", 0, len(extended)) + extended
    items = b"".join(struct.pack("<HHL", 0xFFFE, 0xE000, len(each)) + each for each in (table, *fragments))
    return head + b"\xe0\x7f\x10\x00OB\0\0\xff\xff\xff\xff" + items + b"\xfe\xff\xdd\xe0\0\0\0\0"


def test_what_a_small_deflated_file_inflates_to_is_bounded() -> None:
    """A data set of 1 GiB of zeros in a private element: it is read up to a limit, and what came before stays."""
    head = file_of(Dataset(), "1.2.840.10008.1.2.1.99")
    body = zlib.decompress(head[_body_at(head) :], -zlib.MAX_WBITS)
    deflater = zlib.compressobj(9, wbits=-zlib.MAX_WBITS)
    parts = [deflater.compress(body + struct.pack("<HH2sHL", 0x0021, 0x1001, b"OB", 0, 1 << 30))]
    parts += [deflater.compress(bytes(1 << 20)) for _ in range(1024)]
    content = head[: _body_at(head)] + b"".join(parts) + deflater.flush()
    read = read_instance(content, len(content))
    assert not unpack(read.metadata.layout).is_complete
    assert read.header.ref.study_uid == "1.2.3"


def _body_at(content: bytes) -> int:
    (length,) = struct.unpack_from("<L", content, 132 + 8)
    return int(132 + 12 + length)


def test_native_frames_of_single_bits_begin_in_the_middle_of_bytes() -> None:
    frames = NativeFrames(unpack(read_instance(*_bits()).metadata.layout).frames.value, 9, 3)  # type: ignore[union-attr]
    assert [frames.range_of(number)[1] for number in (1, 2, 3)] == [0, 1, 2]


def _bits() -> tuple[bytes, int]:
    data_set = Dataset()
    data_set.NumberOfFrames, data_set.Rows, data_set.Columns, data_set.SamplesPerPixel = 3, 3, 3, 1
    data_set.BitsAllocated = data_set.BitsStored = 1
    data_set.PixelData = b"\x55\xaa\x55\xaa"
    data_set["PixelData"].VR = "OB"
    content = file_of(data_set, "1.2.840.10008.1.2.1")
    return content, len(content)
