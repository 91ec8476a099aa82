"""The OHIF viewer, served by our service, in a real browser: it lists studies, opens them, draws what was stored."""

from __future__ import annotations

import base64
import io
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from pydicom import Dataset, dcmread
from pydicom.pixels.processing import apply_color_lut
from pydicom.pixels.utils import pixel_array

from dicom_depot.testing.samples import Sample, structured_report
from tests.conftest import corpus_folder
from tests.support.chromium import Browser, Page, running_chromium
from tests.support.quiet_pydicom import quiet_pydicom
from tests.support.service import RunningService, running_service
from tools import ohif
from tools.phantoms import AIR, ct_series, ct_slice, ultrasound_clip, ultrasound_frame

pytestmark = pytest.mark.clients

SLICES = 20
OPEN_SECONDS = 90.0  # of a viewer of 20 MB that draws without a graphics card, while others use the machine
DRAW_SECONDS = 30.0
# The table's body begins with the fields to search in, and says so in a row of its own when it has no others.
ROWS = "[...document.querySelectorAll('tbody tr')].filter(row => row.cells.length > 1 && !row.querySelector('input'))"
CANVAS = "document.querySelector('canvas.cornerstone-canvas')"
# OHIF makes a canvas, and sometimes another one in its place, some time before there is something on it.
IS_DRAWN = f"""(canvas => canvas && canvas.width && new Set(
  canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data
).size > 3)({CANVAS})"""
# What covers a part of the picture at first: OHIF's tour, and its notice of what it is for.
DISMISS = """[...document.querySelectorAll('button')]
  .filter(button => ['Skip all', 'Confirm and hide'].includes(button.innerText.trim()))
  .forEach(button => button.click())"""
REAL_FILES = {
    "CT, JPEG-LS": "dicomParser/b03f871b_CT1_UNC.fragmented_bot_jpeg_ls.80.dcm",
    "CT, implicit VR, with a window": "dcmqi/1a198559_03.dcm",
    "MR, JPEG 2000": "dcm_qa/4250fda3_jp2k2.dcm",
    "US, RLE, with a palette": "pydicom-data/aaf57785_OBXXXX1A_rle.dcm",
    "test pattern, JPEG, in colour": "cornerstone3D/6815110e_TestPattern_JPEG-Baseline_YBR422.dcm",
}


@pytest.fixture(scope="module")
def real() -> dict[str, bytes]:
    """A few files of the corpus, where there is one."""
    corpus = corpus_folder()
    return {} if corpus is None else {name: (corpus / path).read_bytes() for name, path in REAL_FILES.items()}


@pytest.fixture(scope="module")
def report() -> Sample:
    return structured_report(seed=301)


@pytest.fixture(scope="module")
def service(
    tmp_path_factory: pytest.TempPathFactory, real: dict[str, bytes], report: Sample
) -> Iterator[RunningService]:
    assert (ohif.FOLDER / "index.html").is_file(), "OHIF is not installed; run `make test-clients`, which installs it"
    with running_service(tmp_path_factory.mktemp("viewer") / "data", viewer_dir=ohif.FOLDER) as running:
        with httpx.Client(base_url=running.url, timeout=60) as client:
            for content in (*ct_series(SLICES), ultrasound_clip(), report.content, *real.values()):
                answer = client.post("/v2/studies", content=content, headers={"Content-Type": "application/dicom"})
                assert answer.status_code in {200, 202}, answer.text
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with running_chromium() as running:
        yield running


@pytest.fixture
def page(browser: Browser, service: RunningService, tmp_path: Path) -> Iterator[Page]:
    """A page of its own for each test. What it saw is kept, and all that it asked for was answered, by our service."""
    page = browser.new_page(1400, 900)
    yield page
    screenshot = tmp_path / "screenshot.png"
    screenshot.write_bytes(page.screenshot())
    print(f"screenshot: {screenshot}")
    page.wait_until_quiet()
    exchanges = list(page.exchanges.values())
    page.close()
    assert [each for each in exchanges if not each.url.startswith(f"{service.url}/")] == [], "asked of nobody else"
    assert [each for each in exchanges if each.failure or each.status not in {200, 204, 304}] == []
    assert [line for line in page.console if line.startswith("exception")] == []


def test_the_study_list_shows_every_study(page: Page, service: RunningService, real: dict[str, bytes]) -> None:
    page.open(f"{service.url}/viewer/")
    page.wait_for(f"{ROWS}.length", OPEN_SECONDS)
    page.wait_until_quiet()
    rows = {row[0]: row for row in _rows(page)}
    assert len(rows) == 3 + len(real)
    assert f"1-{len(rows)} of {len(rows)}" in page.evaluate("document.body.innerText")
    assert rows["Phantom, Disc"] == [
        *("Phantom, Disc", "04-Mar-2024 10:11 AM", "CT", "Disc phantom", "PHANTOM-CT", str(SLICES)),
    ]
    assert rows["Phantom, Sector"] == [
        *("Phantom, Sector", "04-Mar-2024 10:11 AM", "US", "Sector phantom", "PHANTOM-US", "1"),
    ]
    for content in real.values():
        family_name = str(_read(content).PatientName).partition("^")[0]
        assert any(name.startswith(family_name) for name in rows)


def test_the_study_list_can_be_searched(page: Page, service: RunningService) -> None:
    page.open(f"{service.url}/viewer/")
    page.wait_for(f"{ROWS}.length", OPEN_SECONDS)
    page.click("document.querySelector('tbody input')")
    page.command("Input.insertText", text="sect")
    page.wait_for(f"{ROWS}.length === 1", DRAW_SECONDS)
    assert [row[0] for row in _rows(page)] == ["Phantom, Sector"]


def test_a_series_that_is_opened_from_the_list_is_drawn_as_it_was_stored(page: Page, service: RunningService) -> None:
    page.open(f"{service.url}/viewer/")
    row = f"{ROWS}.find(row => row.innerText.includes('Phantom, Disc'))"
    page.wait_for(row, OPEN_SECONDS)
    page.click(row, 2)
    first = _drawn(page)
    assert _slice_shown(page) == SLICES
    assert _likeness(_grey(first), _ct_picture(SLICES)) > 0.99
    for turned in (np.fliplr, np.flipud, np.transpose):
        assert _likeness(_grey(first), turned(_ct_picture(SLICES))) < 0.95
    height, width = first.shape[:2]
    centre, corner = first[height // 2, width // 2], first[20, width // 2 - height // 2 + 20]
    assert centre.min() > 200, "bone is bright"
    assert corner.max() < 20, "air is dark"

    page.turn_wheel(CANVAS, 400)  # other slices are drawn too, each where its number says
    page.wait_for(f"!document.body.innerText.includes('I:{SLICES} (1/{SLICES})')", DRAW_SECONDS)
    page.wait_until_quiet()
    time.sleep(0.5)
    number = _slice_shown(page)
    assert 1 <= number < SLICES
    picture = _grey(_picture(page))
    likenesses = {each: _likeness(picture, _ct_picture(each)) for each in range(1, SLICES + 1)}
    assert max(likenesses, key=lambda each: likenesses[each]) == number, likenesses


def test_a_clip_in_colour_is_drawn_as_it_was_stored(page: Page, service: RunningService) -> None:
    page.open(_url(service, _read(ultrasound_clip())))
    drawn = _drawn(page)
    stored = ultrasound_frame(0)
    for channel in range(3):
        assert _likeness(drawn[:, :, channel].astype(float), stored[:, :, channel].astype(float)) > 0.98
    assert "1/12" in page.evaluate("document.body.innerText")


def test_a_study_without_images_is_opened(page: Page, service: RunningService, report: Sample) -> None:
    page.open(_url(service, _read(report.content)))
    page.wait_for("document.body && document.body.innerText.includes('Synthetic finding')", OPEN_SECONDS)


@pytest.fixture(params=REAL_FILES)
def real_image(request: pytest.FixtureRequest, real: dict[str, bytes]) -> Dataset:
    if not real:
        pytest.skip("DICOM_DEPOT_TEST_CORPUS is not set")
    return _read(real[request.param])


def test_real_images_are_drawn_as_they_were_stored(real_image: Dataset, page: Page, service: RunningService) -> None:
    page.open(_url(service, real_image))
    drawn = _drawn(page)
    expected = _as_displayed(real_image)
    if expected.ndim == 2:
        pairs = [(_grey(drawn), expected)]
    else:
        pairs = [(drawn[:, :, channel].astype(float), expected[:, :, channel]) for channel in range(3)]
    for picture, stored in pairs:
        likeness = _likeness(picture, stored)
        assert likeness > 0.9, "lines of one pixel are smoothed where a picture is enlarged, but no more"
        assert likeness > max(_likeness(picture, turned(stored)) for turned in (np.fliplr, np.flipud)) + 0.02


def _rows(page: Page) -> list[list[str]]:
    """The texts of the study list, row by row."""
    texts = page.evaluate(f"{ROWS}.map(row => [...row.cells].map(cell => cell.innerText.trim()))")
    return [[text for text in row if text] for row in texts]


def _drawn(page: Page) -> NDArray[np.uint8]:
    """The picture in the viewport, RGB, once it is there and nothing is on its way any more."""
    page.wait_for(IS_DRAWN, OPEN_SECONDS)
    page.evaluate(DISMISS)
    page.wait_until_quiet()
    time.sleep(1)
    page.evaluate(DISMISS)  # the tour begins a moment later
    page.wait_for(IS_DRAWN, DRAW_SECONDS)
    return _picture(page)


def _picture(page: Page) -> NDArray[np.uint8]:
    content = page.evaluate(f"{CANVAS}.toDataURL('image/png')")
    with Image.open(io.BytesIO(base64.b64decode(content.partition(",")[2]))) as image:
        return np.asarray(image.convert("RGB"))


def _grey(picture: NDArray[np.uint8]) -> NDArray[np.float64]:
    return np.asarray(picture.mean(axis=2), float)


def _likeness(drawn: NDArray[Any], expected: NDArray[Any]) -> float:
    """The correlation of what is drawn in the viewport with a picture that fills it as far as its shape allows."""
    height, width = drawn.shape
    rows, columns = expected.shape
    scale = min(height / rows, width / columns)
    y = ((np.arange(height) - height / 2) / scale + rows / 2).astype(int)
    x = ((np.arange(width) - width / 2) / scale + columns / 2).astype(int)
    is_row, is_column = (y >= 0) & (y < rows), (x >= 0) & (x < columns)
    part = drawn[np.ix_(is_row, is_column)]
    wanted = expected[np.ix_(y[is_row], x[is_column])]
    if part.std() == 0:
        return 0.0
    return float(np.corrcoef(part.ravel(), wanted.ravel())[0, 1])


def _ct_picture(number: int) -> NDArray[np.float64]:
    return ct_slice(number, SLICES).astype(float) - AIR


def _slice_shown(page: Page) -> int:
    """The instance number that stands in the viewport's corner."""
    found = re.search(r"I:(\d+) \(\d+/\d+\)", page.evaluate("document.body.innerText"))
    assert found is not None
    return int(found[1])


def _url(service: RunningService, data_set: Dataset) -> str:
    return f"{service.url}/viewer/viewer?StudyInstanceUIDs={data_set.StudyInstanceUID}"


def _read(content: bytes) -> Dataset:
    with quiet_pydicom():
        return dcmread(io.BytesIO(content))


def _as_displayed(data_set: Dataset) -> NDArray[np.float64]:
    """The first frame as another reader decodes it: colours as RGB, grey through the window that comes with it."""
    with quiet_pydicom():
        pixels = pixel_array(data_set, index=0)
        if data_set.PhotometricInterpretation == "PALETTE COLOR":
            pixels = apply_color_lut(pixels, data_set)
    if pixels.ndim == 3:
        return pixels.astype(float)
    values = pixels * float(data_set.get("RescaleSlope", 1)) + float(data_set.get("RescaleIntercept", 0))
    if "WindowCenter" in data_set:
        centre, width = (float(np.atleast_1d(data_set[name].value)[0]) for name in ("WindowCenter", "WindowWidth"))
        values = np.clip(values, centre - width / 2, centre + width / 2)
    return np.asarray(values, float)
