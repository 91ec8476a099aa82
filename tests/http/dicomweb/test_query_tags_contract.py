"""Extended query tags on the wire: add, list, get, update, delete, errors, the operation that indexes, and searches."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import httpx
import pytest
from pydicom.dataset import Dataset

from tests.http.dicomweb.conftest import Made, Raw, Web, make, new_uid, open_web

_END_SECONDS = 60


@pytest.fixture
def tags(web: Web) -> Iterator[Web]:
    """The module's service, without extended query tags before and after."""
    yield web
    for tag in web.get("/extendedquerytags").json():
        if "operation" in tag:
            wait(web, tag["operation"]["id"])
        delete(web, tag["path"])


def add(web: Web, *wanted: dict[str, Any], version: str = "v2") -> httpx.Response:
    return web.client.post(f"/{version}/extendedquerytags", json=list(wanted))


def must_add(web: Web, *wanted: dict[str, Any]) -> None:
    answer = add(web, *wanted)
    assert answer.status_code == 202, answer.text
    assert wait(web, answer.json()["id"])["status"] == "succeeded"


def wait(web: Web, operation_id: str) -> dict[str, Any]:
    end = time.monotonic() + _END_SECONDS
    while time.monotonic() < end:
        answer = web.client.get(f"/v2/operations/{operation_id}")
        if answer.status_code == 200:
            state: dict[str, Any] = answer.json()
            return state
        time.sleep(0.05)
    raise TimeoutError(operation_id)


def delete(web: Web, path: str) -> httpx.Response:
    return web.client.delete(f"/v2/extendedquerytags/{path}")


def patch(web: Web, path: str, body: Any) -> httpx.Response:
    return web.client.patch(f"/v2/extendedquerytags/{path}", json=body)


def found(web: Web, path: str, tag: str = "00080018") -> set[str]:
    """The values of one attribute in what a search finds."""
    answer = web.get(path)
    if answer.status_code == 204:
        return set()
    assert answer.status_code == 200, answer.text
    return {result[tag]["Value"][0] for result in answer.json()}


def refused(answer: httpx.Response, status: int = 400) -> tuple[str, str]:
    """Target and message of an error."""
    assert answer.status_code == status, answer.text
    body = answer.json()
    return body["target"], body["message"]


def test_a_tag_is_added_listed_searched_and_removed(tags: Web) -> None:
    early = make(PatientWeight="70", ProtocolName="Knee left")
    other = make(ProtocolName="Spine")
    tags.must_store(early, other)
    assert "cannot be searched" in refused(tags.get("/instances?ProtocolName=Spine"))[1]
    answer = add(tags, {"path": "ProtocolName", "level": "instance"})
    assert answer.status_code == 202
    operation_id = answer.json()["id"]
    root = tags.service.url
    assert answer.json() == {"id": operation_id, "href": f"{root}/v2/operations/{operation_id}"}
    assert answer.headers["Location"] == answer.json()["href"]
    state = wait(tags, operation_id)
    assert state["type"] == "reindex"
    assert state["percentComplete"] == 100
    assert state["resources"] == [f"{root}/v2/extendedquerytags/00181030"]
    assert "results" not in state
    assert "error" not in state
    entry = {"path": "00181030", "vr": "LO", "level": "instance", "status": "ready", "queryStatus": "enabled"}
    assert tags.get("/extendedquerytags").json() == [entry]
    assert tags.get("/extendedquerytags/ProtocolName").json() == entry
    assert tags.get("/extendedquerytags/00181030").json() == entry
    assert found(tags, "/instances?ProtocolName=knee%20LEFT") == {early.sop}
    assert found(tags, "/instances?00181030=*n*") == {early.sop, other.sop}
    late = make(ProtocolName="Knee right")
    tags.must_store(late)
    assert found(tags, "/instances?ProtocolName=knee*") == {early.sop, late.sop}
    [result] = tags.get("/instances?ProtocolName=Spine").json()
    assert result["00181030"] == {"vr": "LO", "Value": ["Spine"]}
    assert delete(tags, "ProtocolName").status_code == 204
    refused(delete(tags, "ProtocolName"), 404)
    refused(tags.get("/extendedquerytags/ProtocolName"), 404)
    refused(tags.get("/instances?ProtocolName=Spine"))
    must_add(tags, {"path": "00181030", "vr": "LO", "level": "INSTANCE"})
    assert found(tags, "/instances?ProtocolName=knee*") == {early.sop, late.sop}


def test_study_and_series_tags_say_what_the_newest_instance_says(tags: Web) -> None:
    study, series = new_uid(), new_uid()
    first = make(study=study, series=series, PatientComments=None, BodyPartExamined="KNEE", InstitutionName="North")
    second = make(study=study, series=series, BodyPartExamined="HIP", InstitutionName="South")
    tags.must_store(first, second)
    must_add(
        tags,
        {"path": "BodyPartExamined", "level": "Series"},
        {"path": "InstitutionName", "level": "Study"},
    )
    assert found(tags, "/studies?InstitutionName=south", "0020000D") == {study}
    assert found(tags, "/studies?InstitutionName=north", "0020000D") == set()
    assert found(tags, "/series?BodyPartExamined=hip", "0020000E") == {series}
    third = make(study=study, series=series, BodyPartExamined="FOOT", InstitutionName="East")
    tags.must_store(third)
    assert found(tags, "/studies?InstitutionName=east", "0020000D") == {study}
    assert found(tags, "/studies?InstitutionName=south", "0020000D") == set()
    assert tags.client.delete(f"/v2{third.path}").status_code == 204
    assert found(tags, "/studies?InstitutionName=south", "0020000D") == {study}
    assert found(tags, f"/studies/{study}/series?BodyPartExamined=hip", "0020000E") == {series}
    assert found(tags, "/instances?BodyPartExamined=foot") == set()
    assert found(tags, "/instances?InstitutionName=south&BodyPartExamined=hip") == {first.sop, second.sop}
    refused(tags.get("/studies?BodyPartExamined=hip"))
    refused(tags.get(f"/studies/{study}/instances?InstitutionName=south"))


_VALUES: Sequence[tuple[str, Any, str, str]] = (
    ("StationAETitle", "AET1", "aet1", "AET2"),
    ("PatientAge", "042Y", "042Y", "043Y"),
    ("BodyPartExamined", "KNEE", "knee", "HIP"),
    ("AcquisitionDate", "20240229", "20240201-20240301", "20240301-"),
    ("AcquisitionDateTime", "20240229101112.5+0100", "202402291011-", "20240301-"),
    ("DiffusionBValue", 0.5, "5e-1", "0.6"),
    ("RecommendedDisplayFrameRateInFloat", 0.1, "0.1", "0.2"),
    ("EchoTrainLength", "4", "4", "5"),
    ("InstitutionName", "Käthe Klinik", "KÄTHE*", "Kathe*"),
    ("PerformingPhysicianName", "Müller^Jörg", "muller^jorg", "Meier"),
    ("StationName", "CT 1", "ct ?", "CT2"),
    ("ReferencePixelX0", -3, "-3", "3"),
    ("TagAngleSecondAxis", -2, "-2", "2"),
    ("AcquisitionTime", "101112.25", "1011", "1012-"),
    ("FrameOfReferenceUID", "1.2.840.1", "1.9,1.2.840.1", "1.2.840"),
    ("RegionLocationMinX0", 70000, "70000", "70001"),
    ("SamplesPerPixel", 3, "3", "1"),
)


def test_each_value_representation_that_may_be_one_is_matched_by_its_own_rules(tags: Web) -> None:
    made = {keyword: make(study=new_uid(), **{keyword: value}) for keyword, value, _, _ in _VALUES}
    tags.must_store(*made.values())
    must_add(tags, *({"path": keyword, "level": "Instance"} for keyword, _, _, _ in _VALUES))
    for keyword, _, matching, other in _VALUES:
        assert made[keyword].sop in found(tags, f"/instances?{keyword}={matching}"), keyword
        assert made[keyword].sop not in found(tags, f"/instances?{keyword}={other}"), keyword


def test_fuzzy_matching_reaches_names_of_extended_query_tags(tags: Web) -> None:
    made = make(OperatorsName="Ångström^Zoë")
    tags.must_store(made)
    must_add(tags, {"path": "OperatorsName", "level": "Series"})
    assert found(tags, "/series?OperatorsName=zo%20ang&fuzzymatching=true", "0020000E") == {made.series}
    assert found(tags, "/series?OperatorsName=ngs&fuzzymatching=true", "0020000E") == set()


def test_several_values_match_by_any_of_them(tags: Web) -> None:
    made = make(OtherPatientIDs=None, ImageType=["DERIVED", "SECONDARY", "MPR"])
    tags.must_store(made)
    must_add(tags, {"path": "ImageType", "level": "Instance"})
    assert found(tags, "/instances?ImageType=mpr") == {made.sop}
    assert found(tags, "/instances?ImageType=sec*") == {made.sop}


def test_private_attributes_are_found_in_the_block_of_their_creator(tags: Web) -> None:
    def private(block: int, creator: str, value: str) -> Made:
        def change(made: Dataset) -> None:
            made.add_new((0x0099, block), "LO", creator)
            made.add_new((0x0099, block << 8 | 0x01), "SH", value)

        return make(change=change)

    here, moved, foreign = private(0x10, "DEPOT", "a"), private(0x11, "DEPOT", "a"), private(0x10, "OTHER", "a")
    tags.must_store(here, moved, foreign)
    must_add(tags, {"path": "00991001", "vr": "SH", "privateCreator": "DEPOT", "level": "Instance"})
    assert tags.get("/extendedquerytags/00991001").json()["privateCreator"] == "DEPOT"
    assert found(tags, "/instances?00991001=A") == {here.sop, moved.sop}


@pytest.mark.parametrize(
    ("wanted", "target", "words"),
    [
        ({"level": "Study"}, "[0].path", "required"),
        ({"path": "PatientAge"}, "[0].level", "required"),
        ({"path": "", "level": "Study"}, "[0].path", "no attribute"),
        ({"path": "patientAge", "level": "Study"}, "[0].path", "Did you mean|no attribute"),
        ({"path": "0010101", "level": "Study"}, "[0].path", "no attribute"),
        ({"path": "00189999", "level": "Study"}, "[0].path", "PS3.6"),
        ({"path": "PatientName", "level": "Study"}, "[0].path", "without being"),
        ({"path": "0020000D", "level": "Study"}, "[0].path", "without being"),
        ({"path": "RequestAttributesSequence", "level": "Study"}, "[0].vr", "SQ"),
        ({"path": "RequestAttributesSequence.AccessionNumber", "level": "Study"}, "[0].path", "sequence"),
        ({"path": "PatientAge", "level": "Patient"}, "[0].level", "Study, Series or Instance"),
        ({"path": "PatientAge", "vr": "LO", "level": "Study"}, "[0].vr", "VR AS"),
        ({"path": "PatientWeight", "level": "Study"}, "[0].vr", "DS"),
        ({"path": "PatientAge", "level": "Study", "privateCreator": "X"}, "[0].privateCreator", "not private"),
        ({"path": "00991001", "level": "Study", "privateCreator": "X"}, "[0].vr", "needs its VR"),
        ({"path": "00991001", "level": "Study", "vr": "SH"}, "[0].privateCreator", "needs its private creator"),
        ({"path": "00991001", "level": "Study", "vr": "SH", "privateCreator": "x" * 65}, "[0].privateCreator", "64"),
        ({"path": "00990010", "level": "Study", "vr": "LO", "privateCreator": "X"}, "[0].path", "below 1000"),
        ({"path": 7, "level": "Study"}, "[0].path", "string"),
        ({"path": "PatientAge", "level": "Study", "more": 1}, "[0].more", "not a member"),
    ],
)
def test_what_cannot_be_a_tag_is_refused_with_its_place(
    tags: Web, wanted: dict[str, Any], target: str, words: str
) -> None:
    place, message = refused(add(tags, wanted))
    assert place == target
    assert any(word in message for word in words.split("|")), message
    assert tags.get("/extendedquerytags").json() == []


def test_bodies_that_are_no_list_of_tags_are_refused(tags: Web) -> None:
    assert refused(add(tags))[0] == "body"
    tag = {"path": "PatientAge", "level": "Study"}
    assert refused(tags.client.post("/v2/extendedquerytags", json=tag))[0] == "body"
    assert refused(add(tags, tag, {"path": "00101010", "level": "Series"}))[0] == "[1].path"
    assert (
        tags.client.post("/v2/extendedquerytags", content=b"[]", headers={"Content-Type": "text/plain"}).status_code
        == 415
    )
    assert tags.get("/extendedquerytags").json() == []


def test_a_tag_that_is_there_and_a_second_operation_conflict(tags: Web) -> None:
    must_add(tags, {"path": "PatientAge", "level": "Study"})
    assert "is there already" in refused(add(tags, {"path": "00101010", "level": "Study"}), 409)[1]


def test_a_tag_can_be_disabled_and_enabled(tags: Web) -> None:
    made = make(PatientAge="042Y")
    tags.must_store(made)
    must_add(tags, {"path": "PatientAge", "level": "Study"})
    answer = patch(tags, "PatientAge", {"queryStatus": "disabled"})
    assert answer.status_code == 200
    assert answer.json()["queryStatus"] == "disabled"
    assert "disabled" in refused(tags.get("/studies?PatientAge=042Y"))[1]
    assert patch(tags, "00101010", {"QUERYSTATUS": "Enabled"}).json()["queryStatus"] == "enabled"
    assert made.study in found(tags, "/studies?PatientAge=042Y", "0020000D")
    assert refused(patch(tags, "PatientAge", {"queryStatus": "on"}))[0] == "queryStatus"
    assert refused(patch(tags, "PatientAge", {"queryStatus": "enabled", "level": "Study"}))[0] == "level"
    refused(patch(tags, "PatientSize", {"queryStatus": "enabled"}), 404)


def test_values_that_cannot_be_indexed_are_listed_and_disable_the_tag_until_it_is_enabled(tags: Web) -> None:
    good = make(SoftwareVersions=None, StationName="ONE")
    wrong_vr = make(elements=[Raw(0x00081010, "LO", b"TWO ")])
    tags.must_store(good, wrong_vr)
    must_add(tags, {"path": "StationName", "level": "Instance"})
    entry = tags.get("/extendedquerytags/StationName").json()
    href = f"{tags.service.url}/v2/extendedquerytags/00081010/errors"
    assert entry["queryStatus"] == "disabled"
    assert entry["errors"] == {"count": 1, "href": href}
    [error] = tags.client.get(href).json()
    assert error["studyInstanceUid"] == wrong_vr.study
    assert error["seriesInstanceUid"] == wrong_vr.series
    assert error["sopInstanceUid"] == wrong_vr.sop
    assert "VR LO" in error["errorMessage"]
    assert "TWO" not in error["errorMessage"]
    assert tags.client.get(href, params={"offset": 1}).json() == []
    refused(tags.client.get(href, params={"LIMIT": 201}))
    assert "disabled" in refused(tags.get("/instances?StationName=ONE"))[1]
    patch(tags, "StationName", {"queryStatus": "enabled"})
    answer = tags.get("/instances?StationName=ONE")
    assert [result["00080018"]["Value"] for result in answer.json()] == [[good.sop]]
    assert answer.headers["erroneous-dicom-attributes"] == "00081010"
    assert "erroneous-dicom-attributes" not in tags.get("/instances").headers


def test_version_1_refuses_instances_whose_value_of_a_tag_is_unsound(tags: Web) -> None:
    must_add(tags, {"path": "InstitutionalDepartmentName", "level": "Instance"})
    wrong = make(elements=[Raw(0x00081040, "LO", b"x" * 66)])
    answer = tags.store(wrong, version="v1")
    assert answer.status_code == 409
    assert tags.store(wrong, version="v2").status_code == 202
    assert tags.get("/extendedquerytags/InstitutionalDepartmentName").json()["queryStatus"] == "enabled"


def test_there_are_at_most_128(tags: Web) -> None:
    many = [{"path": f"0099{0x1000 + n:04X}", "vr": "SH", "privateCreator": "X", "level": "Study"} for n in range(128)]
    assert refused(add(tags, *many, {"path": "PatientAge", "level": "Study"}))[0] == "body"
    must_add(tags, *many)
    assert "at most 128" in refused(add(tags, {"path": "PatientAge", "level": "Study"}), 503)[1]
    listed = tags.get("/extendedquerytags?Offset=120&LIMIT=5").json()
    assert [tag["path"] for tag in listed] == [tag["path"] for tag in many[120:125]]
    assert len(tags.get("/extendedquerytags").json()) == 100


def test_version_1_says_completed(tags: Web) -> None:
    answer = add(tags, {"path": "PatientAge", "level": "Study"}, version="v1")
    assert answer.json()["href"].startswith(f"{tags.service.url}/v1/operations/")
    wait(tags, answer.json()["id"])
    state = tags.client.get(answer.json()["href"]).json()
    assert state["status"] == "completed"
    assert state["resources"] == [f"{tags.service.url}/v1/extendedquerytags/00101010"]


def test_without_any_tag_the_list_is_empty(tmp_path_factory: pytest.TempPathFactory) -> None:
    with open_web(tmp_path_factory.mktemp("empty")) as web:
        assert web.get("/extendedquerytags").json() == []
        must_add(web, {"path": "PatientAge", "level": "Study"})  # nothing is stored: it ends at once
