"""Synthetic DICOM instances: deterministic, small, without a real person. Made with pydicom, except `many_small`.

UIDs lie below an organisation root meant for such use and depend on the seed only, so that a test can name them.
"""

from __future__ import annotations

import hashlib
import io
import random
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.filewriter import dcmwrite
from pydicom.sequence import Sequence
from pydicom.uid import UID, ExplicitVRLittleEndian

from dicom_depot.domain.identifiers import InstanceRef, parse_uid

UID_ROOT = "1.2.826.0.1.3680043.8.498"

_CT = "1.2.840.10008.5.1.4.1.1.2"
_ULTRASOUND_MULTI_FRAME = "1.2.840.10008.5.1.4.1.1.3.1"
_COMPREHENSIVE_SR = "1.2.840.10008.5.1.4.1.1.88.33"
_IMPLEMENTATION = UID_ROOT + ".1"
_NAMES = ("Synthetic^Alpha", "Synthetic^Beta", "Synthetic^Gamma", "Synthetic^Delta")


class Sample(NamedTuple):
    """One instance as a file: what it is, a name for the file, and its bytes."""

    ref: InstanceRef
    file_name: str
    content: bytes


def make_uid(*parts: object) -> str:
    """The UID, always 62 characters long, that belongs to these parts."""
    digest = hashlib.sha256("\0".join(map(str, parts)).encode()).digest()
    number = int.from_bytes(digest[:16]) % 9 * 10**35 + 10**35 + int.from_bytes(digest[16:]) % 10**35
    return f"{UID_ROOT}.{number}"


def ct_volume(slices: int = 8, rows: int = 64, columns: int = 64, seed: int = 0) -> list[Sample]:
    """One CT series: `slices` instances of `rows` x `columns` 16-bit pixels (PS3.3 section A.3)."""
    study, series = make_uid("ct study", seed), make_uid("ct series", seed)
    randomness = random.Random(seed)
    samples = []
    for number in range(1, slices + 1):
        uids = _Uids(study, series, make_uid("ct instance", seed, number))
        data_set = _data_set(_CT, uids, seed, "CT", number)
        data_set.SeriesDescription = "Synthetic volume"
        data_set.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
        data_set.ImagePositionPatient = [0.0, 0.0, float(number)]
        data_set.RescaleIntercept = -1024
        data_set.RescaleSlope = 1
        _set_pixels(data_set, rows, columns, 16, randomness.randbytes(rows * columns * 2))
        samples.append(_sample(data_set, f"CT{number:05}.dcm"))
    return samples


def multiframe(frames: int = 10, rows: int = 32, columns: int = 32, seed: int = 0) -> Sample:
    """One ultrasound multi-frame image of 8-bit pixels (PS3.3 section A.7)."""
    uids = _Uids(*(make_uid(kind, seed) for kind in ("us study", "us series", "us instance")))
    data_set = _data_set(_ULTRASOUND_MULTI_FRAME, uids, seed, "US", 1)
    data_set.NumberOfFrames = frames
    data_set.FrameTime = 40
    _set_pixels(data_set, rows, columns, 8, random.Random(seed).randbytes(frames * rows * columns))
    return _sample(data_set, "US00001.dcm")


def structured_report(seed: int = 0) -> Sample:
    """One comprehensive structured report: nested sequences, no pixels (PS3.3 section A.35.3)."""
    uids = _Uids(*(make_uid(kind, seed) for kind in ("sr study", "sr series", "sr instance")))
    data_set = _data_set(_COMPREHENSIVE_SR, uids, seed, "SR", 1)
    data_set.CompletionFlag, data_set.VerificationFlag = "COMPLETE", "UNVERIFIED"
    data_set.ValueType, data_set.ContinuityOfContent = "CONTAINER", "SEPARATE"
    data_set.ConceptNameCodeSequence = Sequence([_code("121111", "DCM", "Summary")])
    finding = Dataset()
    finding.RelationshipType, finding.ValueType = "CONTAINS", "TEXT"
    finding.ConceptNameCodeSequence = Sequence([_code("121071", "DCM", "Finding")])
    finding.TextValue = "Synthetic finding"
    data_set.ContentSequence = Sequence([finding])
    return _sample(data_set, "SR00001.dcm")


def many_small(
    count: int,
    size_bytes: int = 2048,
    instances_per_series: int = 50,
    series_per_study: int = 4,
    seed: int = 0,
) -> Iterator[Sample]:
    """`count` CT instances of about `size_bytes` bytes each (never less than the header needs), spread over series
    and studies. One template is made; its UIDs and numbers are overwritten in place, all being of fixed length.
    """
    marks = _Uids(*(make_uid("mark", kind) for kind in ("study", "series", "instance")))
    data_set = _data_set(_CT, marks, seed, "CT", 1)
    data_set.InstanceNumber = "99999999"
    _set_pixels(data_set, 1, 1, 16, b"\0\0")
    shortfall = max(0, size_bytes - len(_to_bytes(data_set)))
    columns = 1 + shortfall // 2
    rows = 1 if columns <= 0xFFFF else -(-columns // 0xFFFF)
    columns = -(-columns // rows)
    _set_pixels(data_set, rows, columns, 16, bytes(rows * columns * 2))
    template = bytearray(_to_bytes(data_set))
    study_places, series_places, instance_places = (_places(template, mark.encode()) for mark in marks)
    (number_place,) = _places(template, b"99999999")
    pixels_end = len(template)
    pixels_start = pixels_end - rows * columns * 2

    study_text = series_text = ""
    for index in range(count):
        series_number, position = divmod(index, instances_per_series)
        if not position:
            series_text = make_uid("small series", seed, series_number)
            study_text = make_uid("small study", seed, series_number // series_per_study)
            _overwrite(template, series_places, series_text.encode())
            _overwrite(template, study_places, study_text.encode())
        instance_text = make_uid("small instance", seed, index)
        _overwrite(template, instance_places, instance_text.encode())
        _overwrite(template, [number_place], b"%-8d" % (position + 1))
        if pixels_end - pixels_start >= 8:
            struct.pack_into("<Q", template, pixels_start, index)
        ref = InstanceRef(parse_uid(study_text), parse_uid(series_text), parse_uid(instance_text))
        yield Sample(ref, f"{series_number:06}/{position + 1:06}.dcm", bytes(template))


class _Uids(NamedTuple):
    study: str
    series: str
    instance: str


def _data_set(sop_class: str, uids: _Uids, seed: int, modality: str, number: int) -> Dataset:
    data_set = Dataset()
    data_set.SpecificCharacterSet = "ISO_IR 192"
    data_set.SOPClassUID, data_set.SOPInstanceUID = sop_class, uids.instance
    data_set.StudyInstanceUID, data_set.SeriesInstanceUID = uids.study, uids.series
    data_set.StudyDate, data_set.StudyTime = "20240102", "030405"
    data_set.AccessionNumber = f"SYN{seed:06}"
    data_set.Modality = modality
    data_set.Manufacturer, data_set.ManufacturerModelName = "Synthetic", "Generator"
    data_set.ReferringPhysicianName = "Synthetic^Referrer"
    data_set.StudyDescription = "Synthetic study"
    data_set.PatientName = _NAMES[seed % len(_NAMES)]
    data_set.PatientID = f"SYNTHETIC{seed:06}"
    data_set.PatientBirthDate, data_set.PatientSex = "19700101", "O"
    data_set.StudyID = str(seed)
    data_set.SeriesNumber, data_set.InstanceNumber = 1, number
    return data_set


def _set_pixels(data_set: Dataset, rows: int, columns: int, bits: int, pixels: bytes) -> None:
    data_set.SamplesPerPixel, data_set.PhotometricInterpretation = 1, "MONOCHROME2"
    data_set.Rows, data_set.Columns = rows, columns
    data_set.BitsAllocated, data_set.BitsStored, data_set.HighBit = bits, bits, bits - 1
    data_set.PixelRepresentation = 0
    data_set.PixelData = pixels + b"\0" * (len(pixels) % 2)
    data_set["PixelData"].VR = "OW" if bits > 8 else "OB"


def _code(value: str, scheme: str, meaning: str) -> Dataset:
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, scheme, meaning
    return item


def _to_bytes(data_set: Dataset) -> bytes:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = data_set.SOPClassUID
    meta.MediaStorageSOPInstanceUID = data_set.SOPInstanceUID
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.ImplementationClassUID = UID(_IMPLEMENTATION)
    data_set.file_meta = meta
    buffer = io.BytesIO()
    dcmwrite(buffer, data_set, enforce_file_format=True)
    return buffer.getvalue()


def _sample(data_set: Dataset, file_name: str) -> Sample:
    study, series = parse_uid(data_set.StudyInstanceUID), parse_uid(data_set.SeriesInstanceUID)
    return Sample(InstanceRef(study, series, parse_uid(data_set.SOPInstanceUID)), file_name, _to_bytes(data_set))


def _places(content: bytearray, mark: bytes) -> list[int]:
    places = []
    place = content.find(mark)
    while place >= 0:
        places.append(place)
        place = content.find(mark, place + 1)
    return places


def _overwrite(content: bytearray, places: list[int], value: bytes) -> None:
    for place in places:
        content[place : place + len(value)] = value


def write_examples(folder: Path) -> int:
    """Write a CT volume, a multi-frame image and a structured report as files; returns how many."""
    samples = [*ct_volume(slices=24, seed=1), *ct_volume(slices=16, seed=2), multiframe(), structured_report()]
    for sample in samples:
        path = folder / sample.file_name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(sample.content)
    return len(samples)


if __name__ == "__main__":
    print(f"{write_examples(Path(sys.argv[1]))} DICOM files written to {sys.argv[1]}")
