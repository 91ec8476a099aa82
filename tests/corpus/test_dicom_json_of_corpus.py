"""DICOM JSON of every real file: what it says is what pydicom reads in the file, and bulk data lies where it points."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pydicom
import pytest
from pydicom import Dataset, dcmread
from pydicom.encaps import generate_frames

from dicom_depot.codec.dicom_json import read_instance, unpack_json
from dicom_depot.codec.layout import EncapsulatedFrames, Layout, NativeFrames, unpack
from dicom_depot.codec.part10 import read_header
from dicom_depot.domain.errors import BrokenInstance, NotDicom
from dicom_depot.domain.search import ATTRIBUTES
from tests.support.quiet_pydicom import quiet_pydicom

BULK = frozenset({"OB", "OD", "OF", "OL", "OV", "OW", "UN"})
URL = "http://depot.test/instance"

CUT_SHORT = {
    # The walk stops where these files stop making sense; what came before is there, and nothing else.
    "flip_0.dcm",
    "flip_2.dcm",
    "flip_4.dcm",
    "pixel_length_4GB.dcm",
    "trunc_3.dcm",
    "trunc_4.dcm",
    "ef2cf919_Tag-0040-A170-VR-CS.dcm",
    "8742a49b_emri_small_jpeg_2k_lossless_too_short.dcm",
    # pydicom's own names of the same kinds of damage
    "emri_small_jpeg_2k_lossless_too_short.dcm",
    "badVR.dcm",
    "rtplan_truncated.dcm",
    "UN_sequence.dcm",
    "no_meta.dcm",
}
DECODED_BETTER = {"unknown_charset.dcm"}
"""pydicom falls back to Latin-1 for an unknown character set; here the bytes are tried as UTF-8 first."""


def all_files(corpus: Path) -> list[Path]:
    shipped = (Path(pydicom.__file__).parent / "data").rglob("*.dcm")
    return sorted(path for path in corpus.rglob("*") if path.is_file() and path.name != "index.csv") + sorted(shipped)


def readable(corpus: Path) -> Iterator[tuple[Path, bytes]]:
    for path in all_files(corpus):
        content = path.read_bytes()
        try:
            read_header(io.BytesIO(content), len(content))
        except (NotDicom, BrokenInstance):
            continue
        yield path, content


IN_SEQUENCES = [attribute.column for attribute in ATTRIBUTES if attribute.parent is not None]


def test_the_walk_and_the_header_reader_agree_on_every_file(corpus: Path) -> None:
    vouched = 0
    for path in all_files(corpus):
        content = path.read_bytes()
        try:
            expected = read_header(io.BytesIO(content), len(content))
        except (NotDicom, BrokenInstance) as error:
            with pytest.raises((NotDicom, BrokenInstance)) as raised:
                read_instance(content, len(content))
            assert (type(raised.value), str(raised.value)) == (type(error), str(error)), path  # noqa: PT017
            continue
        found = read_instance(content, len(content))
        # What stands in sequences only the walk reads.
        expected.attributes.update({name: found.header.attributes[name] for name in IN_SEQUENCES})
        assert found.header == expected, path
        assert read_instance(io.BytesIO(content), len(content)) == found, path
        vouched += unpack(found.metadata.layout).is_complete
    assert vouched > 300


def test_dicom_json_holds_what_pydicom_reads(corpus: Path) -> None:
    compared = 0
    for path, content in readable(corpus):
        found = json.loads(unpack_json(read_instance(content, len(content)).metadata.dicom_json, URL))
        with quiet_pydicom():
            try:
                theirs = normal(
                    dcmread(path, force=True).to_json_dict(
                        bulk_data_threshold=0,
                        bulk_data_element_handler=lambda _element: "there",
                        suppress_invalid_tags=True,
                    )
                )
            except Exception:  # noqa: S112  (pydicom does not read every file that can be stored)
                continue
        ours = normal(found)
        if path.name in CUT_SHORT:
            theirs = {tag: value for tag, value in theirs.items() if tag in ours}
        if path.name in CUT_SHORT | DECODED_BETTER:
            continue
        compared += len(ours)
        missing = {tag: value for tag, value in theirs.items() if tag not in ours}
        assert not missing, path
        differing = {tag: (value, theirs[tag]) for tag, value in ours.items() if tag in theirs and value != theirs[tag]}
        assert not differing, path
    assert compared > 20_000


def test_dicom_json_makes_the_data_set_again(corpus: Path) -> None:
    """Round trip: JSON, then pydicom's reader of JSON, then the values of the file."""
    compared = 0
    for path, content in readable(corpus):
        if path.name in CUT_SHORT | DECODED_BETTER:
            continue
        read = read_instance(content, len(content))
        layout = unpack(read.metadata.layout)
        with quiet_pydicom():
            try:
                original = dcmread(path, force=True)
                made = Dataset.from_json(
                    unpack_json(read.metadata.dicom_json, URL).decode(),
                    bulk_data_uri_handler=lambda _tag, _vr, uri: bulk_value(content, layout, uri),  # noqa: B023
                )
                originals = {element.tag: element for element in original}
            except Exception:  # noqa: S112  (pydicom does not read every file that can be stored)
                continue
            for element in made:
                if element.tag not in originals or element.VR == "SQ" or element.tag.group == 0x7FE0:
                    continue
                theirs = originals[element.tag]
                if theirs.VR in BULK and layout.is_little_endian and not layout.deflated_at:
                    assert bytes(element.value or b"") == bytes(theirs.value or b""), (path, element.tag)
                elif theirs.VR not in BULK:
                    assert plain(element.value) == plain(theirs.value), (path, element.tag)
                compared += 1
    assert compared > 15_000


def test_frames_lie_where_the_layout_says(corpus: Path) -> None:
    native = encapsulated = 0
    for path, content in readable(corpus):
        layout = unpack(read_instance(content, len(content)).metadata.layout)
        if layout.deflated_at is not None or path.name in CUT_SHORT:
            continue
        with quiet_pydicom():
            try:
                data_set = dcmread(path, force=True)
                pixels = data_set.get("PixelData")
                count = int(data_set.get("NumberOfFrames") or 1)
            except Exception:  # noqa: S112  (pydicom does not read every file that can be stored)
                continue
        match layout.frames:
            case EncapsulatedFrames(fragments):
                found = [b"".join(content[at : at + length] for at, length in frame) for frame in fragments]
                with quiet_pydicom():
                    expected = list(generate_frames(pixels, number_of_frames=count))
                assert found == expected, path
                encapsulated += 1
            case NativeFrames(value, bits, frames):
                assert content[value.offset : value.offset + value.length] == pixels or pixels is None, path
                if pixels is not None and layout.is_little_endian and frames == count:
                    needed = -(-bits * frames // 8)
                    assert needed <= len(pixels) + 1 or path.parent.name in ("_mutants", "pydicom-data"), path
                    native += 1
    assert native > 150
    assert encapsulated > 60


def bulk_value(content: bytes, layout: Layout, uri: str) -> bytes:
    path = uri.removeprefix(f"{URL}/bulkdata/")
    assert path != uri
    found = layout.values.get(path)
    if found is None:
        assert path == "7FE00010"
        return b""
    offset, length = found[1]
    return content[offset : offset + length] if layout.deflated_at is None else b""


def normal(data_set: Mapping[str, Any]) -> dict[str, Any]:
    """Without what the two may say differently: group lengths, padding, empty values, bulk data's place."""
    found: dict[str, Any] = {}
    for tag, element in data_set.items():
        if tag.endswith("0000") or tag == "FFFCFFFC":
            continue
        values = element.get("Value")
        if element["vr"] == "SQ":
            found[tag] = ("SQ", [normal(item) for item in values or []])
        elif element["vr"] in BULK:
            found[tag] = ("bulk", None)
        else:
            found[tag] = (str(element["vr"]), [plain(value) for value in values] if values else None)
    return {tag: value for tag, value in found.items() if value[1] not in (None, [], [None])}


def plain(value: Any) -> Any:
    """A value as plain text or numbers, whatever type carries it."""
    if isinstance(value, dict):
        return {key: text for key, text in value.items() if text} or None
    if isinstance(value, (list, tuple)) or type(value).__name__ == "MultiValue":
        plains = [plain(each) for each in value]
        return plains[0] if len(plains) == 1 else plains or None
    if value is None or value == "":
        return None
    if isinstance(value, (int, float)):
        return round(float(value), 6)
    text = str(value).strip(" \0")
    try:
        number = float(text)
    except ValueError:
        return text or None
    return round(number, 6) if math.isfinite(number) else text
