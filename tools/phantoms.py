"""Synthetic images that look like something: a CT series and an ultrasound clip in colour, for viewers.

The samples in `dicom_depot.testing` hold noise; here each picture tells its left from its right and its top from its
bottom.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.filewriter import dcmwrite
from pydicom.uid import UID, ExplicitVRLittleEndian

from dicom_depot.testing.samples import UID_ROOT, make_uid

CT_ROWS = 256
AIR, LUNG, WATER, BONE = -1000, -700, 40, 900
"""Hounsfield units."""

_CT = "1.2.840.10008.5.1.4.1.1.2"
_ULTRASOUND_MULTI_FRAME = "1.2.840.10008.5.1.4.1.1.3.1"


def ct_slice(number: int, slices: int = 20) -> NDArray[np.int16]:
    """A slice in Hounsfield units, 256 x 256: an oval body in air, a lung on the picture's left only, a windpipe at the
    top, a spine at the bottom, and bone in the centre that grows from slice to slice.
    """
    y, x = np.mgrid[0:CT_ROWS, 0:CT_ROWS] - (CT_ROWS - 1) / 2
    picture = np.full((CT_ROWS, CT_ROWS), AIR, np.int16)
    picture[(x / 112) ** 2 + (y / 84) ** 2 <= 1] = WATER
    picture[((x + 62) / 30) ** 2 + (y / 50) ** 2 <= 1] = LUNG
    picture[x**2 + y**2 <= (16 + 14 * number / slices) ** 2] = BONE
    picture[x**2 + (y + 58) ** 2 <= 16**2] = AIR
    picture[(np.abs(x) <= 14) & (np.abs(y - 60) <= 16)] = BONE
    return picture


def ct_series(slices: int = 20) -> list[bytes]:
    """The files of one CT series (PS3.3 section A.3): slices of 2 mm, from feet to head."""
    study, series = make_uid("phantom study"), make_uid("phantom series")
    frame_of_reference = make_uid("phantom frame of reference")
    files = []
    for number in range(1, slices + 1):
        data_set = _data_set(_CT, study, series, make_uid("phantom instance", number), "CT", "Phantom^Disc", number)
        data_set.StudyDescription, data_set.SeriesDescription = "Disc phantom", "Axial 2 mm"
        data_set.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
        data_set.FrameOfReferenceUID, data_set.PositionReferenceIndicator = frame_of_reference, ""
        data_set.ImagePositionPatient = [-128.0, -128.0, 2.0 * number]
        data_set.ImageOrientationPatient = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0]
        data_set.PixelSpacing, data_set.SliceThickness = [1.0, 1.0], 2.0
        data_set.SliceLocation = 2.0 * number
        data_set.PatientPosition, data_set.KVP, data_set.AcquisitionNumber = "HFS", 120, 1
        data_set.RescaleIntercept, data_set.RescaleSlope, data_set.RescaleType = -1024, 1, "HU"
        data_set.WindowCenter, data_set.WindowWidth = 0, 2000
        data_set.SamplesPerPixel, data_set.PhotometricInterpretation = 1, "MONOCHROME2"
        data_set.BitsAllocated, data_set.BitsStored, data_set.HighBit = 16, 12, 11
        stored = (ct_slice(number, slices) + 1024).astype("<u2")
        files.append(_to_file(data_set, stored.shape, stored.tobytes(), "OW"))
    return files


def ultrasound_frame(number: int, frames: int = 12, rows: int = 240, columns: int = 320) -> NDArray[np.uint8]:
    """A frame of RGB pixels: a grey sector that opens downwards, and a coloured spot that moves around in it."""
    y, x = np.mgrid[0:rows, 0:columns].astype(np.float64)
    x -= columns / 2
    y += 20
    radius, angle = np.hypot(x, y), np.arctan2(x, y)
    is_inside = (np.abs(angle) < 0.7) & (radius > 40) & (radius < 240)
    grey = np.where(is_inside, 90 + 60 * np.sin(radius / 6) * np.cos(9 * angle), 0)
    picture = np.repeat(grey[:, :, None], 3, axis=2)
    turn = 2 * np.pi * number / frames
    is_spot = np.hypot(x - 40 * np.sin(turn), y - 150 - 40 * np.cos(turn)) < 18
    picture[is_spot] = (230, 40, 30)
    picture[is_inside & (np.hypot(x + 50, y - 150) < 14)] = (30, 60, 230)
    return picture.astype(np.uint8)


def ultrasound_clip(frames: int = 12) -> bytes:
    """The file of one multi-frame ultrasound image in colour (PS3.3 section A.7)."""
    study, series, instance = (make_uid("phantom", kind) for kind in ("us study", "us series", "us instance"))
    data_set = _data_set(_ULTRASOUND_MULTI_FRAME, study, series, instance, "US", "Phantom^Sector", 1)
    data_set.StudyDescription, data_set.SeriesDescription = "Sector phantom", "Clip in colour"
    data_set.ImageType, data_set.PatientOrientation = ["ORIGINAL", "PRIMARY"], ""
    data_set.NumberOfFrames, data_set.FrameTime = frames, 80
    data_set.FrameIncrementPointer = 0x00181063
    data_set.SamplesPerPixel, data_set.PhotometricInterpretation, data_set.PlanarConfiguration = 3, "RGB", 0
    data_set.BitsAllocated, data_set.BitsStored, data_set.HighBit = 8, 8, 7
    pictures = [ultrasound_frame(number, frames) for number in range(frames)]
    return _to_file(data_set, pictures[0].shape, b"".join(picture.tobytes() for picture in pictures), "OB")


def write_phantoms(folder: Path) -> int:
    """Write all files into a folder; returns how many."""
    files = [*ct_series(), ultrasound_clip()]
    for number, content in enumerate(files):
        (folder / f"{number:04}.dcm").write_bytes(content)
    return len(files)


def _data_set(
    sop_class: str, study: str, series: str, instance: str, modality: str, patient: str, number: int
) -> Dataset:
    data_set = Dataset()
    data_set.SpecificCharacterSet = "ISO_IR 192"
    data_set.SOPClassUID, data_set.SOPInstanceUID = sop_class, instance
    data_set.StudyInstanceUID, data_set.SeriesInstanceUID = study, series
    data_set.StudyDate, data_set.StudyTime = "20240304", "101112"
    data_set.SeriesDate, data_set.SeriesTime = "20240304", "101112"
    data_set.AccessionNumber, data_set.StudyID = f"PHANTOM-{modality}", modality
    data_set.Modality, data_set.Manufacturer = modality, "Synthetic"
    data_set.ReferringPhysicianName = "Phantom^Referrer"
    data_set.PatientName, data_set.PatientID = patient, f"PHANTOM-{modality}"
    data_set.PatientBirthDate, data_set.PatientSex = "19700101", "O"
    data_set.SeriesNumber, data_set.InstanceNumber, data_set.Laterality = 1, number, ""
    return data_set


def _to_file(data_set: Dataset, shape: tuple[int, ...], pixels: bytes, vr: str) -> bytes:
    data_set.Rows, data_set.Columns, data_set.PixelRepresentation = shape[0], shape[1], 0
    data_set.add_new("PixelData", vr, pixels)
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = data_set.SOPClassUID, data_set.SOPInstanceUID
    meta.TransferSyntaxUID, meta.ImplementationClassUID = ExplicitVRLittleEndian, UID(f"{UID_ROOT}.1")
    data_set.file_meta = meta
    buffer = io.BytesIO()
    dcmwrite(buffer, data_set, enforce_file_format=True)
    return buffer.getvalue()
