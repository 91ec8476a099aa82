"""Every file of the corpus as a picture: rendered at its size, or refused for its reason (rendered.csv), and the same
as another pipeline makes it. `python -m benchmarks.contact_sheet` shows them all.

Renew rendered.csv with UPDATE_SNAPSHOTS=1, and look at the difference.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pydicom
import pytest

from dicom_depot.codec.media_types import PNG
from dicom_depot.codec.part10 import read_header
from dicom_depot.codec.render_parameters import DEFAULT_THUMBNAIL, Rendition
from dicom_depot.codec.rendering import render
from dicom_depot.domain.errors import DepotError
from tests.support.independent_pictures import pydicom_picture
from tests.support.pictures import opened
from tests.support.quiet_pydicom import quiet_pydicom
from tests.support.service import RunningService, run_command, running_service

TABLE = Path(__file__).parent / "rendered.csv"

TOLERANCE = 1.0
"""Of 255: one rounding."""

NOT_READ_BY_PYDICOM = {
    "_mutants/frames_1e8.dcm",  # the pixels of one frame are there, not those of 100,000,000
    "pydicom/13d21761_JPGExtended.dcm",  # 12-bit JPEG, which DCMTK shows as we do
    "pydicom/c425608e_JPEG-lossy.dcm",
    "pylibjpeg-data/f6b6e424_RG2_JPLY_fixed.dcm",
    "pydicom-data/125601eb_liver_deflate.dcm",  # deflated image frames
    "pydicom-data/986863c4_liver_nonbyte_aligned_deflate.dcm",
}


@pytest.fixture(scope="module")
def paths(corpus: Path) -> list[str]:
    with (corpus / "index.csv").open(newline="") as file:
        return sorted(row["path"] for row in csv.DictReader(file))


def outcome_of(content: bytes) -> str:
    try:
        picture = opened(render(content, 1, Rendition(PNG)))
    except DepotError as error:
        return f"{error.code}: {error.message}"
    return f"rendered {picture.width}x{picture.height} {picture.mode}"


def test_every_file_is_rendered_or_refused_as_the_table_says(corpus: Path, paths: list[str]) -> None:
    found = {path: outcome_of((corpus / path).read_bytes()) for path in paths}
    if os.environ.get("UPDATE_SNAPSHOTS"):
        with TABLE.open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerows([("path", "outcome"), *found.items()])
    with TABLE.open(newline="") as file:
        expected = {row["path"]: row["outcome"] for row in csv.DictReader(file)}
    assert found == expected
    assert sum(outcome.startswith("rendered") for outcome in expected.values()) == 209


def test_every_picture_is_as_pydicom_shows_it(corpus: Path, paths: list[str]) -> None:
    wrong, unread, compared = [], set(), 0
    for path in paths:
        content = (corpus / path).read_bytes()
        try:
            got = np.asarray(opened(render(content, 1, Rendition(PNG)))).astype(float)
        except DepotError:
            continue
        with quiet_pydicom():
            try:
                expected = pydicom_picture(pydicom.dcmread(io.BytesIO(content), force=True)).reshape(got.shape)
            except Exception:
                unread.add(path)
                continue
        compared += 1
        difference = np.abs(got - expected).max()
        if difference > TOLERANCE:
            wrong.append((path, difference))
    assert not wrong
    assert unread == NOT_READ_BY_PYDICOM
    assert compared == 209 - len(NOT_READ_BY_PYDICOM)


@pytest.fixture(scope="module")
def service(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    folder = tmp_path_factory.mktemp("rendered")
    run_command("import", str(corpus), "--processes", "1", data_dir=folder / "data", check=False)
    with running_service(folder / "data") as running:
        yield running


def test_over_http_every_stored_file_is_a_picture_or_explained(
    corpus: Path, paths: list[str], service: RunningService
) -> None:
    """First frames, thumbnails of instances and of their studies. Nothing is a 500."""
    seen, studies = 0, set()
    with httpx.Client(base_url=f"{service.url}/v2", timeout=60) as client:
        for path in paths:
            try:
                with (corpus / path).open("rb") as file:
                    ref = read_header(file, (corpus / path).stat().st_size).ref
            except DepotError:
                continue
            url = f"/studies/{ref.study_uid}/series/{ref.series_uid}/instances/{ref.sop_instance_uid}"
            rendered = client.get(f"{url}/rendered")
            small = client.get(f"{url}/thumbnail")
            for answer in (rendered, small):
                if answer.status_code == 200:
                    assert answer.headers["Content-Type"] == "image/jpeg"
                    opened(answer.content)
                else:
                    assert answer.status_code in (404, 406), (path, answer.text)
                    assert answer.json()["message"]
            if small.status_code == 200:
                assert max(opened(small.content).size) <= DEFAULT_THUMBNAIL.width
            seen += rendered.status_code == 200
            studies.add(ref.study_uid)
        shown = [client.get(f"/studies/{study}/thumbnail").status_code for study in sorted(studies)]
    assert seen > 150
    assert set(shown) <= {200, 404, 406}
    assert shown.count(200) > 10
