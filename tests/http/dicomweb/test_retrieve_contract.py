"""Retrieving over DICOMweb: instances, metadata, frames and bulk data (PS3.18 section 10.4)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from io import BytesIO
from typing import Any

import httpx
import numpy as np
import pytest
from pydicom import dcmread
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence
from pydicom.uid import UID, RLELossless

from dicom_depot.codec import transcode
from dicom_depot.testing import samples
from tests.http.answers import COMMON_HEADERS, assert_error
from tests.http.conftest import PUBLIC_URL
from tests.http.dicomweb.conftest import (
    DEFLATED,
    EXPLICIT_BIG,
    EXPLICIT_LITTLE,
    IMPLICIT_LITTLE,
    Made,
    Part,
    Raw,
    Web,
    make,
    new_uid,
    open_web,
    parts_of,
    with_pixels,
)

JPEG = "1.2.840.10008.1.2.4.50"
JPEG_LS = "1.2.840.10008.1.2.4.80"
J2K = "1.2.840.10008.1.2.4.90"
RLE = "1.2.840.10008.1.2.5"
RELATED = 'multipart/related; type="application/dicom"'
OCTETS = "application/octet-stream"
AS_STORED = "application/dicom; transfer-syntax=*"
VERSIONS = pytest.mark.parametrize("version", ["v1", "v2"])

PIXELS = (np.arange(64 * 64, dtype="<u2") * 7 % 4093).reshape(64, 64)


def image(syntax: str, study: str | None = None, series: str | None = None) -> Made:
    """The same 64 x 64 picture in any transfer syntax."""
    study, series, is_encapsulated = study or new_uid(), series or new_uid(), False
    match syntax:
        case _ if syntax == EXPLICIT_BIG:
            value = PIXELS.astype(">u2").tobytes()
        case _ if syntax == J2K:
            # Encoded by the service's own codec, as pydicom has no encoder here; what it reads is pydicom's decoder.
            value, is_encapsulated = encapsulate(transcode.frames(image(EXPLICIT_LITTLE).content, [1], J2K)), True
        case _ if syntax == RLE:
            made = dcmread(BytesIO(image(EXPLICIT_LITTLE).content))
            made.compress(RLELossless)
            value, is_encapsulated = made.PixelData, True
        case _:
            value = PIXELS.tobytes()
    return with_pixels(
        value,
        rows=64,
        columns=64,
        bits=16,
        syntax=syntax,
        is_encapsulated=is_encapsulated,
        StudyInstanceUID=study,
        SeriesInstanceUID=series,
    )


def encapsulated(frames: list[bytes], *, fragments: int = 1, has_table: bool = True, count: int | None = None) -> Made:
    """Code streams that nobody decodes."""
    value = encapsulate(frames, fragments_per_frame=fragments, has_bot=has_table)
    return with_pixels(
        value, rows=16, columns=16, frames=len(frames) if count is None else count, syntax=JPEG, is_encapsulated=True
    )


def jpeg_like(number: int, size: int) -> bytes:
    return b"\xff\xd8" + bytes([number]) * (size - 4) + b"\xff\xd9"


class Mixed:
    """A study of two series: native, and compressed by RLE and JPEG 2000."""

    def __init__(self) -> None:
        self.study, self.first_series, self.second_series = new_uid(), new_uid(), new_uid()
        self.native = image(EXPLICIT_LITTLE, study=self.study, series=self.first_series)
        self.rle = image(RLE, study=self.study, series=self.first_series)
        self.j2k = image(J2K, study=self.study, series=self.second_series)
        self.all = [self.native, self.rle, self.j2k]

    @property
    def study_path(self) -> str:
        return f"/studies/{self.study}"

    @property
    def series_path(self) -> str:
        return f"{self.study_path}/series/{self.first_series}"


@pytest.fixture(scope="module")
def mixed(web: Web) -> Mixed:
    made = Mixed()
    web.must_store(*made.all)
    return made


@pytest.fixture(scope="module")
def public(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Web]:
    with open_web(tmp_path_factory.mktemp("public"), public_url=PUBLIC_URL) as running:
        yield running


def assert_common(answer: httpx.Response, status: int = 200) -> httpx.Response:
    assert answer.status_code == status, answer.text
    assert COMMON_HEADERS.items() <= dict(answer.headers).items()
    return answer


def instances_in(answer: httpx.Response) -> dict[str, tuple[str, bytes]]:
    """SOP instance UID to transfer syntax and bytes; the part's header must say what the file says."""
    assert_common(answer)
    assert answer.headers["Content-Type"].startswith('multipart/related; type="application/dicom"; boundary=')
    found = {}
    for part in parts_of(answer):
        assert part.content_type == "application/dicom"
        made = dcmread(BytesIO(part.content))
        assert part.parameters == {"transfer-syntax": str(made.file_meta.TransferSyntaxUID)}
        found[str(made.SOPInstanceUID)] = (part.parameters["transfer-syntax"], part.content)
    return found


def assert_same_pixels(content: bytes) -> None:
    assert np.array_equal(dcmread(BytesIO(content)).pixel_array, PIXELS)


def frames_in(answer: httpx.Response, media_type: str = OCTETS) -> list[Part]:
    assert_common(answer)
    assert answer.headers["Content-Type"].startswith(f'multipart/related; type="{media_type}"; boundary=')
    found = parts_of(answer)
    assert all(part.content_type == media_type for part in found)
    return found


# Studies and series


@VERSIONS
@pytest.mark.parametrize(
    "accept",
    [
        f"{RELATED}; transfer-syntax=*",
        "multipart/related; type=application/dicom; transfer-syntax=*",
        'Multipart/Related; Type="Application/DICOM"; Transfer-Syntax="*"',
        "*/*",
        "*/*;q=0.1",
        f"{RELATED}, {RELATED}; transfer-syntax=*",
        f"{RELATED}; transfer-syntax=*;q=0.9, {RELATED};q=0.5",
        "text/html, */*;q=0.8",
    ],
)
def test_a_study_and_a_series_are_sent_as_they_were_stored(web: Web, mixed: Mixed, version: str, accept: str) -> None:
    found = instances_in(web.get(mixed.study_path, accept, version=version))
    assert {sop: content for sop, (_, content) in found.items()} == {each.sop: each.content for each in mixed.all}
    assert {syntax for syntax, _ in found.values()} == {EXPLICIT_LITTLE, RLE, J2K}
    found = instances_in(web.get(mixed.series_path, accept, version=version))
    assert {sop: content for sop, (_, content) in found.items()} == {
        each.sop: each.content for each in (mixed.native, mixed.rle)
    }


@VERSIONS
@pytest.mark.parametrize(
    ("accept", "syntax"),
    [
        (None, EXPLICIT_LITTLE),  # the standard's default, in place of 406
        (RELATED, EXPLICIT_LITTLE),
        ("multipart/related; type=application/dicom", EXPLICIT_LITTLE),
        ("multipart/related", EXPLICIT_LITTLE),
        (f"{RELATED}; transfer-syntax={EXPLICIT_LITTLE}", EXPLICIT_LITTLE),
        (f"{RELATED}; transfer-syntax={IMPLICIT_LITTLE}", IMPLICIT_LITTLE),
        (f"{RELATED}; transfer-syntax={DEFLATED}", DEFLATED),
        (f"{RELATED}; transfer-syntax={J2K}", J2K),
        (f'{RELATED}; transfer-syntax="{RLE}"', RLE),
        (f"{RELATED}; transfer-syntax={JPEG_LS}", JPEG_LS),
        (f"{RELATED}; transfer-syntax=*;q=0.2, {RELATED}; transfer-syntax={RLE};q=0.3", RLE),
        (f"application/dicom, {RELATED}; transfer-syntax={JPEG};q=1, {RELATED}; transfer-syntax={J2K};q=0.1", J2K),
    ],
)
def test_a_study_and_a_series_are_brought_into_one_transfer_syntax(
    web: Web, mixed: Mixed, version: str, accept: str | None, syntax: str
) -> None:
    for path, expected in ((mixed.study_path, mixed.all), (mixed.series_path, [mixed.native, mixed.rle])):
        found = instances_in(web.get(path, accept, version=version))
        assert found.keys() == {each.sop for each in expected}
        for each in expected:
            name, content = found[each.sop]
            assert name == syntax
            assert_same_pixels(content)
    if syntax == EXPLICIT_LITTLE:
        assert found[mixed.native.sop][1] == mixed.native.content


@VERSIONS
@pytest.mark.parametrize(
    "accept",
    [
        "application/dicom",
        AS_STORED,
        "application/dicom+json",
        "application/octet-stream",
        "text/html",
        'multipart/related; type="application/octet-stream"',
        'multipart/related; type="application/dicom+json"',
        "multipart/form-data",
        f"{RELATED}; transfer-syntax={JPEG}",
        f"{RELATED}; transfer-syntax={EXPLICIT_BIG}",
        f"{RELATED}; transfer-syntax=1.2.3",
        f"{RELATED}; transfer-syntax=*; q=0",
        "*/*; q=0",
    ],
)
def test_another_accept_for_a_study_or_series_is_406(web: Web, mixed: Mixed, version: str, accept: str) -> None:
    for path in (mixed.study_path, mixed.series_path):
        error = assert_error(web.get(path, accept, version=version), 406, "NotAcceptable")
        assert error["target"] == "Accept"
        assert "application/dicom" in error["message"]


def test_every_answer_has_a_boundary_of_its_own(web: Web, mixed: Mixed) -> None:
    types = {web.get(mixed.study_path, "*/*").headers["Content-Type"] for _ in range(3)}
    assert len(types) == 3


def test_large_instances_are_streamed_byte_for_byte(web: Web) -> None:
    study = new_uid()
    made = [with_pixels(bytes([n]) * (6 << 20), rows=2048, columns=3072, StudyInstanceUID=study) for n in range(3)]
    for each in made:
        web.must_store(each)
    found = instances_in(web.get(f"/studies/{study}", "*/*"))
    assert {sop: content for sop, (_, content) in found.items()} == {each.sop: each.content for each in made}
    answer = assert_common(web.get(made[0].path, AS_STORED))
    assert answer.content == made[0].content
    assert answer.headers["Content-Length"] == str(len(made[0].content))


# Instances


@VERSIONS
@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        (None, "native"),
        ("application/dicom", "native"),
        ("application/*", "native"),
        ("Application/DICOM; Transfer-Syntax=1.2.840.10008.1.2.1", "native"),
        (AS_STORED, "stored"),
        ('application/dicom; transfer-syntax="*"', "stored"),
        (f"application/dicom, {AS_STORED}", "stored"),
        (f"application/dicom;q=0.5, {AS_STORED};q=0.4", "native"),
        (f"application/dicom; transfer-syntax={RLE}", "stored"),
    ],
)
def test_an_instance_in_a_single_part(web: Web, mixed: Mixed, version: str, accept: str | None, expected: str) -> None:
    answer = assert_common(web.get(mixed.rle.path, accept, version=version))
    syntax = RLE if expected == "stored" else EXPLICIT_LITTLE
    assert answer.headers["Content-Type"] == f"application/dicom; transfer-syntax={syntax}"
    assert dcmread(BytesIO(answer.content)).file_meta.TransferSyntaxUID == syntax
    assert_same_pixels(answer.content)
    assert (answer.content == mixed.rle.content) == (expected == "stored")
    assert answer.headers["Content-Length"] == str(len(answer.content))


@VERSIONS
@pytest.mark.parametrize(
    ("accept", "syntax"),
    [
        (RELATED, EXPLICIT_LITTLE),
        ("*/*", RLE),
        (f"{RELATED}; transfer-syntax=*", RLE),
        (f"{RELATED}; transfer-syntax={J2K}", J2K),
    ],
)
def test_an_instance_in_multipart(web: Web, mixed: Mixed, version: str, accept: str, syntax: str) -> None:
    found = instances_in(web.get(mixed.rle.path, accept, version=version))
    [(name, content)] = found.values()
    assert name == syntax
    assert_same_pixels(content)
    assert (content == mixed.rle.content) == (syntax == RLE)


@VERSIONS
@pytest.mark.parametrize(
    "accept",
    ["application/dicom+json", "application/octet-stream", "image/jpeg", f"application/dicom; transfer-syntax={JPEG}"],
)
def test_another_accept_for_an_instance_is_406(web: Web, mixed: Mixed, version: str, accept: str) -> None:
    assert_error(web.get(mixed.native.path, accept, version=version), 406, "NotAcceptable")


@pytest.mark.parametrize("syntax", [IMPLICIT_LITTLE, EXPLICIT_LITTLE, DEFLATED, EXPLICIT_BIG, RLE, J2K])
def test_every_transfer_syntax_is_given_back_and_brought_into_the_default(web: Web, syntax: str) -> None:
    made = image(syntax)
    web.must_store(made)
    assert web.original(made) == made.content
    answer = assert_common(web.get(made.path, "application/dicom"))
    assert answer.headers["Content-Type"].endswith(f"={EXPLICIT_LITTLE}")
    assert_same_pixels(answer.content)


def test_what_cannot_be_transcoded_is_406_and_can_be_had_as_it_is(web: Web) -> None:
    made = encapsulated([jpeg_like(1, 100)])
    web.must_store(made)
    for accept in ("application/dicom", f"application/dicom; transfer-syntax={J2K}", RELATED):
        assert_error(web.get(made.path, accept), 406, "NotTranscodable")
    assert web.original(made) == made.content
    assert web.get(f"/studies/{made.study}", RELATED).status_code == 406


# Not there, not readable


@VERSIONS
@pytest.mark.parametrize(
    ("path", "level"),
    [
        ("/studies/{none}", "study"),
        ("/studies/{none}/metadata", "study"),
        ("/studies/{study}/series/{none}", "series"),
        ("/studies/{study}/series/{none}/metadata", "series"),
        ("/studies/{none}/series/{series}", "series"),
        ("/studies/{study}/series/{series}/instances/{none}", "instance"),
        ("/studies/{study}/series/{series}/instances/{none}/metadata", "instance"),
        ("/studies/{study}/series/{series}/instances/{none}/frames/1", "instance"),
        ("/studies/{study}/series/{series}/instances/{none}/bulkdata/7FE00010", "instance"),
        ("/studies/{study}/series/{none}/instances/{sop}", "instance"),
        ("/studies/{none}/series/{series}/instances/{sop}", "instance"),
    ],
)
def test_what_is_not_there_is_404_and_named_by_its_level(
    web: Web, mixed: Mixed, version: str, path: str, level: str
) -> None:
    none = new_uid()
    made = mixed.native
    wanted = path.format(none=none, study=made.study, series=made.series, sop=made.sop)
    error = assert_error(web.get(wanted, version=version), 404, "NotFound")
    assert error["target"] == level
    assert f"no {level} " in error["message"]
    assert none in error["message"]


@VERSIONS
@pytest.mark.parametrize("bad", ["abc", "1.2.", "1." * 33 + "1", "1.2 .3", "1.2.3a", "%20", "*"])
@pytest.mark.parametrize(
    ("path", "target"),
    [
        ("/studies/{}", "study"),
        ("/studies/{}/metadata", "study"),
        ("/studies/1/series/{}", "series"),
        ("/studies/{}/series/1/metadata", "study"),
        ("/studies/1/series/1/instances/{}", "instance"),
        ("/studies/1/series/{}/instances/1/metadata", "series"),
        ("/studies/1/series/1/instances/{}/frames/1", "instance"),
        ("/studies/1/series/1/instances/{}/bulkdata/7FE00010", "instance"),
    ],
)
def test_a_path_with_a_bad_uid_is_400(web: Web, version: str, path: str, target: str, bad: str) -> None:
    error = assert_error(web.get(path.format(bad), version=version), 400, "InvalidIdentifier")
    assert error["target"] == target


# Conditions and ranges


@pytest.mark.parametrize("form", ["{}", "W/{}", '"x", {}', "*"])
def test_an_instance_that_the_caller_has_is_304(web: Web, mixed: Mixed, form: str) -> None:
    etag = web.get(mixed.rle.path, AS_STORED).headers["ETag"]
    assert etag.startswith('"')
    answer = assert_common(web.get(mixed.rle.path, AS_STORED, If_None_Match=form.format(etag)), 304)
    assert answer.content == b""
    assert answer.headers["ETag"] == etag
    assert web.get(mixed.rle.path, AS_STORED, If_None_Match='"1x"').status_code == 200
    # Transcoded it is another thing, for which there is no tag.
    assert web.get(mixed.rle.path, "application/dicom", If_None_Match=form.format(etag)).status_code == 200


def test_the_tag_of_an_instance_changes_when_it_is_replaced(web: Web) -> None:
    made = make()
    web.must_store(made)
    before = web.get(made.path, AS_STORED).headers["ETag"]
    changed = make(study=made.study, series=made.series, sop=made.sop, PatientName="Changed")
    web.must_store(changed, method="PUT")
    answer = web.get(made.path, AS_STORED, If_None_Match=before)
    assert answer.status_code == 200
    assert answer.content == changed.content
    assert answer.headers["ETag"] != before


@pytest.mark.parametrize(
    ("text", "first", "last"),
    [
        ("bytes=0-0", 0, 0),
        ("bytes=0-9", 0, 9),
        ("bytes=100-199", 100, 199),
        ("bytes={last}-{last}", -1, -1),
        ("bytes=-1", -1, -1),
        ("bytes=-10", -10, -1),
        ("bytes=-99999999", 0, -1),
        ("bytes=10-", 10, -1),
        ("bytes=5-99999999", 5, -1),
        ("bytes=0-", 0, -1),
        ("bytes= 0-4", 0, 4),
    ],
)
@pytest.mark.parametrize("accept", [AS_STORED, "application/dicom", None])
def test_ranges_of_an_instance(web: Web, mixed: Mixed, text: str, first: int, last: int, accept: str | None) -> None:
    content = mixed.native.content
    size = len(content)
    first, last = first % size, last % size
    answer = assert_common(web.get(mixed.native.path, accept, Range=text.format(last=size - 1)), 206)
    assert answer.content == content[first : last + 1]
    assert answer.headers["Content-Range"] == f"bytes {first}-{last}/{size}"
    assert answer.headers["Content-Length"] == str(last - first + 1)
    assert answer.headers["Accept-Ranges"] == "bytes"
    assert answer.headers["Content-Type"] == f"application/dicom; transfer-syntax={EXPLICIT_LITTLE}"


@pytest.mark.parametrize("text", ["bytes={size}-", "bytes={size}-{size}", "bytes=-0", "bytes=999999999-"])
def test_a_range_behind_the_end_is_416(web: Web, mixed: Mixed, text: str) -> None:
    size = len(mixed.native.content)
    answer = web.get(mixed.native.path, AS_STORED, Range=text.format(size=size))
    assert_error(answer, 416, "RangeNotSatisfiable")
    assert answer.headers["Content-Range"] == f"bytes */{size}"


@pytest.mark.parametrize(
    "text",
    ["bytes=5-2", "bytes=a-b", "bytes=", "bytes=-", "items=0-1", "bytes=0-1,4-5", "bytes=--1", "0-1", "", "x" * 99],
)
def test_a_range_that_is_not_understood_gets_everything(web: Web, mixed: Mixed, text: str) -> None:
    answer = assert_common(web.get(mixed.native.path, AS_STORED, Range=text))
    assert answer.content == mixed.native.content
    assert "Content-Range" not in answer.headers


def test_if_range_asks_for_the_range_of_one_version_only(web: Web, mixed: Mixed) -> None:
    etag = web.get(mixed.native.path, AS_STORED).headers["ETag"]
    same = web.get(mixed.native.path, AS_STORED, Range="bytes=0-9", If_Range=etag)
    assert (same.status_code, same.content) == (206, mixed.native.content[:10])
    for other in ('"0"', f"W/{etag}", "Wed, 21 Oct 2015 07:28:00 GMT"):
        answer = web.get(mixed.native.path, AS_STORED, Range="bytes=0-9", If_Range=other)
        assert (answer.status_code, answer.content) == (200, mixed.native.content)


def test_ranges_are_for_single_instances_as_they_are_stored(web: Web, mixed: Mixed) -> None:
    for path, accept in (
        (mixed.rle.path, "application/dicom"),
        (mixed.native.path, RELATED),
        (mixed.study_path, "*/*"),
        (f"{mixed.native.path}/frames/1", OCTETS),
    ):
        assert web.get(path, accept, Range="bytes=0-0").status_code == 200
    large = with_pixels(bytes(range(256)) * (20 << 10), rows=1024, columns=5120)
    web.must_store(large)
    part = web.get(large.path, AS_STORED, Range="bytes=1000000-4999999")
    assert (part.status_code, part.content) == (206, large.content[1_000_000:5_000_000])


# Metadata


@VERSIONS
@pytest.mark.parametrize(
    "accept", [None, "*/*", "application/*", "application/json", "Application/DICOM+JSON", "text/html, */*;q=0.1"]
)
def test_metadata_is_dicom_json_at_all_levels(web: Web, mixed: Mixed, version: str, accept: str | None) -> None:
    for path, expected in (
        (mixed.study_path, mixed.all),
        (mixed.series_path, [mixed.native, mixed.rle]),
        (mixed.j2k.path, [mixed.j2k]),
    ):
        answer = assert_common(web.get(f"{path}/metadata", accept, version=version))
        assert answer.headers["Content-Type"] == "application/dicom+json"
        found = {each["00080018"]["Value"][0]: each for each in answer.json()}
        assert found.keys() == {each.sop for each in expected}
        assert len(answer.json()) == len(expected)
        for each in expected:
            url = f"{web.service.url}/{version}{each.path}/bulkdata/7FE00010"
            assert found[each.sop]["7FE00010"]["BulkDataURI"] == url


@VERSIONS
@pytest.mark.parametrize(
    "accept", ["application/dicom", "application/data", "application/dicom+xml", "text/html", "application/json;q=0"]
)
def test_another_accept_for_metadata_is_406(web: Web, mixed: Mixed, version: str, accept: str) -> None:
    for path in (mixed.study_path, mixed.series_path, mixed.native.path):
        assert_error(web.get(f"{path}/metadata", accept, version=version), 406, "NotAcceptable")


def etags(web: Web, made: Made) -> list[str]:
    """Of the metadata of study, series and instance; empty where it is gone."""
    study = f"/studies/{made.study}"
    paths = (study, f"{study}/series/{made.series}", made.path)
    return [web.get(f"{path}/metadata").headers.get("ETag", "") for path in paths]


@VERSIONS
@pytest.mark.parametrize("form", ["{}", '"{}"', 'W/"{}"', "x, {}"])
def test_metadata_that_the_caller_has_is_304(web: Web, mixed: Mixed, version: str, form: str) -> None:
    for path, tag in zip(
        (mixed.study_path, mixed.series_path, mixed.native.path), etags(web, mixed.native), strict=True
    ):
        answer = web.get(f"{path}/metadata", version=version, If_None_Match=form.format(tag))
        assert_common(answer, 304)
        assert answer.content == b""
        assert web.get(f"{path}/metadata", version=version, If_None_Match=form.format(f"{tag}9")).status_code == 200


def test_tags_of_metadata_are_the_last_change_and_the_count(web: Web) -> None:
    first = make()
    web.must_store(first)
    study, series, instance = etags(web, first)
    assert study == series == f"{instance}-1"
    web.must_store(make(study=first.study, series=first.series))
    last = web.get("/changefeed/latest").json()["sequence"]
    assert etags(web, first) == [f"{last}-2", f"{last}-2", instance]


def test_tags_of_metadata_change_when_something_is_added_replaced_or_deleted(web: Web) -> None:
    made = make()
    web.must_store(made)
    seen = [etags(web, made)]
    second = make(study=made.study, series=made.series)
    steps: list[Callable[[], object]] = [
        lambda: web.must_store(second),
        lambda: web.must_store(make(study=made.study)),
        lambda: web.must_store(
            make(study=made.study, series=made.series, sop=made.sop, PatientName="New"), method="PUT"
        ),
        lambda: web.client.delete(f"/v2{second.path}"),
    ]
    changed_levels = [(True, True, False), (True, False, False), (True, True, True), (True, True, False)]
    for step, changed in zip(steps, changed_levels, strict=True):
        step()
        now = etags(web, made)
        assert tuple(old != new for old, new in zip(seen[-1], now, strict=True)) == changed
        seen.append(now)
    for level in range(3):
        values = [tags[level] for tags in seen]
        assert [v for n, v in enumerate(values) if n == 0 or v != values[n - 1]] == list(dict.fromkeys(values))


def test_metadata_of_many_instances_is_whole(web: Web) -> None:
    study = new_uid()
    made = [make(study=study, StudyDescription="x" * 60) for _ in range(450)]
    web.must_store(*made)
    assert {each["00080018"]["Value"][0] for each in web.metadata(f"/studies/{study}")} == {each.sop for each in made}


def rich(syntax: str) -> Made:
    """Every kind of value, in items and private ones too."""

    def change(made: Dataset) -> None:
        made.PatientName = "Yamada^Tarou=山田^太郎=やまだ^たろう"
        made.OtherPatientNames = ["A^B", "C^D"]
        made.ImageType = ["ORIGINAL", "PRIMARY"]
        made.PatientWeight, made.SeriesNumber = "72.50", "3"
        made.PatientComments = 'quotes " and \\ and \n lines, ü'
        made.InstanceCreationDate, made.InstanceCreationTime = "20240203", "010203.5"
        made.PixelSpacing = ["0.5", "1e-3"]
        made.Rows, made.Columns = 3, 65535
        made.AccessionNumber = ""
        made.add_new(0x00189087, "FD", [1.5, -2.25])
        made.add_new(0x00720076, "FL", 0.5)
        made.add_new(0x00720078, "UL", 2**32 - 1)
        made.add_new(0x0072007C, "SL", -7)
        made.add_new(0x00720070, "UT", "unlimited text")
        made.add_new(0x0072005F, "AS", "034Y")
        made.add_new(0x00720060, "AT", [0x00100010, 0x7FE00010])
        made.add_new(0x00720065, "OB", bytes(range(6)))
        block = made.private_block(0x0009, "DICOM DEPOT TEST", create=True)
        block.add_new(0x01, "OB", b"outer!")
        block.add_new(0x02, "LO", "private text")
        item, inner = Dataset(), Dataset()
        item.CodeValue, item.CodeMeaning = "1", "first"
        nested = inner.private_block(0x0011, "NESTED", create=True)
        nested.add_new(0x10, "OB", b"deeply nested")
        inner.EncapsulatedDocument = b"%PDF-not-really "
        item.ReferencedImageSequence = Sequence([Dataset(), inner])
        made.ProcedureCodeSequence = Sequence([item])
        made.RequestAttributesSequence = Sequence([])

    return make(syntax=syntax, change=change)


def links_in(data_set: dict[str, Any]) -> list[str]:
    found = []
    for element in data_set.values():
        if "BulkDataURI" in element:
            assert "Value" not in element
            found.append(element["BulkDataURI"])
        for value in element.get("Value", []) if element["vr"] == "SQ" else []:
            found += links_in(value)
    return found


def read_back(data_set: dict[str, Any], fetch: Any) -> Dataset:
    """The metadata as pydicom reads it, with its bulk data fetched."""
    return Dataset.from_json(data_set, lambda tag, vr, uri: fetch(uri))


def content_of(answer: httpx.Response) -> bytes:
    [part] = frames_in(answer)
    assert part.parameters == {"transfer-syntax": EXPLICIT_LITTLE}
    return part.content


@VERSIONS
@pytest.mark.parametrize("syntax", [EXPLICIT_LITTLE, IMPLICIT_LITTLE, DEFLATED])
def test_metadata_with_its_bulk_data_is_what_pydicom_reads_from_the_file(web: Web, version: str, syntax: str) -> None:
    made = rich(syntax)
    web.must_store(made)
    answer = web.get(f"{made.path}/metadata", version=version)
    [data_set] = json.loads(answer.content, parse_constant=pytest.fail)
    assert list(data_set) == sorted(data_set)
    links = links_in(data_set)
    assert all(link.startswith(f"{web.service.url}/{version}{made.path}/bulkdata/") for link in links)
    fetched = {link: content_of(web.get(link.removeprefix(f"{web.service.url}/{version}"))) for link in links}
    read, expected = read_back(data_set, fetched.__getitem__), dcmread(BytesIO(made.content))
    if syntax == IMPLICIT_LITTLE:  # no VR in the file: what is private there has none that is known
        del read[0x00091002], expected[0x00091002]
        _as_bytes(read)
        _as_bytes(expected)
    assert [element.tag for element in read] == [element.tag for element in expected]
    for element in expected:
        assert _comparable(read[element.tag]) == _comparable(element), element
    nested = read.ProcedureCodeSequence[0].ReferencedImageSequence[1]
    assert nested[0x00111010].value.rstrip(b"\0") == b"deeply nested"
    assert nested.EncapsulatedDocument.rstrip(b" \0") == b"%PDF-not-really"


def _as_bytes(data_set: Dataset) -> None:
    for element in list(data_set.iterall()):
        if element.tag.is_private and element.VR == "OB":
            element.VR = "UN"


def _comparable(element: DataElement) -> object:
    if element.VR == "SQ":
        return [[_comparable(each) for each in item] for item in element.value]
    if element.VR in ("DS", "IS") and not element.is_empty:
        value = element.value if element.VM > 1 else [element.value]
        return element.tag, [float(each) for each in value]
    if isinstance(element.value, bytes):
        return element.tag, element.value.rstrip(b"\0")
    return element.tag, element.VR, element.value or None if element.is_empty else element.value


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_links_lead_back_when_the_host_header_lacks_the_port(web: Web, host: str) -> None:
    made = rich(EXPLICIT_LITTLE)
    web.must_store(made)
    [data_set] = web.metadata(made.path, Host=host)
    links = links_in(data_set)
    assert len(links) == 4
    for link in links:
        assert link.startswith(f"http://{host}:{web.service.port}/v2{made.path}/bulkdata/")
        assert content_of(httpx.get(link))


def test_links_begin_with_the_public_url_and_lead_back_behind_it(public: Web) -> None:
    made = rich(EXPLICIT_LITTLE)
    public.must_store(made)
    [data_set] = public.metadata(made.path)
    links = links_in(data_set)
    assert len(links) == 4
    for link in links:
        assert link.startswith(f"{PUBLIC_URL}/v2{made.path}/bulkdata/")
        assert content_of(public.get(link.removeprefix(f"{PUBLIC_URL}/v2")))
    answer = public.store(make())
    [item] = answer.json()["00081199"]["Value"]
    assert item["00081190"]["Value"][0].startswith(f"{PUBLIC_URL}/v2/studies/")


@pytest.mark.parametrize("sample", [*samples.ct_volume(1), samples.structured_report(), samples.multiframe()])
def test_metadata_of_ordinary_instances_is_what_pydicom_reads(web: Web, sample: samples.Sample) -> None:
    assert web.store(sample.content).status_code == 200
    ref = sample.ref
    path = f"/studies/{ref.study_uid}/series/{ref.series_uid}/instances/{ref.sop_instance_uid}"
    [data_set] = web.metadata(path)
    fetched = {link: b"".join(part.content for part in frames_in(httpx.get(link))) for link in links_in(data_set)}
    read, expected = read_back(data_set, fetched.__getitem__), dcmread(BytesIO(sample.content))
    assert [element.tag for element in read] == [element.tag for element in expected]
    for element in expected:
        assert _comparable(read[element.tag]) == _comparable(element), element


def test_numbers_that_json_does_not_know_are_null(web: Web) -> None:
    made = make(change=lambda each: each.add_new(0x00189087, "FD", [float("nan"), float("inf"), 1.0]))
    web.must_store(made)
    answer = web.get(f"{made.path}/metadata")
    [data_set] = json.loads(answer.content, parse_constant=pytest.fail)
    assert data_set["00189087"] == {"vr": "FD", "Value": [None, None, 1.0]}


def test_an_instance_without_bulk_data_has_no_links(web: Web) -> None:
    made = make()
    web.must_store(made)
    [data_set] = web.metadata(made.path)
    assert links_in(data_set) == []
    assert_error(web.get(f"{made.path}/bulkdata/7FE00010"), 404, "NotFound")


# Frames


@VERSIONS
@pytest.mark.parametrize(
    "accept", [None, "*/*", 'multipart/related; type="application/octet-stream"', "multipart/related"]
)
def test_native_frames_come_in_multipart(web: Web, version: str, accept: str | None) -> None:
    frames = [bytes([number]) * 16 for number in range(5)]
    made = with_pixels(b"".join(frames), frames=5)
    web.must_store(made)
    for text, numbers in (("1", [1]), ("1,3", [1, 3]), ("5,1,1", [5, 1, 1]), ("2,3,4,5", [2, 3, 4, 5])):
        found = frames_in(web.get(f"{made.path}/frames/{text}", accept, version=version))
        assert [part.content for part in found] == [frames[number - 1] for number in numbers]
        assert {part.parameters["transfer-syntax"] for part in found} == {EXPLICIT_LITTLE}


@VERSIONS
@pytest.mark.parametrize(
    "accept", [OCTETS, f"{OCTETS}; transfer-syntax=*", f"{OCTETS}; transfer-syntax={EXPLICIT_LITTLE}"]
)
def test_one_frame_may_come_alone_and_several_may_not(web: Web, mixed: Mixed, version: str, accept: str) -> None:
    made = with_pixels(bytes(range(32)), frames=2)
    web.must_store(made)
    answer = assert_common(web.get(f"{made.path}/frames/2", accept, version=version))
    assert answer.headers["Content-Type"] == f"{OCTETS}; transfer-syntax={EXPLICIT_LITTLE}"
    assert answer.content == bytes(range(16, 32))
    error = assert_error(web.get(f"{made.path}/frames/1,2", accept, version=version), 400, "InvalidRequest")
    assert error["target"] == "frames"


@VERSIONS
@pytest.mark.parametrize(
    "accept",
    [
        "image/jpeg",
        "image/jp2",
        "application/dicom",
        "text/html",
        RELATED,
        'multipart/related; type="image/jpeg"',
        'multipart/related; type="image/png"',
        f'multipart/related; type="image/jp2"; transfer-syntax={EXPLICIT_LITTLE}',
        f'multipart/related; type="application/octet-stream"; transfer-syntax={JPEG}',
        f'multipart/related; type="application/octet-stream"; transfer-syntax={J2K}',
    ],
)
def test_another_accept_for_frames_is_406(web: Web, mixed: Mixed, version: str, accept: str) -> None:
    for place in ("frames/1", "bulkdata/7FE00010"):
        assert_error(web.get(f"{mixed.native.path}/{place}", accept, version=version), 406, "NotAcceptable")


@VERSIONS
@pytest.mark.parametrize(
    "numbers", ["0", "-1", "a", "1,a", "1,,2", ",1", "1.5", "1,0", "%20", "1;2", "99999999999", "٣"]
)
def test_frame_numbers_that_are_none_are_400(web: Web, mixed: Mixed, version: str, numbers: str) -> None:
    error = assert_error(web.get(f"{mixed.native.path}/frames/{numbers}", version=version), 400, "InvalidRequest")
    assert error["target"] == "frames"


@VERSIONS
def test_frames_that_are_not_there_are_404(web: Web, mixed: Mixed, version: str) -> None:
    one, many, none = mixed.native, encapsulated([jpeg_like(n, 40) for n in range(3)]), make()
    web.store(many, none)
    for made, numbers in ((one, "2"), (one, "1,2"), (many, "4"), (many, "3,999999999"), (mixed.rle, "2")):
        error = assert_error(web.get(f"{made.path}/frames/{numbers}", "*/*", version=version), 404, "NotFound")
        assert error["target"] == "frames"
    error = assert_error(web.get(f"{none.path}/frames/1", version=version), 404, "NotFound")
    assert "no pixel data" in error["message"]


@pytest.mark.parametrize("syntax", [EXPLICIT_LITTLE, IMPLICIT_LITTLE, DEFLATED, EXPLICIT_BIG])
@pytest.mark.parametrize("bits", [8, 16, 32])
def test_native_frames_are_little_endian_whatever_was_stored(web: Web, syntax: str, bits: int) -> None:
    cells = np.arange(3 * 4 * 5).reshape(3, 4, 5) * 7
    cells = cells.astype(f"<u{bits // 8}")
    stored = cells.astype(cells.dtype.newbyteorder(">")) if syntax == EXPLICIT_BIG else cells
    made = with_pixels(stored.tobytes(), rows=4, columns=5, bits=bits, frames=3, syntax=syntax)
    web.must_store(made)
    for accept in ("*/*", None):
        found = frames_in(web.get(f"{made.path}/frames/3,1", accept))
        assert [part.content for part in found] == [cells[2].tobytes(), cells[0].tobytes()]
        assert {part.parameters["transfer-syntax"] for part in found} == {EXPLICIT_LITTLE}


@pytest.mark.parametrize(("rows", "columns"), [(3, 5), (2, 4), (5, 7), (1, 1), (16, 16), (3, 3)])
@pytest.mark.parametrize("syntax", [EXPLICIT_LITTLE, DEFLATED])
def test_frames_of_single_bits_begin_at_a_byte(web: Web, rows: int, columns: int, syntax: str) -> None:
    bits = np.random.default_rng(rows * columns).integers(0, 2, (4, rows * columns)).astype(np.uint8)
    packed = np.packbits(bits.ravel(), bitorder="little").tobytes()
    made = with_pixels(packed, rows=rows, columns=columns, bits=1, frames=4, syntax=syntax)
    web.must_store(made)
    found = frames_in(web.get(f"{made.path}/frames/1,2,3,4"))
    assert [part.content for part in found] == [np.packbits(frame, bitorder="little").tobytes() for frame in bits]
    assert_error(web.get(f"{made.path}/frames/5"), 404, "NotFound")


def test_colour_frames_have_all_their_samples(web: Web) -> None:
    cells = np.arange(2 * 4 * 4 * 3, dtype=np.uint8)
    made = with_pixels(
        cells.tobytes(), frames=2, SamplesPerPixel=3, PhotometricInterpretation="RGB", PlanarConfiguration=0
    )
    web.must_store(made)
    found = frames_in(web.get(f"{made.path}/frames/1,2"))
    assert b"".join(part.content for part in found) == cells.tobytes()
    assert [len(part.content) for part in found] == [48, 48]


@pytest.mark.parametrize("fragments", [1, 3])
@pytest.mark.parametrize("has_table", [True, False])
@pytest.mark.parametrize("count", [1, 4])
def test_encapsulated_frames_are_their_fragments_joined(web: Web, fragments: int, has_table: bool, count: int) -> None:
    streams = [jpeg_like(number, 300 + 12 * number) for number in range(count)]
    made = encapsulated(streams, fragments=fragments, has_table=has_table)
    web.must_store(made)
    numbers = list(range(count, 0, -1))
    for accept in ("*/*", f'multipart/related; type="{OCTETS}"; transfer-syntax=*'):
        found = frames_in(web.get(f"{made.path}/frames/{','.join(map(str, numbers))}", accept))
        assert [part.content for part in found] == [streams[number - 1] for number in numbers]
        assert {part.parameters["transfer-syntax"] for part in found} == {JPEG}
    alone = assert_common(web.get(f"{made.path}/frames/{count}", f"{OCTETS}; transfer-syntax=*"))
    assert alone.content == streams[-1]
    [data_set] = web.metadata(made.path)
    found = frames_in(httpx.get(data_set["7FE00010"]["BulkDataURI"], headers={"Accept": "*/*"}))
    assert [part.content for part in found] == streams


def test_a_large_frame_is_streamed(web: Web) -> None:
    frames = [bytes([number]) * (5 << 20) for number in range(2)]
    made = with_pixels(b"".join(frames), rows=2048, columns=2560, frames=2)
    web.must_store(made)
    found = frames_in(web.get(f"{made.path}/frames/2,1"))
    assert [part.content for part in found] == [frames[1], frames[0]]


def test_compressed_frames_are_decoded_for_whoever_asks_for_no_syntax(web: Web, mixed: Mixed) -> None:
    for made in (mixed.rle, mixed.j2k):
        for accept in (None, f'multipart/related; type="{OCTETS}"'):
            [part] = frames_in(web.get(f"{made.path}/frames/1", accept))
            assert part.parameters == {"transfer-syntax": EXPLICIT_LITTLE}
            assert part.content == PIXELS.tobytes()
        [part] = frames_in(web.get(f"{made.path}/frames/1", "*/*"))
        assert part.parameters == {"transfer-syntax": RLE if made is mixed.rle else J2K}
        stored = dcmread(BytesIO(made.content)).PixelData
        assert part.content in stored


@pytest.mark.parametrize(
    ("media_type", "syntax"), [("image/jp2", J2K), ("image/jls", JPEG_LS), ("image/dicom-rle", RLE)]
)
def test_frames_are_encoded_for_whoever_asks_for_an_image(web: Web, mixed: Mixed, media_type: str, syntax: str) -> None:
    for made in mixed.all:
        for suffix in ("", f"; transfer-syntax={syntax}", "; transfer-syntax=" + syntax + ";q=0.3, text/html"):
            accept = f'multipart/related; type="{media_type}"{suffix}'
            [part] = frames_in(web.get(f"{made.path}/frames/1", accept), media_type)
            assert part.parameters == {"transfer-syntax": syntax}
            decoded = dcmread(BytesIO(image(EXPLICIT_LITTLE).content))
            decoded.PixelData = encapsulate([part.content])
            decoded["PixelData"].is_undefined_length = True
            decoded.file_meta.TransferSyntaxUID = UID(syntax)
            assert np.array_equal(decoded.pixel_array, PIXELS)


# Bulk data


def test_bulk_data_of_words_is_little_endian(web: Web) -> None:
    values = {
        0x00091001: ("OW", np.arange(9), ">u2"),
        0x00091002: ("OL", np.arange(5), ">u4"),
        0x00091003: ("OF", np.arange(5) / 4, ">f4"),
        0x00091004: ("OD", np.arange(5) / 8, ">f8"),
        0x00091005: ("OB", np.arange(6), ">u1"),
        0x00091006: ("OW", np.arange(600_000) % 65521, ">u2"),
    }

    def change(made: Dataset) -> None:
        made.private_block(0x0009, "DICOM DEPOT TEST", create=True)
        for tag, (vr, numbers, kind) in values.items():
            made.add_new(tag, vr, numbers.astype(kind).tobytes())

    made = make(syntax=EXPLICIT_BIG, change=change)
    web.must_store(made)
    [data_set] = web.metadata(made.path)
    for tag, (vr, numbers, kind) in values.items():
        element = data_set[f"{tag:08X}"]
        assert element["vr"] == vr
        content = content_of(httpx.get(element["BulkDataURI"]))
        assert np.array_equal(np.frombuffer(content, kind.replace(">", "<")), numbers.astype(kind))


def test_bulk_data_may_come_alone(web: Web) -> None:
    made = rich(EXPLICIT_LITTLE)
    web.must_store(made)
    answer = assert_common(web.get(f"{made.path}/bulkdata/00091001", OCTETS))
    assert answer.headers["Content-Type"] == f"{OCTETS}; transfer-syntax={EXPLICIT_LITTLE}"
    assert answer.content == b"outer!"
    assert answer.headers["Content-Length"] == "6"


@pytest.mark.parametrize("path", ["7FE00010", "00091003", "00091001/0/00111010", "00080018", "x", "00081032", "%00"])
def test_bulk_data_that_is_not_there_is_404(web: Web, path: str) -> None:
    made = rich(EXPLICIT_LITTLE)
    web.must_store(made)
    error = assert_error(web.get(f"{made.path}/bulkdata/{path}"), 404, "NotFound")
    assert error["target"] == "bulkdata"


@pytest.mark.parametrize("media_type", ["image/jp2", "image/jls", "image/dicom-rle"])
def test_bulk_data_that_is_no_image_is_not_called_one(web: Web, mixed: Mixed, media_type: str) -> None:
    made = rich(EXPLICIT_LITTLE)
    web.must_store(made)
    accept = f'multipart/related; type="{media_type}"'
    for path in (f"{made.path}/bulkdata/00091001", f"{mixed.native.path}/bulkdata/7FE00010"):
        assert_error(web.get(path, accept), 406, "NotAcceptable")
    assert content_of(web.get(f"{made.path}/bulkdata/00091001", f"{accept}, */*;q=0.1")) == b"outer!"


def test_a_long_text_is_bulk_data(web: Web) -> None:
    text = b"long " * 20_000
    made = make(elements=[Raw(0x00404041 - 0x41 + 0xA160 - 0x4000, "UT", text)])
    web.must_store(made)
    [data_set] = web.metadata(made.path)
    [link] = links_in(data_set)
    assert content_of(httpx.get(link)) == text


def test_what_was_replaced_or_deleted_is_not_served_any_more(web: Web) -> None:
    old = with_pixels(bytes(16))
    web.must_store(old)
    uids = {"StudyInstanceUID": old.study, "SeriesInstanceUID": old.series, "SOPInstanceUID": old.sop}
    new = with_pixels(bytes([7]) * 16, **dict[str, Any](uids))
    web.must_store(new, method="PUT")
    for path, accept in ((f"{old.path}/frames/1", OCTETS), (f"{old.path}/bulkdata/7FE00010", OCTETS)):
        assert web.get(path, accept).content == bytes([7]) * 16
    assert web.original(old) == new.content
    assert web.client.delete(f"/v2{old.path}").status_code == 204
    for path in ("", "/metadata", "/frames/1", "/bulkdata/7FE00010"):
        assert_error(web.get(f"{old.path}{path}"), 404, "NotFound")
    assert_error(web.get(f"/studies/{old.study}"), 404, "NotFound")
