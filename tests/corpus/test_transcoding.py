"""Every file of the corpus in every transfer syntax that is offered: the same pixels, the same elements, or a reason.

Pixels are judged by pydicom with other decoders than ours, where there are two: gdcm for JPEG 2000 and JPEG-LS,
pydicom's own for RLE. JPEG has gdcm only; that its lossless streams decode as libjpeg's do, and its lossy ones within
one of them, was found once by hand (pylibjpeg-libjpeg is GPL, and no dependency).
"""

from __future__ import annotations

import contextlib
import csv
import functools
import io
import logging
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.pixels.utils import pixel_array
from pydicom.uid import UID

from dicom_depot.codec.transcode import OFFERED, frames, transcode
from dicom_depot.domain.errors import DepotError, NotTranscodable

IMPLICIT, EXPLICIT, BIG = "1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2"
DEFLATED, RLE = "1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.5"
JPEG_LS, JPEG_2000 = "1.2.840.10008.1.2.4.80", "1.2.840.10008.1.2.4.90"

BYTES_MAX = 32 << 20
"""The corpus is smaller, decoded, but for the files that were made to be larger."""

NOT_DECODED = {
    "no decoder for the transfer syntax that it is stored in": 1,
    "its code stream and its attributes differ in rows, columns or samples": 1,  # a damaged JPEG 2000 header
}
NATIVE = NOT_DECODED | {"no decoder for RLE of single bits": 2}
BOMB = {"its deflated data set is broken, or larger than the limit": 1}
CUT = "its data set ends within an element"
ENCAPSULATED = (
    NOT_DECODED
    | BOMB
    | {
        "it has no pixel data": 76,
        "its pixels, decoded, are larger than the limit": 1,  # 100,000,000 frames
        "its pixels are not described: rows, columns or bits allocated are missing": 1,
    }
)
DEPTH = "its bits allocated and stored are not allowed in the transfer syntax"
UNUSED_BITS = {"bits above Bits Stored are in use, which the transfer syntax cannot keep": 1}
SMALL = {"the encoder takes no image with fewer than 32 rows or columns": 9}

REFUSED = {
    EXPLICIT: NATIVE | {CUT: 6},  # Others that are cut off are in it already, and left as they are.
    IMPLICIT: NATIVE | BOMB | {CUT: 12},
    DEFLATED: NATIVE | BOMB | {CUT: 14},
    RLE: ENCAPSULATED | {CUT: 14, DEPTH: 12},
    JPEG_LS: ENCAPSULATED | UNUSED_BITS | {CUT: 14, DEPTH: 14},
    JPEG_2000: ENCAPSULATED | UNUSED_BITS | SMALL | {CUT: 13, DEPTH: 12},
}
"""How many of the corpus' 304 files are refused in each syntax, and why."""

CHANGED = frozenset({0x00280004, 0x00280006, 0x7FE00010, 0x7FE00001, 0x7FE00002, 0x7FE00003, 0x00080001})


BEYOND_PYDICOM = {"_mutants/trailing_garbage.dcm": {"(0100,0302)"}}
"""What pydicom reads as an element, and is none."""

READ_OTHERWISE = frozenset({"dcm4che/e0b38f0d_no_preamble_dicm_in_data"})
"""Files without preamble, with the four letters of the prefix in a value, where pydicom begins to read."""


@pytest.fixture(scope="module")
def rows(corpus: Path) -> list[dict[str, str]]:
    with (corpus / "index.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(autouse=True)
def _room_for_nested_data() -> Iterator[None]:
    """To read and to compare nested data is recursion in pydicom; one file nests 200 deep."""
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(20_000)
    logging.disable()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    sys.setrecursionlimit(limit)
    logging.disable(logging.NOTSET)


def read(content: bytes) -> Dataset:
    data_set = pydicom.dcmread(io.BytesIO(content), force=True)
    data_set.file_meta.setdefault("TransferSyntaxUID", UID(IMPLICIT if data_set.original_encoding[0] else EXPLICIT))
    return data_set


def decoded(data_set: Dataset) -> np.ndarray[Any, Any]:
    """The pixels by the decoder that is not ours; by any, where that one does not read them."""
    syntax = data_set.file_meta.TransferSyntaxUID
    if syntax.is_encapsulated and syntax.startswith("1.2.840.10008.1.2.4."):
        with contextlib.suppress(Exception):
            return pixel_array(data_set, raw=True, decoding_plugin="gdcm")
    return pixel_array(data_set, raw=True)


@functools.cache
def original(path: Path) -> np.ndarray[Any, Any] | None:
    try:
        return decoded(read(path.read_bytes()))
    except Exception:
        return None


def differences(before: Dataset, after: Dataset, depth: int = 0) -> list[str]:
    """The elements whose values differ in their bytes, or, in big endian, as they are read."""
    tags = {tag for tag in {*before.keys(), *after.keys()} if tag.element and not (depth == 0 and int(tag) in CHANGED)}
    found = [str(tag) for tag in tags if tag not in before or tag not in after]
    for tag in tags - {tag for tag in tags if str(tag) in found}:
        one, other = before.get_item(tag), after.get_item(tag)
        if isinstance(one, RawDataElement) and isinstance(other, RawDataElement):
            if (one.value or b"") == (other.value or b"") and (not one.VR or not other.VR or one.VR == other.VR):
                continue
            if one.is_little_endian and before[tag].VR != "SQ":
                found.append(str(tag))
                continue
        if before[tag].VR == after[tag].VR == "SQ":
            if len(before[tag].value) != len(after[tag].value):
                found.append(str(tag))
            for pair in zip(before[tag].value, after[tag].value, strict=False):
                found += differences(*pair, depth=depth + 1)
        elif before[tag] != after[tag] and (before[tag].value or after[tag].value):
            found.append(str(tag))  # Empty values of other VRs are no difference: implicit VR does not keep the VR.
    return found


@pytest.mark.parametrize("target", sorted(OFFERED))
def test_every_file_keeps_its_pixels_and_elements_or_is_refused_with_a_reason(
    corpus: Path, rows: list[dict[str, str]], target: str
) -> None:
    refused: Counter[str] = Counter()
    wrong = []
    for row in rows:
        path = corpus / row["path"]
        content = path.read_bytes()
        try:
            there = transcode(content, target, bytes_max=1 << 30 if target == EXPLICIT else BYTES_MAX)
        except NotTranscodable as error:
            refused[error.message] += 1
            if target == EXPLICIT and original(path) is not None:
                wrong.append((row["path"], "refused, and pydicom decodes it", error.message))
            continue
        if there is content:
            continue
        before, after = read(content), read(there)
        assert after.file_meta.TransferSyntaxUID == target
        pixels = original(path)
        if pixels is not None and not np.array_equal(decoded(after), pixels):
            wrong.append((row["path"], "other pixels", ""))
        found = differences(before, after)
        if set(found) != BEYOND_PYDICOM.get(row["path"], set()) and row["path"] not in READ_OTHERWISE:
            wrong.append((row["path"], "other elements", ", ".join(found)))
    assert not wrong
    assert dict(refused) == REFUSED[target]


def test_frames_of_every_file_are_those_of_the_whole_or_are_refused(corpus: Path, rows: list[dict[str, str]]) -> None:
    for row in rows:
        content = (corpus / row["path"]).read_bytes()
        try:
            (frame,) = frames(content, [1], EXPLICIT)
        except DepotError:
            continue
        whole = read(transcode(content, EXPLICIT))
        value = next(whole[tag].value for tag in (0x7FE00010, 0x7FE00008, 0x7FE00009) if tag in whole)
        assert frame[:-1] == value[: len(frame) - 1], row["path"]
