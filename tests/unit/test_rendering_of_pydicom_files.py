"""pydicom's own test files: each is rendered at its size, as another pipeline shows it, or refused for its reason."""

from __future__ import annotations

import contextlib
import io
from collections import Counter
from pathlib import Path

import numpy as np
import pydicom
import pytest

from dicom_depot.codec.media_types import PNG
from dicom_depot.codec.render_parameters import Rendition
from dicom_depot.codec.rendering import render
from dicom_depot.domain.errors import DepotError
from tests.support.independent_pictures import pydicom_picture
from tests.support.pictures import opened
from tests.support.quiet_pydicom import quiet_pydicom

FOLDER = Path(pydicom.__file__).parent / "data" / "test_files"
FILES = sorted(path for path in FOLDER.rglob("*") if path.is_file() and path.suffix in (".dcm", ""))

REFUSED = {
    "This instance has no pixel data.": 70,
    "its data set ends within an element": 4,
    "its pixels are not described: rows, columns or bits allocated are missing": 2,
    "its code stream and its attributes differ in rows, columns or samples": 1,
}
"""How many of the 168 files are refused, and why."""

KINDS = {
    "MONOCHROME1": {"1.2.840.10008.1.2.1"},
    "MONOCHROME2": {
        *("1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.2"),
        *("1.2.840.10008.1.2.5", "1.2.840.10008.1.2.4.51", "1.2.840.10008.1.2.4.80", "1.2.840.10008.1.2.4.81"),
        *("1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.91"),
    },
    "PALETTE COLOR": {"1.2.840.10008.1.2.1"},
    "RGB": {
        *("1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2", "1.2.840.10008.1.2.5"),
        *("1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.70", "1.2.840.10008.1.2.4.81", "1.2.840.10008.1.2.4.91"),
    },
    "YBR_FULL": {"1.2.840.10008.1.2.4.50"},
    "YBR_FULL_422": {"1.2.840.10008.1.2.1", "1.2.840.10008.1.2.4.50"},
    "YBR_RCT": {"1.2.840.10008.1.2.4.90"},
}
"""What there is of each photometric interpretation, by transfer syntax."""

NOT_READ_BY_PYDICOM = {"JPEG-lossy.dcm", "JPGExtended.dcm", "badVR.dcm"}
"""Rendered, and compared with nothing here (DCMTK reads them, see tests/clients)."""

TOLERANCE = 1.0
"""Of 255: one rounding, of ours or of the conversion of colours."""


def test_every_file_is_rendered_or_refused_as_it_was() -> None:
    refused: Counter[str] = Counter()
    kinds: dict[str, set[str]] = {}
    for path in FILES:
        content = path.read_bytes()
        try:
            picture = opened(render(content, 1, Rendition(PNG)))
        except DepotError as error:
            refused[error.message] += 1
            continue
        with quiet_pydicom():
            data_set = pydicom.dcmread(io.BytesIO(content), force=True)
        assert picture.size == (data_set.Columns, data_set.Rows), path.name
        syntax = data_set.file_meta.get("TransferSyntaxUID", "1.2.840.10008.1.2")
        kinds.setdefault(data_set.PhotometricInterpretation, set()).add(syntax)
    assert dict(refused) == REFUSED
    assert kinds == KINDS


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_file_looks_as_pydicom_shows_it(path: Path) -> None:
    content = path.read_bytes()
    try:
        got = np.asarray(opened(render(content, 1, Rendition(PNG)))).astype(float)
    except DepotError:
        return
    with quiet_pydicom():
        data_set = pydicom.dcmread(io.BytesIO(content), force=True)
        expected = None
        with contextlib.suppress(Exception):
            expected = pydicom_picture(data_set)
    assert (expected is None) == (path.name in NOT_READ_BY_PYDICOM)
    if expected is None:
        return
    assert np.abs(got - expected.reshape(got.shape)).max() <= TOLERANCE
