"""Rendered frames and thumbnails over DICOMweb (PS3.18 sections 8.3.5, 10.4.1.1.2 and 10.4.1.1.5)."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dicom_depot.codec import transcode
from dicom_depot.testing.samples import structured_report
from tests.http.answers import COMMON_HEADERS, assert_error
from tests.http.dicomweb.conftest import Made, Web, make, new_uid, open_web
from tests.support.pictures import Array, encapsulated, instance, opened

VERSIONS = pytest.mark.parametrize("version", ["v1", "v2", ""])
JPEG_LS = "1.2.840.10008.1.2.4.80"
MPEG4 = "1.2.840.10008.1.2.4.102"

RAMP = np.add.outer(np.arange(60), np.arange(80)).astype("<u2") * 16  # 60 rows, 80 columns


def picture(
    cells: Array = RAMP, study: str | None = None, series: str | None = None, sop: str | None = None, **named: Any
) -> Made:
    uids = study or new_uid(), series or new_uid(), sop or new_uid()
    return Made(*uids, instance(cells, uids=uids, **named))


def flat(grey: int, side: int = 8) -> Array:
    return np.full((side, side), grey, "u1")


WINDOWED: dict[str, Any] = {"WindowCenter": 128, "WindowWidth": 256}
"""Shows 8-bit values as they are."""


@pytest.fixture(scope="module")
def one(web: Web) -> Made:
    made = picture()
    web.must_store(made)
    return made


@pytest.fixture(scope="module")
def many(web: Web) -> Made:
    """Five frames: 10, 60, 110, 160, 210."""
    cells = np.stack([flat(grey) for grey in range(10, 220, 50)])
    made = picture(cells, frames=5, **WINDOWED)
    web.must_store(made)
    return made


def grey_of(content: bytes) -> int:
    return int(np.asarray(opened(content)).mean().round())


# --- rendered ---------------------------------------------------------------------------------------------------------


@VERSIONS
def test_an_instance_is_a_jpeg_of_its_first_frame_unless_png_is_asked_for(
    web: Web, one: Made, many: Made, version: str
) -> None:
    prefix = f"/{version}" if version else ""
    for accept, media_type, form in (
        (None, "image/jpeg", "JPEG"),
        ("image/jpeg", "image/jpeg", "JPEG"),
        ("*/*", "image/jpeg", "JPEG"),
        ("image/*", "image/jpeg", "JPEG"),
        ("image/png", "image/png", "PNG"),
    ):
        headers = {} if accept is None else {"Accept": accept}
        for path in (f"{one.path}/rendered", f"{one.path}/frames/1/rendered"):
            request = web.client.build_request("GET", prefix + path, headers=headers)
            if accept is None:
                del request.headers["Accept"]
            answer = web.client.send(request)
            assert answer.status_code == 200, answer.text
            assert answer.headers["Content-Type"] == media_type
            assert int(answer.headers["Content-Length"]) == len(answer.content)
            assert COMMON_HEADERS.items() <= dict(answer.headers).items()
            shown = opened(answer.content)
            assert (shown.format, shown.size) == (form, (80, 60))
    assert grey_of(web.client.get(f"{prefix}{many.path}/rendered").content) == 10


@VERSIONS
@pytest.mark.parametrize(
    "accept", ["application/jpeg", "image/gif", "image/jpeg, image/png", "image/jpeg;q=0", "jpeg", "text/html,*/*"]
)
def test_another_accept_is_406(web: Web, one: Made, version: str, accept: str) -> None:
    prefix = f"/{version}" if version else ""
    for place in ("rendered", "frames/1/rendered"):
        answer = web.client.get(f"{prefix}{one.path}/{place}", headers={"Accept": accept})
        assert assert_error(answer, 406, "NotAcceptable")["target"] == "Accept"


def test_two_accept_headers_are_406(web: Web, one: Made) -> None:
    headers = [("Accept", "image/jpeg"), ("Accept", "image/png")]
    assert_error(web.client.get(f"/v2{one.path}/rendered", headers=headers), 406, "NotAcceptable")


def test_each_frame_is_the_one_asked_for(web: Web, many: Made) -> None:
    found = [grey_of(web.get(f"{many.path}/frames/{n}/rendered", "image/png").content) for n in range(1, 6)]
    assert found == [10, 60, 110, 160, 210]


@VERSIONS
@pytest.mark.parametrize("number", ["0", "-1", "a", "1.5", "1,2", "1,", "%20", "9999999999", "٣"])
@pytest.mark.parametrize("resource", ["rendered", "thumbnail"])
def test_a_frame_number_that_is_none_is_400(web: Web, one: Made, version: str, number: str, resource: str) -> None:
    prefix = f"/{version}" if version else ""
    answer = web.client.get(f"{prefix}{one.path}/frames/{number}/{resource}")
    assert assert_error(answer, 400, "InvalidRequest")["target"] == "frames"


@pytest.mark.parametrize("resource", ["rendered", "thumbnail"])
def test_a_frame_that_is_not_there_is_404(web: Web, one: Made, many: Made, resource: str) -> None:
    for made, number in ((one, 2), (many, 6), (many, 999999999)):
        error = assert_error(web.get(f"{made.path}/frames/{number}/{resource}"), 404, "NotFound")
        assert error["target"] == "frames"
        assert str(number) in error["message"]


def test_an_instance_without_pixel_data_is_404(web: Web) -> None:
    made = make()
    web.must_store(made)
    for place in ("rendered", "frames/1/rendered", "thumbnail", "frames/1/thumbnail"):
        assert "pixel data" in assert_error(web.get(f"{made.path}/{place}"), 404, "NotFound")["message"]


@pytest.mark.parametrize(
    ("path", "target"),
    [
        ("/studies/{study}/series/{series}/instances/{none}/rendered", "instance"),
        ("/studies/{study}/series/{none}/instances/{sop}/frames/1/rendered", "instance"),
        ("/studies/{study}/series/{series}/instances/{none}/thumbnail", "instance"),
        ("/studies/{study}/series/{none}/thumbnail", "series"),
        ("/studies/{none}/thumbnail", "study"),
    ],
)
def test_what_is_not_stored_is_404(web: Web, one: Made, path: str, target: str) -> None:
    answer = web.get(path.format(study=one.study, series=one.series, sop=one.sop, none=new_uid()))
    assert assert_error(answer, 404, "NotFound")["target"] == target


@pytest.mark.parametrize("place", ["/studies/x/thumbnail", "/studies/1/series/1/instances/x/rendered"])
def test_a_uid_that_is_none_is_400(web: Web, place: str) -> None:
    assert_error(web.get(place), 400, "InvalidIdentifier")


# --- parameters -------------------------------------------------------------------------------------------------------


def test_quality_makes_it_smaller_and_is_without_effect_on_png(web: Web, one: Made) -> None:
    sizes = [len(web.get(f"{one.path}/rendered?quality={quality}").content) for quality in (5, 50, 100)]
    assert sizes == sorted(set(sizes))
    assert web.get(f"{one.path}/rendered").content == web.get(f"{one.path}/rendered?quality=100").content
    png = [web.get(f"{one.path}/rendered?quality={quality}", "image/png").content for quality in (1, 100)]
    assert png[0] == png[1]


@VERSIONS
@pytest.mark.parametrize("accept", ["image/jpeg", "image/png"])
@pytest.mark.parametrize(
    ("query", "target"),
    [
        *((f"quality={value}", "quality") for value in ("0", "101", "-1", "a", "", "50.5", "1&quality=1")),
        *(
            (f"window={value}", "window")
            for value in ("", "40", "40,0", "40,0.5", "a,b", "nan,1", "1,inf", "1,2,CUBIC")
        ),
        ("window=1,2&window=1,2", "window"),
        *(
            (f"viewport={value}", "viewport")
            for value in ("", "9", "0,9", "9,-9", "4097,9", "9,9,a", "9,9,,,0", "9,9,80")
        ),
        *(
            (f"viewport={value}", "viewport")
            for value in ("9,9,,,81", "9,9,,1,,60", "9,9,1,2,3,4,5", "9,9&viewport=9,9")
        ),
    ],
)
def test_a_parameter_that_is_wrong_is_400_and_named(
    web: Web, one: Made, version: str, accept: str, query: str, target: str
) -> None:
    prefix = f"/{version}" if version else ""
    answer = web.client.get(f"{prefix}{one.path}/rendered?{query}", headers={"Accept": accept})
    error = assert_error(answer, 400, "InvalidRequest")
    assert error["target"] == target


def test_parameters_that_are_not_known_are_passed_over(web: Web, one: Made) -> None:
    plain = web.get(f"{one.path}/rendered")
    assert web.get(f"{one.path}/rendered?annotation=patient&iccprofile=no&x=1&x=2").content == plain.content
    assert web.get(f"{one.path}/thumbnail?window=1&quality=0").status_code == 200


def test_a_window_is_applied(web: Web, many: Made) -> None:
    plain, threshold = (
        grey_of(web.get(f"{many.path}/frames/3/rendered{query}", "image/png").content)
        for query in ("", "?window=200,20,LINEAR")
    )
    assert (plain, threshold) == (110, 0)
    assert grey_of(web.get(f"{many.path}/frames/3/rendered?window=110,50,sigmoid", "image/png").content) == 128


def test_a_viewport_scales_cuts_out_and_flips(web: Web, one: Made) -> None:
    full = np.asarray(opened(web.get(f"{one.path}/rendered", "image/png").content))
    for query, size in (("40,40", (40, 30)), ("160,160", (160, 120)), ("10,600", (10, 8))):
        assert opened(web.get(f"{one.path}/rendered?viewport={query}", "image/png").content).size == size
    answer = web.get(f"{one.path}/rendered?viewport=8,6,10,20,-8,6", "image/png")
    assert np.array_equal(np.asarray(opened(answer.content)), full[20:26, 10:18][:, ::-1])


# --- thumbnails -------------------------------------------------------------------------------------------------------


@VERSIONS
def test_every_level_has_a_thumbnail(web: Web, one: Made, version: str) -> None:
    prefix = f"/{version}" if version else ""
    study, series = f"/studies/{one.study}", f"/studies/{one.study}/series/{one.series}"
    for path in (study, series, one.path, f"{one.path}/frames/1"):
        answer = web.client.get(f"{prefix}{path}/thumbnail")
        assert answer.status_code == 200, answer.text
        assert answer.headers["Content-Type"] == "image/jpeg"
        assert opened(answer.content).size == (80, 60), "small ones are not enlarged"
        assert opened(web.client.get(f"{prefix}{path}/thumbnail?viewport=40,90").content).size == (40, 30)


def test_a_thumbnail_has_at_most_128_pixels_a_side_unless_asked_otherwise(web: Web) -> None:
    made = picture(np.add.outer(np.arange(300), np.arange(400)).astype("<u2"))
    web.must_store(made)
    assert opened(web.get(f"{made.path}/thumbnail").content).size == (128, 96)
    assert opened(web.get(f"{made.path}/thumbnail?viewport=200,200").content).size == (200, 150)
    for query in ("9", "9,9,1", "9,9,,,1,1", "0,9", "9,9&viewport=9,9"):
        error = assert_error(web.get(f"{made.path}/thumbnail?viewport={query}"), 400, "InvalidRequest")
        assert error["target"] == "viewport"


def test_a_thumbnail_takes_what_browsers_accept(web: Web, one: Made) -> None:
    accept = "image/avif,image/webp,image/apng,image/svg+xml,image/*,*/*;q=0.8"
    assert web.get(f"{one.path}/thumbnail", accept).headers["Content-Type"] == "image/jpeg"
    assert web.get(f"{one.path}/thumbnail", "image/png").headers["Content-Type"] == "image/png"
    assert_error(web.get(f"{one.path}/thumbnail", "image/gif"), 406, "NotAcceptable")


def test_it_shows_the_middle_frame_and_the_middle_instance(web: Web, many: Made) -> None:
    assert abs(grey_of(web.get(f"{many.path}/thumbnail").content) - 110) <= 2
    study, series = new_uid(), new_uid()
    series_of_five = [
        picture(flat(grey), study, series, f"{series}.{place}", **WINDOWED)
        for place, grey in enumerate((10, 60, 110, 160, 210))
    ]
    web.must_store(*series_of_five)
    for path in (f"/studies/{study}", f"/studies/{study}/series/{series}"):
        assert abs(grey_of(web.get(f"{path}/thumbnail").content) - 110) <= 2


def test_what_has_no_image_or_cannot_be_rendered_is_passed_over(web: Web) -> None:
    """A series of reports first, then one whose middle instance is broken."""
    study, reports, images = new_uid(), new_uid(), new_uid()
    web.must_store(*(make(study=study, series=reports) for _ in range(5)))
    broken = picture(np.zeros((60, 80), "u1"), study, images, f"{images}.2")
    broken = broken._replace(content=encapsulated(broken.content, JPEG_LS, b"\xff\xd8 is no picture \xff\xd9"))
    good = [picture(flat(grey), study, images, f"{images}.{n}", **WINDOWED) for n, grey in ((1, 50), (3, 200))]
    web.must_store(broken, *good)
    assert_error(web.get(f"{broken.path}/rendered"), 406, "NotTranscodable")
    assert abs(grey_of(web.get(f"/studies/{study}/thumbnail").content) - 50) <= 2
    assert_error(web.get(f"/studies/{study}/series/{reports}/thumbnail"), 404, "NotFound")
    error = assert_error(web.get(f"{broken.path}/thumbnail"), 406, "NotTranscodable")
    assert "transfer-syntax=*" in error["message"]


def test_a_series_of_nothing_but_broken_pictures_gives_up_soon(web: Web) -> None:
    study, series = new_uid(), new_uid()
    large = np.zeros((500, 500), "<u2")
    made = [picture(large, study, series) for _ in range(40)]
    stream = transcode.frames(transcode.transcode(made[0].content, JPEG_LS), [1], JPEG_LS)[0]
    cut = stream[: len(stream) // 2] + b"\xff\xd9"
    web.must_store(*(each._replace(content=encapsulated(each.content, JPEG_LS, cut, Rows=501)) for each in made))
    begin = time.monotonic()
    assert_error(web.get(f"/studies/{study}/series/{series}/thumbnail"), 406, "NotTranscodable")
    assert time.monotonic() - begin < 5


def test_a_study_of_reports_has_no_thumbnail(web: Web) -> None:
    report = structured_report(seed=77)
    web.must_store(Made(report.ref.study_uid, report.ref.series_uid, report.ref.sop_instance_uid, report.content))
    error = assert_error(web.get(f"/studies/{report.ref.study_uid}/thumbnail"), 404, "NotFound")
    assert "pixel data" in error["message"]


# --- what cannot be rendered ------------------------------------------------------------------------------------------


def test_video_is_406_and_says_why(web: Web) -> None:
    made = picture(np.zeros((8, 8, 3), "u1"), photometric="RGB")
    made = made._replace(content=encapsulated(made.content, MPEG4, b"\0\0\0\x18ftypmp42"))
    web.must_store(made)
    for place in ("rendered", "frames/1/rendered", "thumbnail"):
        error = assert_error(web.get(f"{made.path}/{place}"), 406, "NotTranscodable")
        assert MPEG4 in error["message"]


def test_colours_that_are_not_shown_are_406(web: Web) -> None:
    made = picture(np.zeros((8, 8, 4), "u1"), photometric="CMYK")
    web.must_store(made)
    error = assert_error(web.get(f"{made.path}/rendered"), 406, "NotTranscodable")
    assert "photometric interpretation" in error["message"]


@pytest.fixture(scope="module")
def small_limit(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Web]:
    with open_web(tmp_path_factory.mktemp("limited"), transcode_bytes_max=1 << 20) as running:
        yield running


def test_an_instance_over_the_limit_is_406_and_names_the_setting(small_limit: Web) -> None:
    web = small_limit
    study, series = new_uid(), new_uid()
    large = picture(np.zeros((800, 800), "<u2"), study, series, f"{series}.2")
    small = picture(flat(77), study, series, f"{series}.1", **WINDOWED)
    web.must_store(large, small)
    for place in ("rendered", "frames/1/rendered", "frames/1/thumbnail", "thumbnail"):
        error = assert_error(web.get(f"{large.path}/{place}"), 406, "NotTranscodable")
        assert "DICOM_DEPOT_TRANSCODE_BYTES_MAX" in error["message"]
    assert abs(grey_of(web.get(f"/studies/{study}/thumbnail").content) - 77) <= 2


def test_a_child_process_that_is_killed_is_406_and_the_service_goes_on(small_limit: Web) -> None:
    web = small_limit
    made = picture(np.random.default_rng(5).integers(0, 4000, (500, 500), "<u2"))
    web.must_store(made)
    assert web.get(f"{made.path}/rendered").status_code == 200
    [worker] = web.service.workers()
    answers: list[int] = []

    def ask() -> None:
        deadline = time.monotonic() + 60
        while 406 not in answers and time.monotonic() < deadline:
            answers.append(web.get(f"{made.path}/rendered?viewport=4000,4000", "image/png").status_code)

    asking = threading.Thread(target=ask)
    asking.start()
    while asking.is_alive():
        for child in children(worker):
            os.kill(child, signal.SIGKILL)
        time.sleep(0.35)
    asking.join()
    assert 406 in answers
    assert set(answers) <= {200, 406}
    assert web.get(f"{made.path}/rendered").status_code == 200


def children(worker: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            is_child = int((path / "stat").read_text().rpartition(")")[2].split()[1]) == worker
            if is_child and b"transcode_process" in (path / "cmdline").read_bytes():
                found.append(int(path.name))
        except OSError:
            continue
    return found
