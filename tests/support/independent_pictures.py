"""The picture of an instance's first frame by pydicom's functions and NumPy: what our own pipeline is compared with.

Decoders are others than ours where there are two: GDCM for JPEG 2000 and JPEG-LS, Pillow for 8-bit JPEG, pydicom's own
for RLE. `dcmtk_picture` is DCMTK's dcmj2pnm, which shares no code with any of this.
"""

from __future__ import annotations

import contextlib
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from pydicom.dataset import Dataset
from pydicom.pixels.processing import apply_color_lut, apply_modality_lut, apply_voi_lut, convert_color_space
from pydicom.pixels.utils import pixel_array
from pydicom.uid import UID

from tests.support.pictures import Array

_PLUGINS = {
    "1.2.840.10008.1.2.4.50": "pillow",
    **dict.fromkeys([f"1.2.840.10008.1.2.4.{number}" for number in (80, 81, 90, 91)], "gdcm"),
}


def pydicom_picture(data_set: Dataset) -> Array:
    """Floats from 0 to 255, not rounded. Raises whatever pydicom raises."""
    if "TransferSyntaxUID" not in data_set.file_meta:
        is_implicit, _ = data_set.original_encoding
        data_set.file_meta.TransferSyntaxUID = UID("1.2.840.10008.1.2" if is_implicit else "1.2.840.10008.1.2.1")
    cells = _decoded(data_set)
    photometric = data_set.PhotometricInterpretation
    if photometric == "PALETTE COLOR":
        colours = apply_color_lut(cells, data_set)
        return np.asarray(colours, float) / (256 if colours.dtype == np.uint16 else 1)
    if photometric.startswith("MONOCHROME"):
        shown = _grey(cells, data_set)
        is_inverse = photometric == "MONOCHROME1" or data_set.get("PresentationLUTShape") == "INVERSE"
        return 255 - shown if is_inverse else shown
    if photometric.startswith("YBR_FULL"):
        return np.asarray(convert_color_space(cells, photometric, "RGB"), float)
    return np.asarray(cells / ((1 << data_set.BitsStored) - 1) * 255)


def _decoded(data_set: Dataset) -> Array:
    plugin = _PLUGINS.get(data_set.file_meta.TransferSyntaxUID)
    if plugin is not None:
        with contextlib.suppress(Exception):
            return np.asarray(pixel_array(data_set, index=0, raw=True, decoding_plugin=plugin))
    return np.asarray(pixel_array(data_set, index=0, raw=True))


def _grey(cells: Array, data_set: Dataset) -> Array:
    transformation = _first(data_set, "PixelValueTransformationSequence")
    if transformation is not None:
        data_set.RescaleSlope, data_set.RescaleIntercept = transformation.RescaleSlope, transformation.RescaleIntercept
    values = np.asarray(apply_modality_lut(cells, data_set), float)
    source = _first(data_set, "FrameVOILUTSequence") or data_set
    if "WindowCenter" in source and "WindowWidth" in source:
        limits = apply_modality_lut(np.array(_limits(data_set, cells)), data_set).astype(float)
        window = Dataset()
        for name in ("WindowCenter", "WindowWidth", "VOILUTFunction"):
            if name in source:
                setattr(window, name, source[name].value)
        for name in ("BitsStored", "PixelRepresentation", "RescaleSlope", "RescaleIntercept", "ModalityLUTSequence"):
            if name in data_set:
                setattr(window, name, data_set[name].value)
        window.PhotometricInterpretation = "MONOCHROME2"
        low, high = float(limits.min()), float(limits.max())
        return (np.asarray(apply_voi_lut(values, window, prefer_lut=False), float) - low) / (high - low) * 255
    if "VOILUTSequence" in data_set:
        bits = data_set.VOILUTSequence[0].LUTDescriptor[2]
        return np.asarray(apply_voi_lut(values, data_set) / ((1 << bits) - 1) * 255)
    considered = values
    if "PixelPaddingValue" in data_set:
        unpadded = values[cells != data_set.PixelPaddingValue]
        considered = unpadded if len(np.unique(unpadded)) > 1 else values
    low, high = float(considered.min()), float(considered.max())
    if low == high:
        low, high = sorted(map(float, apply_modality_lut(np.array(_limits(data_set, cells)), data_set)))
    return np.clip((values - low) / (high - low), 0, 1) * 255


def _limits(data_set: Dataset, cells: Array) -> list[int]:
    bits = data_set.BitsStored
    return [-(1 << bits - 1), (1 << bits - 1) - 1] if cells.dtype.kind == "i" else [0, (1 << bits) - 1]


def _first(data_set: Dataset, macro: str) -> Dataset | None:
    """The functional group of the first frame."""
    for name in ("PerFrameFunctionalGroupsSequence", "SharedFunctionalGroupsSequence"):
        for group in data_set.get(name, [])[:1]:
            if group.get(macro):
                found: Dataset = group[macro].value[0]
                return found
    return None


def dcmtk_picture(path: Path, data_set: Dataset, out: Path) -> Array | None:
    """8 bits by dcmj2pnm, without scaling and overlays; None where it shows nothing (it has no JPEG 2000, JPEG-LS)."""
    voi = ["+Wm"]
    if "WindowWidth" in data_set:
        voi = ["+Wi", "1"]
    elif "VOILUTSequence" in data_set:
        voi = ["+Wl", "1"]
    done = subprocess.run(["dcmj2pnm", "-q", "-O", "+on", "-S", *voi, str(path), str(out)], capture_output=True)
    if done.returncode:
        return None
    picture: Any = PIL.Image.open(out)
    return np.asarray(picture)
