"""Storing over DICOMweb: what is taken, what is refused and how that is said (PS3.18 section 10.5)."""

from __future__ import annotations

import gzip
import random
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from tests.http.answers import COMMON_HEADERS, assert_error
from tests.http.dicomweb.conftest import (
    IMPLICIT_LITTLE,
    RELATED,
    SOP_CLASS,
    Made,
    Raw,
    Web,
    make,
    make_with,
    multipart,
    new_uid,
    open_web,
    with_pixels,
)

VERSIONS = pytest.mark.parametrize("version", ["v1", "v2"])
INSTANCE_BYTES_MAX = 2 << 20
INSTANCES_MAX = 3


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Web]:
    """A service with low limits on what a request may hold."""
    settings = {"store_instance_bytes_max": INSTANCE_BYTES_MAX, "store_instances_max": INSTANCES_MAX}
    with open_web(tmp_path_factory.mktemp("small"), **settings) as running:
        yield running


def values(item: dict[str, Any], tag: str) -> list[Any]:
    return list(item[tag].get("Value", []))


def outcomes(answer: httpx.Response, tag: str) -> list[dict[str, Any]]:
    """The items of ReferencedSOPSequence or FailedSOPSequence; none where it is left out."""
    assert answer.headers["Content-Type"] == "application/dicom+json"
    assert COMMON_HEADERS.items() <= dict(answer.headers).items()
    content = answer.json()
    assert tag not in content or content[tag]["vr"] == "SQ"
    return values(content, tag) if tag in content else []


def stored(answer: httpx.Response) -> list[dict[str, Any]]:
    return outcomes(answer, "00081199")


def failed(answer: httpx.Response) -> list[dict[str, Any]]:
    return outcomes(answer, "00081198")


def comments(item: dict[str, Any]) -> list[str]:
    found = []
    for each in values(item, "00741048"):
        assert list(each) == ["00000902"]
        assert each["00000902"]["vr"] == "LO"
        found += each["00000902"]["Value"]
    return found


def failure(answer: httpx.Response) -> tuple[int, list[str]]:
    """Reason and comments of the only instance, which was not stored."""
    assert answer.status_code == 409, answer.text
    assert stored(answer) == []
    [item] = failed(answer)
    return item["00081197"]["Value"][0], comments(item) if "00741048" in item else []


def sop_uids(items: list[dict[str, Any]]) -> list[str]:
    return [item["00081155"]["Value"][0] for item in items]


def assert_nothing_stored(web: Web, *made: Made, files: set[Path]) -> None:
    for each in made:
        assert_error(web.get(each.path), 404, "NotFound")
    assert web.store_files() == files


# Accept


@VERSIONS
@pytest.mark.parametrize(
    "accept",
    [
        "*/*",
        "application/*",
        "application/json",
        "application/dicom+json",
        "Application/DICOM+JSON",
        "application/dicom+json; charset=utf-8",
        "text/html, application/dicom+json;q=0.1",
        "application/dicom, */*",
    ],
)
def test_accept_may_name_anything_that_dicom_json_is(web: Web, version: str, accept: str) -> None:
    made = make()
    answer = web.send(multipart(made.content), version=version, headers={"Accept": accept})
    assert answer.status_code == 200
    assert sop_uids(stored(answer)) == [made.sop]


@VERSIONS
def test_a_missing_accept_gets_dicom_json(web: Web, version: str) -> None:
    made = make()
    request = web.client.build_request(
        "POST", f"/{version}/studies", content=multipart(made.content), headers={"Content-Type": RELATED}
    )
    del request.headers["Accept"]
    answer = web.client.send(request)
    assert answer.status_code == 200
    assert sop_uids(stored(answer)) == [made.sop]


@VERSIONS
@pytest.mark.parametrize(
    "accept", ["application/dicom", "application/data", "text/html", "application/dicom+xml", "application/json;q=0"]
)
def test_another_accept_is_406_and_nothing_is_stored(web: Web, version: str, accept: str) -> None:
    made, files = make(), web.store_files()
    answer = web.send(multipart(made.content), version=version, headers={"Accept": accept})
    assert_error(answer, 406, "NotAcceptable")
    assert_nothing_stored(web, made, files=files)


# Content types of the request


@VERSIONS
@pytest.mark.parametrize(
    "content_type",
    [
        'multipart/related; type="application/dicom"; boundary=b',
        "multipart/related; type=application/dicom; boundary=b",
        "multipart/related; boundary=b",
        'multipart/related; boundary="b"; type="application/dicom"',
        'Multipart/Related; TYPE="Application/DICOM"; BOUNDARY=b',
        'multipart/related;type="application/dicom";boundary=b',
        'multipart/related; boundary=b; start-info=""',
    ],
)
def test_multipart_content_types_that_are_taken(web: Web, version: str, content_type: str) -> None:
    made = make()
    answer = web.send(multipart(made.content), content_type, version=version)
    assert answer.status_code == 200, answer.text
    assert web.original(made) == made.content


@VERSIONS
@pytest.mark.parametrize("content_type", ["application/dicom", "Application/DICOM"])
def test_one_instance_may_be_the_body(web: Web, version: str, content_type: str) -> None:
    made = make()
    answer = web.send(made.content, content_type, version=version)
    assert answer.status_code == 200, answer.text
    assert sop_uids(stored(answer)) == [made.sop]
    assert web.original(made) == made.content


@VERSIONS
@pytest.mark.parametrize(
    "content_type",
    [
        None,
        "",
        "application/json",
        "application/dicom+json",
        "application/octet-stream",
        "application",
        "application/dicom; =",
        "multipart/related",
        'multipart/related; type="application/dicom"',
        "multipart/form-data; boundary=b",
        "multipart/mixed; boundary=b",
        'multipart/related; type="application/dicom+json"; boundary=b',
        'multipart/related; type="application/octet-stream"; boundary=b',
    ],
)
def test_other_content_types_are_415_and_nothing_is_stored(web: Web, version: str, content_type: str | None) -> None:
    made, files = make(), web.store_files()
    answer = web.send(multipart(made.content), content_type, version=version)
    error = assert_error(answer, 415, "UnsupportedMediaType")
    assert error["target"] == "Content-Type"
    assert_nothing_stored(web, made, files=files)


@VERSIONS
def test_the_parameter_start_is_400(web: Web, version: str) -> None:
    made, files = make(), web.store_files()
    answer = web.send(multipart(made.content), f"{RELATED}; start=x", version=version)
    assert_error(answer, 400, "InvalidRequest")
    assert_nothing_stored(web, made, files=files)


@VERSIONS
@pytest.mark.parametrize(
    "head",
    [
        b"Content-Type: application/dicom+json\r\n",
        b"Content-Type: application/octet-stream\r\n",
        b"Content-Type: image/jpeg\r\n",
        b"Content-Type: no media type\r\n",
        b"Content-Type: \r\n",
        b"Content-Type: application/dicom\r\nContent-Transfer-Encoding: base64\r\n",
        b"Content-Type: application/dicom\r\nContent-Transfer-Encoding: quoted-printable\r\n",
    ],
)
def test_one_part_of_another_type_refuses_the_whole_request(web: Web, version: str, head: bytes) -> None:
    good, bad, large = make(), make(), with_pixels(bytes(2 << 20), rows=1024, columns=2048)
    files = web.store_files()
    first = multipart(large.content, good.content).removesuffix(b"--b--\r\n")
    answer = web.send(first + multipart(bad.content, head=head), version=version)
    assert_error(answer, 415, "UnsupportedMediaType")
    assert_nothing_stored(web, good, bad, large, files=files)


@VERSIONS
@pytest.mark.parametrize(
    "head",
    [
        b"",
        b"Content-Type: application/dicom; transfer-syntax=1.2.840.10008.1.2.1\r\n",
        b"content-type:application/dicom\r\n",
        b"CONTENT-TYPE: APPLICATION/DICOM\r\nContent-Transfer-Encoding: binary\r\n",
        b'Content-Disposition: attachment; name="file"; filename="a.dcm"\r\nContent-Type: application/dicom\r\n',
        b"Content-Type: application/dicom\r\nContent-Length: 4\r\nContent-ID: <1>\r\nContent-Location: /x\r\n",
        b"Content-Type: application/dicom;\r\n transfer-syntax=1.2.840.10008.1.2.1\r\n",
    ],
)
def test_heads_of_parts_that_are_taken(web: Web, version: str, head: bytes) -> None:
    first, second = make(), make()
    answer = web.send(multipart(first.content, second.content, head=head), version=version)
    assert answer.status_code == 200, answer.text
    assert sop_uids(stored(answer)) == [first.sop, second.sop]
    assert web.original(second) == second.content


@VERSIONS
@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "identity, gzip"])
def test_a_compressed_body_is_415(web: Web, version: str, encoding: str) -> None:
    made, files = make(), web.store_files()
    for body, content_type in ((made.content, "application/dicom"), (multipart(made.content), RELATED)):
        answer = web.send(gzip.compress(body), content_type, version=version, headers={"Content-Encoding": encoding})
        assert assert_error(answer, 415, "UnsupportedMediaType")["target"] == "Content-Encoding"
    assert_nothing_stored(web, made, files=files)


# Paths


@VERSIONS
@pytest.mark.parametrize("study", ["abc", "1.2.", "1." * 33 + "1", "1.2.3%2F4", "-1", "%20"])
def test_a_study_that_is_no_uid_is_400(web: Web, version: str, study: str) -> None:
    made, files = make(), web.store_files()
    error = assert_error(web.store(made, version=version, study=study), *_refusal_of(study))
    assert error["message"]
    assert_nothing_stored(web, made, files=files)


def _refusal_of(study: str) -> tuple[int, str]:
    return (404, "NotFound") if "%2F" in study else (400, "InvalidIdentifier")


@VERSIONS
def test_the_study_of_the_path_is_in_the_answer_once_something_is_stored(web: Web, version: str) -> None:
    study = new_uid()
    first, second = make(study=study), make(study=study)
    answer = web.store(first, second, version=version, study=study)
    assert answer.status_code == 200
    assert answer.json()["00081190"] == {
        "vr": "UR",
        "Value": [f"{web.service.url}/{version}/studies/{study}"],
    }
    assert sop_uids(stored(answer)) == [first.sop, second.sop]


@VERSIONS
def test_without_a_study_in_the_path_or_without_success_there_is_no_top_level_url(web: Web, version: str) -> None:
    made = make()
    assert "00081190" not in web.store(made, version=version).json()
    again = web.store(made, version=version, study=made.study)
    assert failure(again)[0] == 45070
    assert "00081190" not in again.json()


@VERSIONS
def test_an_instance_of_another_study_fails_alone(web: Web, version: str) -> None:
    study = new_uid()
    ours, other = make(study=study), make()
    answer = web.store(other, ours, version=version, study=study)
    assert answer.status_code == 202
    assert sop_uids(stored(answer)) == [ours.sop]
    [item] = failed(answer)
    assert sop_uids([item]) == [other.sop]
    assert values(item, "00081197") == [43264]  # 43265 is documented and never sent
    [comment] = comments(item)
    assert comment.startswith("DICOM100: (0020,000d) - ")
    assert not web.is_stored(other)
    alone = web.store(other, version=version, study=study)
    assert failure(alone) == (43264, [comment])


@VERSIONS
@pytest.mark.parametrize(("in_file", "in_path"), [("{} ", "{}"), ("{}\0", "{}%20"), ("{}", "{}%20%20")])
def test_padding_does_not_make_another_study(web: Web, version: str, in_file: str, in_path: str) -> None:
    study = new_uid()
    made = make(study=in_file.format(study))
    answer = web.store(made, version=version, study=in_path.format(study))
    assert answer.status_code == 200, answer.text
    assert values(answer.json(), "00081190") == [f"{web.service.url}/{version}/studies/{study}"]


# Status and data set


@VERSIONS
def test_the_answer_element_by_element(web: Web, version: str) -> None:
    good, odd = make(), make(syntax=IMPLICIT_LITTLE)
    twice = make()
    web.must_store(twice)
    answer = web.store(good, twice, odd, b"no DICOM", version=version)
    assert answer.status_code == 202
    url = f"{web.service.url}/{version}"
    empty_sequence = {"00741048": {"vr": "SQ"}} if version == "v2" else {}
    assert answer.json() == {
        "00081198": {
            "vr": "SQ",
            "Value": [
                {
                    "00081150": {"vr": "UI", "Value": [SOP_CLASS]},
                    "00081155": {"vr": "UI", "Value": [twice.sop]},
                    "00081197": {"vr": "US", "Value": [45070]},
                    "00741048": failed(answer)[0]["00741048"],
                },
                {"00081197": {"vr": "US", "Value": [43264]}},
            ],
        },
        "00081199": {
            "vr": "SQ",
            "Value": [
                {
                    "00081150": {"vr": "UI", "Value": [SOP_CLASS]},
                    "00081155": {"vr": "UI", "Value": [good.sop]},
                    "00081190": {"vr": "UR", "Value": [f"{url}{good.path}"]},
                }
                | empty_sequence,
                {
                    "00081150": {"vr": "UI", "Value": [SOP_CLASS]},
                    "00081155": {"vr": "UI", "Value": [odd.sop]},
                    "00081190": {"vr": "UR", "Value": [f"{url}{odd.path}"]},
                    "00081196": {"vr": "US", "Value": [45063]},
                }
                | empty_sequence,
            ],
        },
    }


@VERSIONS
def test_links_follow_the_host_header(web: Web, version: str) -> None:
    made = make()
    answer = web.send(multipart(made.content), version=version, headers={"Host": "localhost"})
    [item] = stored(answer)
    assert values(item, "00081190") == [f"http://localhost:{web.service.port}/{version}{made.path}"]


@VERSIONS
def test_outcomes_come_in_the_order_of_the_parts(web: Web, version: str) -> None:
    made = [make() for _ in range(6)]
    web.must_store(made[1], made[4])
    answer = web.store(*made, version=version)
    assert answer.status_code == 202
    assert sop_uids(stored(answer)) == [made[place].sop for place in (0, 2, 3, 5)]
    assert sop_uids(failed(answer)) == [made[1].sop, made[4].sop]


@VERSIONS
@pytest.mark.parametrize("body", [b"--b--\r\n", b"--b--", b"\r\n--b--\r\n", b"preamble\r\n--b--\r\nepilogue"])
def test_no_part_at_all_is_204(web: Web, version: str, body: bytes) -> None:
    answer = web.send(body, version=version)
    assert answer.status_code == 204
    assert answer.content == b""
    assert COMMON_HEADERS.items() <= dict(answer.headers).items()


@VERSIONS
@pytest.mark.parametrize("content", [b"", b"\0", b"no DICOM at all", bytes(128) + b"DICM", bytes(200_000)])
def test_what_is_no_instance_fails_with_the_reason_alone(web: Web, version: str, content: bytes) -> None:
    for answer in (web.send(content, "application/dicom", version=version), web.store(content, version=version)):
        assert answer.status_code == 409
        [item] = failed(answer)
        assert values(item, "00081197") == [43264]
        assert not {"00081150", "00081155"} & item.keys()
        assert list(answer.json()) == ["00081198"]


@VERSIONS
def test_an_empty_part_beside_a_good_one_is_202(web: Web, version: str) -> None:
    made = make()
    answer = web.store(b"", made, version=version)
    assert answer.status_code == 202
    assert failed(answer) == [{"00081197": {"vr": "US", "Value": [43264]}}]
    assert sop_uids(stored(answer)) == [made.sop]


@VERSIONS
@pytest.mark.parametrize("name", ["StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "SOPClassUID"])
def test_an_identifying_attribute_must_be_there_and_be_a_uid(web: Web, version: str, name: str) -> None:
    files = web.store_files()
    for made in (make(without=[name]), *(make_with(name, value) for value in ("", "1.2.x", "1." * 33 + "1"))):
        answer = web.store(made, version=version)
        reason, [comment] = failure(answer)
        assert reason == 43264
        assert comment.startswith("DICOM100: ")
        assert name in comment
        [item] = failed(answer)
        if name not in ("SOPInstanceUID", "SOPClassUID"):
            assert sop_uids([item]) == [made.sop]
            assert values(item, "00081150") == [SOP_CLASS]
    assert web.store_files() == files


@VERSIONS
def test_a_file_that_is_cut_off_is_stored_or_refused_and_never_half(web: Web, version: str) -> None:
    made = with_pixels(bytes(4096), rows=64, columns=64)
    for length in (129, 200, len(made.content) - 4090):
        answer = web.store(made.content[:length], version=version)
        if answer.status_code == 409:
            assert failure(answer)[0] == 43264
        else:
            assert web.original(made) == made.content[:length]


@VERSIONS
def test_the_same_instance_twice_in_one_request_is_stored_once(web: Web, version: str) -> None:
    made = make()
    answer = web.store(made, made, version=version)
    assert answer.status_code == 202
    assert sop_uids(stored(answer)) == sop_uids(failed(answer)) == [made.sop]
    assert values(failed(answer)[0], "00081197") == [45070]
    assert len(web.metadata(f"/studies/{made.study}")) == 1


@VERSIONS
def test_of_two_instances_with_the_same_uids_the_first_stays(web: Web, version: str) -> None:
    first = make(PatientName="First")
    second = make(study=first.study, series=first.series, sop=first.sop, PatientName="Second")
    files = web.store_files()
    assert web.store(first, second, version=version).status_code == 202
    assert failure(web.store(second, version=version))[0] == 45070
    assert web.original(first) == first.content
    assert len(web.store_files() - files) == 1


@VERSIONS
def test_a_deleted_instance_may_be_stored_again(web: Web, version: str) -> None:
    made = make()
    web.must_store(made)
    assert web.client.delete(f"/{version}{made.path}").status_code == 204
    answer = web.store(made, version=version)
    assert answer.status_code == 200
    assert web.original(made) == made.content


@VERSIONS
def test_uids_match_with_and_without_padding(web: Web, version: str) -> None:
    plain = make()
    padded = make(study=f"{plain.study} ", series=f"{plain.series} ", sop=f"{plain.sop} ")
    assert web.store(padded, version=version).status_code == 200
    assert failure(web.store(plain, version=version))[0] == 45070
    for pad in ("", "%20"):
        answer = web.get(f"{plain.path}{pad}", "application/dicom; transfer-syntax=*")
        assert answer.content == padded.content


@VERSIONS
def test_equal_uids_on_all_levels_are_allowed(web: Web, version: str) -> None:
    uid = new_uid()
    made = make(study=uid, series=uid, sop=uid)
    assert web.store(made, version=version).status_code == 200
    assert web.original(made) == made.content


@VERSIONS
def test_the_same_instance_uid_in_another_series_is_another_instance(web: Web, version: str) -> None:
    first = make()
    second = make(study=first.study, sop=first.sop)
    assert web.store(first, second, version=version).status_code == 200


@VERSIONS
def test_files_are_kept_byte_for_byte(web: Web, version: str) -> None:
    made = make(preamble=bytes(range(128)), elements=[Raw(0x00280010, "US", b"\1\0"), Raw(0xFFFCFFFC, "OB", bytes(6))])
    assert web.store(made, version=version).status_code == 200
    assert web.original(made) == made.content


# Warnings


@pytest.mark.parametrize(("version", "status"), [("v1", 200), ("v2", 202)])
def test_implicit_vr_is_warned_of(web: Web, version: str, status: int) -> None:
    made = make(syntax=IMPLICIT_LITTLE)
    answer = web.store(made, version=version)
    assert answer.status_code == status
    [item] = stored(answer)
    assert values(item, "00081196") == [45063]


def test_the_warning_of_implicit_vr_wins_and_comments_stay(web: Web) -> None:
    made = make(syntax=IMPLICIT_LITTLE, PatientBirthDate="1970")
    answer = web.store(made)
    assert answer.status_code == 202
    [item] = stored(answer)
    assert values(item, "00081196") == [45063]
    [comment] = comments(item)
    assert comment.startswith("DICOM100: (0010,0030) - ")


@VERSIONS
@pytest.mark.parametrize("name", ["StudyDescription", "Modality", "AccessionNumber", "PatientName", "PatientID"])
def test_several_values_where_the_index_has_one_are_told_in_the_warning_header(
    web: Web, version: str, name: str
) -> None:
    made = make_with(name, ["A", "B"])
    answer = web.store(made, version=version)
    assert answer.status_code == 200, answer.text
    assert answer.headers["Warning"].startswith(f'299 127.0.0.1:{web.service.port}: "')
    assert answer.headers["Warning"].endswith('"')
    assert web.is_stored(made)
    assert "Warning" not in web.store(make(ImageType=["A", "B"]), version=version).headers


# Validation, version 1: the indexed attributes by minimum rules

INDEXED = {
    "StudyDate": 0x00080020,
    "StudyTime": 0x00080030,
    "AccessionNumber": 0x00080050,
    "Modality": 0x00080060,
    "ReferringPhysicianName": 0x00080090,
    "StudyDescription": 0x00081030,
    "ManufacturerModelName": 0x00081090,
    "PatientName": 0x00100010,
    "PatientID": 0x00100020,
    "PatientBirthDate": 0x00100030,
    "PerformedProcedureStepStartDate": 0x00400244,
    "SeriesNumber": 0x00200011,
    "Rows": 0x00280010,
}
BAD_INDEXED = [
    ("StudyDate", "DA", b"2024-01-02"),
    ("StudyDate", "DA", b"20241301"),
    ("StudyDate", "DA", b"2024"),
    ("PatientBirthDate", "DA", b"19700132"),
    ("PerformedProcedureStepStartDate", "DA", b"yesterday "),
    ("StudyTime", "TM", b"2530"),
    ("AccessionNumber", "SH", b"x" * 18),
    ("Modality", "CS", b"X" * 18),
    ("StudyDescription", "LO", b"x" * 66),
    ("StudyDescription", "LO", b"a\1"),
    ("ManufacturerModelName", "LO", b"a\r\n "),
    ("PatientID", "LO", b"x" * 66),
    ("PatientName", "PN", b"x" * 66),
    ("PatientName", "PN", b"a=b=c=d "),
    ("PatientName", "PN", b"a^b^c^d^e^f "),
    ("ReferringPhysicianName", "PN", b"a=" + b"y" * 66),
    ("SeriesNumber", "IS", b"one "),
    ("Rows", "US", b"\1\2\3\4\5\6\7"),
]
WRONG_VR = [
    ("StudyDescription", "SH", b"fits"),
    ("StudyDate", "LO", b"20240102"),
    ("Rows", "UL", b"\1\0\0\0"),
]


@pytest.mark.parametrize(("name", "vr", "value"), [*BAD_INDEXED, *WRONG_VR])
def test_version_1_refuses_an_instance_for_a_bad_indexed_attribute(web: Web, name: str, vr: str, value: bytes) -> None:
    made, files = make(elements=[Raw(INDEXED[name], vr, value)]), web.store_files()
    answer = web.store(made, version="v1")
    reason, [comment] = failure(answer)
    assert reason == 43264
    tag = INDEXED[name]
    assert comment.startswith(f"DICOM100: ({tag >> 16:04x},{tag & 0xFFFF:04x}) - {name}")
    assert vr in comment or name == "Rows"
    assert sop_uids(failed(answer)) == [made.sop]
    assert_nothing_stored(web, made, files=files)


def test_version_1_names_every_bad_indexed_attribute(web: Web) -> None:
    bad = [Raw(INDEXED["StudyDate"], "DA", b"2024"), Raw(INDEXED["Modality"], "CS", b"X" * 18)]
    reason, found = failure(web.store(make(elements=bad), version="v1"))
    assert reason == 43264
    assert sorted(comment.split(" - ")[0] for comment in found) == ["DICOM100: (0008,0020)", "DICOM100: (0008,0060)"]


@pytest.mark.parametrize(
    "element",
    [
        Raw(0x00080060, "CS", b"lower case"),
        Raw(0x00080020, "DA", b""),
        Raw(0x00080050, "SH", b""),
        Raw(0x00080050, "SH", b"x" * 16),
        Raw(0x00081030, "LO", b"x" * 64),
        Raw(0x00100010, "PN", b"a^b^c^d^e=f=g "),
        Raw(0x00100010, "PN", b"x" * 64 + b"=" + b"y" * 63),
        Raw(0x00280010, "US", b""),
        Raw(0x00101010, "AS", b"old!"),  # not indexed, and so not looked at
        Raw(0x00101010, "AS", b"much too old"),
        Raw(0x00080070, "LO", b"x" * 300),
        Raw(0x00080022, "DA", b"never "),
        Raw(0x00091001, "DA", b"never "),
        Raw(0x00280030, "LO", b"not a DS"),
    ],
)
def test_version_1_takes_what_its_minimum_rules_allow(web: Web, element: Raw) -> None:
    made = make(elements=[element])
    answer = web.store(made, version="v1")
    assert answer.status_code == 200, answer.text
    assert web.original(made) == made.content


# Validation, version 2: every attribute, and a bad one is left out of the metadata

BAD_ANYWHERE = [
    *((INDEXED[name], vr, value) for name, vr, value in BAD_INDEXED if name != "PatientID"),
    (0x00080060, "CS", b"lower case"),
    (0x00101010, "AS", b"old!"),
    (0x00101010, "AS", b"much too old"),
    (0x00101030, "DS", b"heavy "),
    (0x00101030, "DS", b"1234567.8901234567"),
    (0x0008002A, "DT", b"2024010203040506070809"),
    (0x00080070, "LO", b"x" * 66),
    (0x00201208, "IS", b"2.5 "),
    (0x00200052, "UI", b"1.2.x "),
    (0x00400275 + 0xD, "DA", b"never "),
    (0x00080055, "AE", b"x" * 18),
    (0x00189087, "FD", b"1234"),
    (0x00091001, "DA", b"never "),
    (0x00091002, "CS", b"x" * 18),
]


@pytest.mark.parametrize(("tag", "vr", "value"), BAD_ANYWHERE)
def test_version_2_stores_a_bad_attribute_and_leaves_it_out_of_the_metadata(
    web: Web, tag: int, vr: str, value: bytes
) -> None:
    elements = [Raw(0x00090010, "LO", b"PRIVATE "), Raw(tag, vr, value)]
    made = make(elements=elements)
    answer = web.store(made)
    assert answer.status_code == 202, answer.text
    assert failed(answer) == []
    [item] = stored(answer)
    assert values(item, "00081196") == [1]
    [comment] = comments(item)
    assert comment.startswith(f"DICOM100: ({tag >> 16:04x},{tag & 0xFFFF:04x}) - ")
    text = value.decode("latin-1").strip()
    assert len(text) < 5 or text not in comment  # a value may be a patient's
    [metadata] = web.metadata(made.path)
    assert f"{tag:08X}" not in metadata
    assert metadata["00080018"]["Value"] == [made.sop]
    assert metadata["00090010"]["Value"] == ["PRIVATE"]
    assert web.original(made) == made.content


def test_version_2_warns_of_every_bad_attribute(web: Web) -> None:
    elements = [Raw(0x00080020, "DA", b"2024"), Raw(0x00101010, "AS", b"old!"), Raw(0x00091001, "DA", b"never ")]
    answer = web.store(make(elements=elements))
    [item] = stored(answer)
    assert sorted(comment.split(" - ")[0] for comment in comments(item)) == [
        "DICOM100: (0008,0020)",
        "DICOM100: (0009,1001)",
        "DICOM100: (0010,1010)",
    ]


def test_version_2_looks_into_sequences_and_keeps_what_is_good_around(web: Web) -> None:
    inner, middle = Dataset(), Dataset()
    inner.add_new(0x00080020, "DA", "2024")
    inner.CodeValue = "GOOD"
    middle.ConceptNameCodeSequence = Sequence([inner])
    made = make(change=lambda each: setattr(each, "ContentSequence", Sequence([middle])))
    answer = web.store(made)
    assert answer.status_code == 202, answer.text
    [item] = stored(answer)
    assert values(item, "00081196") == [1]
    [comment] = comments(item)
    assert comment.startswith("DICOM100: (0008,0020) - ")
    [metadata] = web.metadata(made.path)
    assert metadata["00080020"]["Value"] == ["20240102"]  # the outer one, which is good
    nested = metadata["0040A730"]["Value"][0]["0040A043"]["Value"][0]
    assert nested["00080100"]["Value"] == ["GOOD"]
    assert "00080020" not in nested
    assert web.original(made) == made.content
    assert web.store(make(change=lambda each: setattr(each, "ContentSequence", Sequence([middle]))), version="v1")


def test_version_1_does_not_look_into_sequences(web: Web) -> None:
    inner = Dataset()
    inner.add_new(0x00080020, "DA", "2024")
    made = make(change=lambda each: setattr(each, "ContentSequence", Sequence([inner])))
    assert web.store(made, version="v1").status_code == 200
    [metadata] = web.metadata(made.path)
    assert metadata["0040A730"]["Value"][0]["00080020"]["Value"] == ["2024"]


@pytest.mark.parametrize(
    "element",
    [
        Raw(0x00080050, "SH", b"A1\0\0"),
        Raw(0x00081030, "LO", b"trailing\0\0"),
        Raw(0x00080020, "DA", b"20240102\0\0"),
        Raw(0x00080020, "DA", b""),
        Raw(0x00101010, "AS", b"034Y"),
        Raw(0x00200011, "IS", b"-12 "),
        Raw(0x00101030, "DS", b" 7.5E1"),
    ],
)
def test_version_2_does_not_warn_of_padding_and_of_good_values(web: Web, element: Raw) -> None:
    made = make(elements=[element])
    answer = web.store(made)
    assert answer.status_code == 200, answer.text
    [metadata] = web.metadata(made.path)
    assert f"{element.tag:08X}" in metadata


@pytest.mark.parametrize(
    ("version", "patient_id", "status"),
    [
        ("v1", None, 409),
        ("v1", b"", 409),
        ("v1", b"  ", 409),
        ("v2", None, 409),
        ("v2", b"", 202),
        ("v2", b"  ", 202),
        ("v1", b"P1", 200),
        ("v2", b"P1", 200),
    ],
)
def test_the_patient_id_must_be_there_and_in_version_1_have_a_value(
    web: Web, version: str, patient_id: bytes | None, status: int
) -> None:
    elements = [] if patient_id is None else [Raw(0x00100020, "LO", patient_id)]
    made = make(without=["PatientID"], elements=elements)
    answer = web.store(made, version=version)
    assert answer.status_code == status, answer.text
    items = failed(answer) if status == 409 else stored(answer)
    expected = [] if status == 200 else ["DICOM100: (0010,0020)"]
    assert [comment.split(" - ")[0] for item in items if "00741048" in item for comment in comments(item)] == expected
    if status == 202:
        assert values(items[0], "00081196") == [1]
    assert web.is_stored(made) == (status != 409)


def test_version_2_refuses_a_bad_patient_id_as_it_is_one_of_five_core_attributes(web: Web) -> None:
    made = make(elements=[Raw(INDEXED["PatientID"], "LO", b"x" * 66)])
    reason, [comment] = failure(web.store(made))
    assert reason == 43264
    assert comment.startswith("DICOM100: (0010,0020) - ")


# Broken bodies


@VERSIONS
@pytest.mark.parametrize("cut", [b"--b--\r\n", b"--\r\n", b"\r\n--b--\r\n"])
def test_a_missing_end_boundary_is_400_and_nothing_is_stored(web: Web, version: str, cut: bytes) -> None:
    first, second, large = make(), make(), with_pixels(bytes(2 << 20), rows=1024, columns=2048)
    files = web.store_files()
    body = multipart(first.content, large.content, second.content).removesuffix(cut)
    assert_error(web.send(body, version=version), 400, "MalformedMultipart")
    assert_nothing_stored(web, first, second, large, files=files)


@VERSIONS
@pytest.mark.parametrize("body", [b"", b"no boundary in here", b"--c\r\n\r\nx\r\n--c--\r\n", b"--b\r\nbad\r\n\r\n"])
def test_a_body_without_its_boundary_is_400(web: Web, version: str, body: bytes) -> None:
    assert_error(web.send(body, version=version), 400, "MalformedMultipart")


@pytest.mark.parametrize("boundary", ["x" * 71, "a%20b%0D", "é"])
def test_a_boundary_that_cannot_be_one_is_refused(web: Web, boundary: str) -> None:
    body = multipart(make().content)
    content_type = f'multipart/related; type="application/dicom"; boundary="{boundary}"'
    answer = web.client.post(
        "/v2/studies",
        content=body,
        headers={b"Content-Type": content_type.encode("latin-1")},
    )
    assert answer.status_code == 400, answer.text
    assert_error(answer, 400, "MalformedMultipart")


def head_of(web: Web, body_bytes: int, *more: str) -> bytes:
    lines = [
        "POST /v2/studies HTTP/1.1",
        f"Host: 127.0.0.1:{web.service.port}",
        f"Content-Type: {RELATED}",
        f"Content-Length: {body_bytes}",
        *more,
    ]
    return "\r\n".join([*lines, "", ""]).encode()


@pytest.mark.parametrize("size", [600_000, 3_000_000])
def test_a_client_that_hangs_up_in_the_middle_leaves_nothing(web: Web, size: int) -> None:
    whole, cut = make(), with_pixels(bytes(size), rows=1000, columns=size // 1000)
    files = web.store_files()
    body = multipart(whole.content, cut.content)
    web.raw(head_of(web, len(body)), body[: len(body) - 1000], closes=True)
    deadline = time.monotonic() + 10
    seen_at_work = False
    while time.monotonic() < deadline:
        time.sleep(0.02)
        present = web.store_files() != files
        if seen_at_work and not present:
            break
        seen_at_work |= present
        if not present and time.monotonic() > deadline - 8:
            break
    assert_nothing_stored(web, whole, cut, files=files)
    assert "Traceback" not in web.service.log_path.read_text()
    web.must_store(whole, cut)


# Clients' habits


@pytest.mark.parametrize(
    ("before", "after"),
    [(b"\r\n", b"\r\n"), (b"a preamble\r\nof lines\r\n", b""), (b"", b""), (b"", b"\r\nan epilogue"), (b"\n", b"")],
)
def test_what_stands_around_the_parts_is_left_out(web: Web, before: bytes, after: bytes) -> None:
    made = make()
    answer = web.send(before + multipart(made.content, end=after))
    assert answer.status_code == 200, answer.text
    assert web.original(made) == made.content


@pytest.mark.parametrize(
    ("boundary", "quoted"),
    [
        ("x" * 70, False),
        ("----WebKitFormBoundary7MA4YWxkTrZu0gW", False),
        ("0f9c7b1e-5a1b-4a5a-8b1a-1c2d3e4f5a6b", True),
        ("=_Part 1:(?)/'", True),
        ("a;b", True),
        ("==", True),
    ],
)
def test_any_boundary_is_taken(web: Web, boundary: str, quoted: bool) -> None:
    made = make()
    content_type = f"multipart/related; boundary={f'{chr(34)}{boundary}{chr(34)}' if quoted else boundary}"
    answer = web.send(multipart(made.content, boundary=boundary), content_type)
    assert answer.status_code == 200, answer.text
    assert web.original(made) == made.content


def test_pixels_that_look_like_the_boundary_are_kept(web: Web) -> None:
    made = with_pixels(b"\r\n--", rows=2, columns=2)
    also = with_pixels(b"--b\r\n--c--\r\n\r\n\r\n\r", rows=1, columns=17)
    answer = web.store(made, also)
    assert answer.status_code == 200, answer.text
    assert (web.original(made), web.original(also)) == (made.content, also.content)


def test_part_heads_with_bare_line_feeds_are_taken(web: Web) -> None:
    first, second = make(), make()
    body = b"".join(
        [
            b"--b\nContent-Type: application/dicom\n\n" + first.content,
            b"\r\n--b\nContent-Type: application/dicom\n\n" + second.content,
            b"\r\n--b--",
        ]
    )
    answer = web.send(body)
    assert answer.status_code == 200, answer.text
    assert (web.original(first), web.original(second)) == (first.content, second.content)


@pytest.mark.parametrize("piece_bytes", [1, 7, 4096])
def test_a_body_may_come_chunked_in_pieces_of_any_size(web: Web, piece_bytes: int) -> None:
    first, second = make(), make()
    body = multipart(first.content, second.content)
    pieces = (body[start : start + piece_bytes] for start in range(0, len(body), piece_bytes))
    answer = web.send(pieces)
    assert answer.request.headers["Transfer-Encoding"] == "chunked"
    assert answer.status_code == 200, answer.text
    assert (web.original(first), web.original(second)) == (first.content, second.content)


def test_a_client_that_waits_for_100_continue_gets_it(web: Web) -> None:
    made = make()
    body = multipart(made.content)
    with socket.create_connection(("127.0.0.1", web.service.port), timeout=20) as raw:
        raw.sendall(head_of(web, len(body), "Expect: 100-continue", "Connection: close"))
        first = raw.recv(1 << 16)
        assert first.startswith(b"HTTP/1.1 100 ")
        raw.sendall(body)
        received = first.partition(b"\r\n\r\n")[2]
        while block := raw.recv(1 << 16):
            received += block
    assert received.startswith(b"HTTP/1.1 200 ")
    assert web.original(made) == made.content


# Size


def test_a_large_instance_that_arrives_in_small_pieces_is_stored_byte_for_byte(web: Web) -> None:
    pixels = random.Random(1).randbytes(30 * 1024 * 1024)
    made = with_pixels(pixels, rows=1024, columns=1024, frames=30)
    small_one = make()
    body = multipart(made.content, small_one.content)
    answer = web.send(body[start : start + 8191] for start in range(0, len(body), 8191))
    assert answer.status_code == 200, answer.text
    assert web.original(made) == made.content
    assert web.original(small_one) == small_one.content
    frame = web.get(f"{made.path}/frames/30", "application/octet-stream")
    assert frame.content == pixels[29 << 20 :]


def test_three_hundred_instances_go_in_one_request(web: Web) -> None:
    study, series = new_uid(), new_uid()
    made = [make(study=study, series=series) for _ in range(300)]
    answer = web.store(*made, study=study)
    assert answer.status_code == 200
    assert sop_uids(stored(answer)) == [each.sop for each in made]
    assert {each["00080018"]["Value"][0] for each in web.metadata(f"/studies/{study}")} == {each.sop for each in made}


def test_many_clients_that_store_the_same_instance_get_one_success(web: Web) -> None:
    made = make()
    statuses: list[int] = []

    def store() -> None:
        with httpx.Client(base_url=web.service.url, timeout=60) as client:
            answer = client.post("/v2/studies", content=multipart(made.content), headers={"Content-Type": RELATED})
            statuses.append(answer.status_code)

    files = web.store_files()
    threads = [threading.Thread(target=store) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(statuses) == [200] + [409] * 11
    assert len(web.store_files() - files) == 1


@VERSIONS
@pytest.mark.parametrize("is_single", [True, False])
def test_an_instance_over_the_limit_is_413_and_nothing_remains(small: Web, version: str, is_single: bool) -> None:
    good, large = make(), with_pixels(bytes(3 << 20), rows=1024, columns=3072)
    files = small.store_files()
    if is_single:
        answer = small.send(large.content, "application/dicom", version=version)
    else:
        answer = small.store(good, large, version=version)
    error = assert_error(answer, 413, "PayloadTooLarge")
    assert "DICOM_DEPOT_STORE_INSTANCE_BYTES_MAX" in error["message"]
    assert_nothing_stored(small, good, large, files=files)


def test_an_instance_at_the_limit_is_stored(small: Web) -> None:
    rest = INSTANCE_BYTES_MAX - len(with_pixels(bytes(2), rows=1, columns=2).content) + 2
    exact = with_pixels(bytes(rest), rows=1, columns=2)
    assert len(exact.content) == INSTANCE_BYTES_MAX
    assert small.store(exact).status_code == 200
    assert small.original(exact) == exact.content
    assert_error(small.send(exact.content + b"\0", "application/dicom"), 413, "PayloadTooLarge")


@VERSIONS
def test_too_many_instances_are_413_and_nothing_remains(small: Web, version: str) -> None:
    made = [make() for _ in range(INSTANCES_MAX + 1)]
    files = small.store_files()
    error = assert_error(small.store(*made, version=version), 413, "PayloadTooLarge")
    assert "DICOM_DEPOT_STORE_INSTANCES_MAX" in error["message"]
    assert_nothing_stored(small, *made, files=files)
    assert small.store(*made[:INSTANCES_MAX], version=version).status_code == 200


# PUT


def test_put_stores_what_is_new_and_replaces_what_is_there(web: Web) -> None:
    old, new = make(PatientName="Old"), make()
    web.must_store(old)
    replacement = make(study=old.study, series=old.series, sop=old.sop, PatientName="Replacement")
    answer = web.store(replacement, new, method="PUT")
    assert answer.status_code == 200, answer.text
    assert sop_uids(stored(answer)) == [old.sop, new.sop]
    assert web.original(old) == replacement.content != old.content
    [metadata] = web.metadata(old.path)
    assert metadata["00100010"]["Value"] == [{"Alphabetic": "Replacement"}]
    assert len(web.metadata(f"/studies/{old.study}")) == 1
    entries = [
        entry
        for entry in web.client.get("/v2/changefeed?limit=200&offset=0&includeMetadata=false").json()
        if entry["sopInstanceUid"] == old.sop
    ] or _last_changes(web, old.sop)
    assert [(entry["action"], entry["state"]) for entry in entries] == [("Create", "Replaced"), ("Update", "Current")]


def _last_changes(web: Web, sop: str) -> list[dict[str, Any]]:
    last = web.client.get("/v2/changefeed/latest").json()["sequence"]
    found = web.client.get(f"/v2/changefeed?offset={max(0, last - 10)}").json()
    return [entry for entry in found if entry["sopInstanceUid"] == sop]


def test_put_of_the_same_bytes_succeeds_and_changes_nothing(web: Web) -> None:
    made = make()
    web.must_store(made)
    files = web.store_files()
    before = web.client.get("/v2/changefeed/latest").json()
    answer = web.store(made, method="PUT")
    assert answer.status_code == 200, answer.text
    assert sop_uids(stored(answer)) == [made.sop]
    assert web.client.get("/v2/changefeed/latest").json() == before
    assert web.store_files() == files
    assert web.original(made) == made.content


def test_put_to_a_study_replaces_within_it_only(web: Web) -> None:
    made, other = make(), make()
    web.must_store(made, other)
    changed = make(study=made.study, series=made.series, sop=made.sop, PatientName="Changed")
    foreign = make(study=other.study, series=other.series, sop=other.sop, PatientName="Changed")
    answer = web.store(changed, foreign, study=made.study, method="PUT")
    assert answer.status_code == 202
    assert values(answer.json(), "00081190") == [f"{web.service.url}/v2/studies/{made.study}"]
    assert sop_uids(failed(answer)) == [other.sop]
    assert web.original(made) == changed.content
    assert web.original(other) == other.content


def test_a_put_that_fails_keeps_what_is_there(web: Web) -> None:
    made = make()
    web.must_store(made)
    bad = make(study=made.study, series=made.series, sop=made.sop, without=["PatientID"])
    assert failure(web.store(bad, method="PUT"))[0] == 43264
    cut = make(study=made.study, series=made.series, sop=made.sop, PatientName="Cut")
    body = multipart(cut.content).removesuffix(b"--b--\r\n")
    assert_error(web.send(body, method="PUT"), 400, "MalformedMultipart")
    assert web.original(made) == made.content


@pytest.mark.parametrize("path", ["/v1/studies", "/studies", "/v1/studies/1.2.3", "/studies/1.2.3"])
def test_version_1_has_no_put(web: Web, path: str) -> None:
    made, files = make(study="1.2.3"), web.store_files()
    answer = web.client.put(path, content=multipart(made.content), headers={"Content-Type": RELATED})
    assert_error(answer, 405, "MethodNotAllowed")
    assert "PUT" not in answer.headers["Allow"]
    assert_nothing_stored(web, made, files=files)


def test_a_path_without_a_version_speaks_version_1(web: Web) -> None:
    made = make()
    answer = web.client.post("/studies", content=multipart(made.content), headers={"Content-Type": RELATED})
    assert answer.status_code == 200
    [item] = stored(answer)
    assert "00741048" not in item
    assert values(item, "00081190") == [f"{web.service.url}/v1{made.path}"]


def test_a_connection_can_be_used_again_after_any_refusal_or_is_said_to_be_closed(web: Web) -> None:
    """An answer that comes before its request's body was read must say that the connection ends with it."""
    large = bytes(3 << 20)
    refused: list[tuple[str, bytes, dict[str, str]]] = [
        ("/v2/studies", large, {"Content-Type": "text/plain"}),
        ("/v2/studies", large, {"Content-Type": RELATED, "Accept": "image/png"}),
        ("/v2/studies/not-a-uid", large, {"Content-Type": RELATED}),
        ("/v2/studies", large, {"Content-Type": RELATED}),
        ("/v2/studies", b"short", {"Content-Type": "text/plain"}),
    ]
    with httpx.Client(base_url=web.service.url, timeout=60) as client:
        for _ in range(5):
            for path, content, headers in refused:
                assert client.post(path, content=content, headers=headers).is_client_error
                assert client.get("/health/check").status_code == 200
