"""Instances with pictures made to measure, and rendered pictures as arrays, for the tests of rendering."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import PIL.Image
import pydicom
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import UID

from dicom_depot.codec.media_types import PNG
from dicom_depot.codec.render_parameters import Rendition
from dicom_depot.codec.rendering import render
from dicom_depot.testing.samples import make_uid

Array = np.ndarray[Any, np.dtype[Any]]

IMPLICIT, EXPLICIT, BIG = "1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2"
DEFLATED = "1.2.840.10008.1.2.1.99"


def instance(
    cells: Array,
    *,
    photometric: str = "MONOCHROME2",
    frames: int | None = None,
    stored: int | None = None,
    syntax: str = EXPLICIT,
    planar: int = 0,
    pixels: str = "PixelData",
    uids: tuple[str, str, str] | None = None,
    **attributes: Any,
) -> bytes:
    """A Part 10 file with these cells: (frames x) rows x columns, and x 3 in the photometric interpretations of
    three samples. `attributes` by keyword win over what follows from the cells.
    """
    data_set = Dataset()
    study, series, sop = uids or (make_uid("study"), make_uid("series"), make_uid("instance"))
    data_set.SOPClassUID, data_set.SOPInstanceUID = UID("1.2.840.10008.5.1.4.1.1.7"), UID(sop)
    data_set.StudyInstanceUID, data_set.SeriesInstanceUID, data_set.PatientID = UID(study), UID(series), "P"
    is_colour = photometric not in ("MONOCHROME1", "MONOCHROME2", "PALETTE COLOR")
    data_set.SamplesPerPixel, data_set.PhotometricInterpretation = cells.shape[-1] if is_colour else 1, photometric
    data_set.Rows, data_set.Columns = cells.shape[-3:-1] if is_colour else cells.shape[-2:]
    if is_colour:
        data_set.PlanarConfiguration = planar
    if frames is not None:
        data_set.NumberOfFrames = frames
    bits = cells.dtype.itemsize * 8
    data_set.BitsAllocated = bits
    if pixels == "PixelData":
        data_set.BitsStored = stored or bits
        data_set.HighBit = data_set.BitsStored - 1
        data_set.PixelRepresentation = int(cells.dtype.kind == "i")
    if planar:
        cells = np.moveaxis(cells, -1, -3)
    value = cells.astype(cells.dtype.newbyteorder(">" if syntax == BIG else "<")).tobytes()
    setattr(data_set, pixels, value + b"\0" * (len(value) % 2))
    for keyword, attribute in attributes.items():
        setattr(data_set, keyword, attribute)
    if pixels == "PixelData":
        data_set["PixelData"].VR = "OB" if bits == 8 and syntax != IMPLICIT else "OW"
    return written(data_set, syntax)


def written(data_set: Dataset, syntax: str) -> bytes:
    data_set.file_meta = FileMetaDataset()
    data_set.file_meta.TransferSyntaxUID = UID(syntax)
    data_set.file_meta.MediaStorageSOPClassUID = data_set.SOPClassUID
    data_set.file_meta.MediaStorageSOPInstanceUID = data_set.SOPInstanceUID
    buffer = io.BytesIO()
    is_implicit, is_little = syntax == IMPLICIT, syntax != BIG
    pydicom.dcmwrite(
        buffer, data_set, implicit_vr=is_implicit, little_endian=is_little, enforce_file_format=True, overwrite=True
    )
    return buffer.getvalue()


def encapsulated(content: bytes, syntax: str, *streams: bytes, **attributes: Any) -> bytes:
    """The instance with these code streams for its frames."""
    data_set = pydicom.dcmread(io.BytesIO(content))
    data_set.PixelData = encapsulate(list(streams))
    data_set["PixelData"].VR, data_set["PixelData"].is_undefined_length = "OB", True
    for keyword, attribute in attributes.items():
        setattr(data_set, keyword, attribute)
    return written(data_set, syntax)


def item(**attributes: Any) -> Dataset:
    found = Dataset()
    for keyword, attribute in attributes.items():
        setattr(found, keyword, attribute)
    return found


def opened(picture: bytes) -> PIL.Image.Image:
    found = PIL.Image.open(io.BytesIO(picture))
    found.load()
    return found


def shown(content: bytes, number: int = 1, **wanted: Any) -> Array:
    """The frame as PNG, as an array: rows x columns (x 3)."""
    return np.asarray(opened(render(content, number, Rendition(PNG, **wanted))))
